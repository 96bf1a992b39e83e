"""The products of groups on Hopper: warp-specialised, persistent, in FP8 and in BF16.

    grid: 66 clusters of 2 programs, each takes every 66th pair of tiles [128, n] of the result, one
          beside the other, n = 128, 192 or 256 (BF16). Which rows a tile has, and of which group,
          they read from a schedule made on the device (schedule.py); a tile in which groups meet
          is in it once for each.
    program: 3 warpgroups, a ring of 4 or 5 stages in shared memory, one stage a step of 128 bytes
             of k

      warpgroup 2    for each step: wait empty[s] and scales_read[s], then TMA into stage s
      40 registers       half of a [128, k] for both programs, b [n, k] of the group,
                         scales of a [128], scales of b [n] or [32]
                         which arrive at full[s]
                                        |
                                        v
      warpgroups 0, 1    FP8, for each step: wait full[s], then
      232 registers      part [64, n] = 4 x QGMMA 64 x n x 32, a fresh accumulator
                         arrive at empty[s] of both programs, at scales_read[s] of this one
                         sums [64, n] += part * scales of a * scales of b
                     BF16, for each step: wait full[s], then
                         sums [64, n] += 4 x HGMMA 64 x n x 16, which runs on into the next step
                         arrive at empty[s - 1] of both programs
                     for each tile: sums -> shared memory -> TMA, which drops what is past the edges

Where a group ends within the 64 rows of a warpgroup, TMA would write over the next one's. Those
rows go to shared memory as they are, without a swizzle, and from there in copies of 32, 16, ... 1
rows, as many as the binary digits of their number. Loads need no care: rows of other groups give
sums that nobody stores.

Ragged k (the gradient of weights): a and b are [m, k], [n, k] in FP8; [k, m], [k, n] in BF16, whose
wgmma transposes. A tile's k are the rows of its group, which are whole steps.

Bound: see fp8_gemm.mosaic_sm90 for FP8, whose 832 cycles of shared memory for 768 of tensor core
are the same. Here a is what the cluster shares, so that a group's last tile wastes up to 127 rows
and not 255; that takes 32 KB from L2 in a step in place of 28: 845 cycles, 91 %. In BF16:

    a step    wgmma reads 2 x (64 + n) x 128 bytes, TMA writes (128 + n) x 128 bytes
    n = 256   640 + 384 = 1,024 cycles for 1,024 of tensor core    40 KB from L2: 1,056 cycles: 97 %

Source: DeepSeek-V3 Technical Report §3.3.2; the order of work is DeepGEMM's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels.cost import work_in_name
from dsv3_kernels.fp8_gemm.mosaic_sm90_promotion import (
    BLOCK_SCALES,
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    ROWS,
    fill_up,
    swizzled,
)
from dsv3_kernels.grouped_gemm import schedule
from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.grouped_gemm.mosaic_sm90_warpgroups import Program
from dsv3_kernels.grouped_gemm.plan import Plan, plan_ragged_k, plan_rows, unsupported
from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.grouped_gemm.tiles import Tiles


def ragged_rows(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    transpose_b: bool = False,
    alignment: int = 1,
    tiles: Tiles | None = None,
) -> Float[Array, "rows n"]:
    """See op.py. `tiles` are chosen for None. NotImplementedError: see `unsupported`.

    Nothing is copied but scales where rows are a multiple of 8, k of 128 (FP8) or 64 (BF16), n of
    64 (BF16 out) or 32 (FP32 out); else operands are filled up, or the result is cut.
    """
    _require_supported(a, b, scales, out_dtype)
    rows, k = a.shape
    plan = plan_rows(
        a,
        b,
        scales,
        out_dtype,
        transpose_b=transpose_b,
        group_rows=-(-rows // b.shape[0]),
        alignment=alignment,
        tiles=tiles,
    )
    work = schedule.ragged_rows(group_sizes, rows, sizes.M, alignment, -(-k // plan.depth))
    return _run(plan, work, a, b, scales)[:rows, : plan.n]


def masked_rows(
    a: Float[Array, "groups max_rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    transpose_b: bool = False,
    expected_rows: int | None = None,
    tiles: Tiles | None = None,
) -> Float[Array, "groups max_rows n"]:
    """See `ragged_rows`: these are its rows, but groups begin at multiples of `max_rows`."""
    _require_supported(a, b, scales, out_dtype)
    groups, max_rows, k = a.shape
    a = a.reshape(-1, k)
    if scales is not None:
        scales = scales[0].reshape(a.shape[0], -1), scales[1]
    plan = plan_rows(
        a,
        b,
        scales,
        out_dtype,
        transpose_b=transpose_b,
        group_rows=max_rows if expected_rows is None else expected_rows,
        alignment=max_rows,
        tiles=tiles,
    )
    work = schedule.masked_rows(group_sizes, max_rows, sizes.M, ROWS, -(-k // plan.depth))
    out = _run(plan, work, a, b, scales)[: a.shape[0], : plan.n]
    return out.reshape(groups, max_rows, plan.n)


def ragged_k(
    a: Float[Array, "a_rows a_columns"],
    b: Float[Array, "b_rows b_columns"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    alignment: int = 1,
    tiles: Tiles | None = None,
) -> Float[Array, "groups m n"]:
    """See `ragged_rows`."""
    _require_supported(a, b, scales, out_dtype, k_alignment=alignment)
    plan = plan_ragged_k(a, b, group_sizes.size, scales, out_dtype, tiles=tiles)
    rows = a.shape[0 if plan.is_a_transposed else 1]
    work = schedule.ragged_k(group_sizes, rows, plan.depth)
    return _run(plan, work, a, b, scales)[:, : plan.m, : plan.n]


def _require_supported(a, b, scales, out_dtype, *, k_alignment=None) -> None:
    if reason := unsupported(a, b, scales, out_dtype, k_alignment=k_alignment):
        raise NotImplementedError(f"grouped_gemm on Hopper: {reason}")


def _run(
    plan: Plan, work: Int[Array, "entries 5"], a: Array, b: Array, scales: Scales | None
) -> Array:
    """The kernel's result, of a few rows and columns more."""
    operands = [fill_up(x, (8, plan.depth)) for x in (a, b)]
    if scales is not None:
        operands += [fill_up(jnp.swapaxes(scale, -1, -2), (1, 4)) for scale in scales]
    shape = plan.m + -plan.m % 8, plan.n + -plan.n % plan.store_columns
    if plan.is_k_ragged:
        shape = plan.groups, *shape
    out_type = jax.ShapeDtypeStruct(shape, plan.out_dtype)
    values = (*operands, out_type)
    cost = pl.CostEstimate(
        flops=plan.flops,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in values),
        transcendentals=0,
    )
    with work_in_name("fp8" if plan.is_fp8 else "bf16", plan.flops):
        return _kernel_of(plan, out_type, cost)(work, *operands)


def _kernel_of(plan: Plan, out_type: jax.ShapeDtypeStruct, cost: pl.CostEstimate) -> Callable:
    """The kernel: (schedule, a, b, and of FP8 a_scale [k/128, m], b_scale) -> result."""
    stages, n, width = plan.tiles.stages, plan.tiles.n, plan.store_columns

    def operand(lines, is_transposed):
        shape = (plan.depth, lines) if is_transposed else (lines, plan.depth)
        return plgpu.SMEM(
            (stages, *shape), plan.dtype, transforms=swizzled(128, plan.dtype.itemsize)
        )

    slots, stored = (2, plan.store_slots, ROWS, width), swizzled(128, plan.out_dtype.itemsize)
    scratch = dict(
        a_smem=operand(sizes.M, plan.is_a_transposed),
        b_smem=operand(n, plan.is_b_transposed),
        out_smem=plgpu.SMEM(slots, plan.out_dtype, transforms=stored),
        # As many copies land in a stage.
        full=plgpu.Barrier(num_arrivals=4 if plan.is_fp8 else 2, num_barriers=stages),
        # Two consumers leave it, in each program whose shared memory a is copied to.
        empty=plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=2, num_barriers=stages
        ),
    )
    if plan.has_partial_stores:
        scratch |= dict(partial_smem=plgpu.SMEM((2, ROWS, width), plan.out_dtype))
    if plan.is_fp8:
        b_scales = n if plan.is_b_in_rows else BLOCK_SCALES
        scratch |= dict(
            a_scale_smem=plgpu.SMEM((stages, sizes.M), jnp.float32),
            b_scale_smem=plgpu.SMEM((stages, b_scales), jnp.float32),
            scales_read=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        )
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=out_type,
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(plan.tiles.cluster,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="grouped_gemm",
        scratch_types=scratch,
        cost_estimate=cost,
    )


def _kernel(plan, work, a, b, *scales_and_out, **scratch):
    *scales, out = scales_and_out
    cluster, member, warpgroup = map(lax.axis_index, ("cluster", "member", "warpgroup"))
    program = Program(plan, work, a, b, scales, out, cluster, member, warpgroup, **scratch)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        start = jnp.int32(0), jnp.int32(0)
        program.leave(*lax.fori_loop(0, program.rounds(), program.produce, start))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        lax.fori_loop(0, program.rounds(), program.consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
