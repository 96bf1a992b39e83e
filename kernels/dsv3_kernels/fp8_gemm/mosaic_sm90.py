"""The product of two quantised matrices on Hopper: warp-specialised, persistent, in FP8.

    grid: 66 clusters of 2 programs, each takes every 66th pair of tiles [128, n] of the result, one
          below the other, n = 128 or 192
    program: 3 warpgroups, a ring of 4 or 5 stages in shared memory, one stage a step of 128 of k

      warpgroup 2    for each step: wait empty[s] and scales_read[s], then TMA into stage s
      40 registers       a [128, 128], half of b [n, 128] for both programs,
                         scales of a [128], scales of b [n] or [32]
                         which arrive at full[s]
                                        |
                                        v
      warpgroups 0, 1    for each step: wait full[s], then
      232 registers      part [64, n] = 4 x QGMMA 64 x n x 32, a fresh accumulator
                         arrive at empty[s] of both programs, at scales_read[s] of this one
                         sums [64, n] += part * scales of a * scales of b
                     for each tile: sums -> shared memory -> TMA, which drops what is past the edges

      tensor core    |wg 0: 4 QGMMA|wg 1: 4 QGMMA|wg 0: 4 QGMMA|wg 1: 4 QGMMA|
      FP32 units     |wg 1: sums   |wg 0: sums   |wg 1: sums   |wg 0: sums   |

The accumulator of a tensor core keeps 14 bits, so its sums are promoted to FP32 every 128 of k.
That costs a warpgroup n/2 FFMA a thread (and as many FMUL where each column of b has a scale); the
other's wgmma runs meanwhile. What is past the edges of a and b arrives as zeros.

At empty[s] one thread arrives for its warpgroup: wgmma has read a and b for all of it. Scales are
read by every thread, so at scales_read[s] every thread arrives.

Bound: the tensor core, in principle: 2 x 4 x n/2 = 768 cycles a step for n = 192, against 2 x 163
instructions for each of the four schedulers. In fact shared memory, which moves 128 bytes a cycle:

    a step    wgmma reads 2 x (64 + n) x 128 bytes, TMA writes (128 + n) x 128 bytes
    n = 192   512 + 320 = 832 cycles for 768 of tensor core: 92 %      28 KB from L2: 739 cycles
    n = 128   384 + 256 = 640 cycles for 512 of tensor core: 80 %      24 KB from L2: 634 cycles

Scales of columns are read by every warp, n more cycles a step. Without clusters L2 would be the
bound, with 40 KB (73 %). A tile of [256, 128] needs 128 sums and 64 parts a thread; ptxas then
spills 64 bytes or more.

Source: DeepSeek-V3 Technical Report §3.3.2; the order of work is DeepGEMM's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels.cost import work_in_name
from dsv3_kernels.fp8_gemm import tiles as sizes
from dsv3_kernels.fp8_gemm.mosaic_sm90_promotion import (
    BLOCK_SCALES,
    CONSUMER_REGISTERS,
    GROUP,
    PRODUCER_REGISTERS,
    ROWS,
    Promotion,
    fill_up,
    swizzled,
)
from dsv3_kernels.fp8_gemm.tiles import Tiles
from dsv3_kernels.quantize.reference import BLOCK, E4M3

OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def gemm(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"],
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"],
    out_dtype: DTypeLike,
    *,
    tiles: Tiles | None = None,
) -> Float[Array, "*batch m n"]:
    """a b^T in `out_dtype`. `tiles` are chosen for None. NotImplementedError: see `unsupported`.

    Nothing is copied but scales where k is a multiple of 64, m and n are of 8, and n is of 64
    (BF16) or 32 (FP32); else operands are filled up, or the result is cut.
    """
    if reason := unsupported(a, a_scale, b, b_scale, out_dtype):
        raise NotImplementedError(f"fp8_gemm on Hopper: {reason}")
    *batch, m, _ = a.shape
    n = b.shape[-2]
    tiles = tiles or sizes.choose(math.prod(batch), m, n, b_scale.shape[-2] == n)
    a, b, a_scale, b_scale = (x.reshape(-1, *x.shape[-2:]) for x in (a, b, a_scale, b_scale))
    a, b = fill_up(a, (8, 64)), fill_up(b, (8, 64))
    scales = [fill_up(jnp.swapaxes(scale, -1, -2), (1, 4)) for scale in (a_scale, b_scale)]
    plan = _Plan(
        batch=a.shape[0],
        m=a.shape[1],
        n=b.shape[1],
        k=a.shape[2],
        b_in_rows=b_scale.shape[-2] == n,
        out_dtype=jnp.dtype(out_dtype),
        tiles=tiles,
    )
    with work_in_name("fp8", plan.cost.flops):
        out = _product(plan)(a, scales[0], b, scales[1])
    return out[:, :m, :n].reshape(*batch, m, n)


def unsupported(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"],
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"],
    out_dtype: DTypeLike,
) -> str:
    """Why `gemm` will not take these (only shapes and dtypes are looked at), or an empty string."""
    for name, array, dtype in (
        ("a", a, E4M3),
        ("b", b, E4M3),
        ("a_scale", a_scale, jnp.float32),
        ("b_scale", b_scale, jnp.float32),
    ):
        if array.dtype != dtype:
            return f"{name} is {array.dtype}, expected {jnp.dtype(dtype)}"
        if array.size == 0:
            return f"{name} is {list(array.shape)}, expected at least one value"
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        return f"out_dtype is {jnp.dtype(out_dtype)}, expected bfloat16 or float32"
    return ""


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A problem, its sizes filled up, and how it is worked on."""

    batch: int
    m: int
    n: int
    k: int
    b_in_rows: bool
    out_dtype: jnp.dtype
    tiles: Tiles

    @property
    def grid(self) -> tuple[int, int, int]:
        """A cluster's tiles of the result: matrices, rows, columns."""
        return self.batch, -(-self.m // self.tiles.cluster_m), -(-self.n // self.tiles.n)

    @property
    def k_steps(self) -> int:
        return -(-self.k // sizes.K)

    @property
    def clusters(self) -> int:
        return min(self.tiles.programs // self.tiles.cluster, math.prod(self.grid))

    @property
    def store_columns(self) -> int:
        """Of the result in one store."""
        return sizes.STORE_BYTES // self.out_dtype.itemsize

    @property
    def cost(self) -> pl.CostEstimate:
        values = self.m * self.k + self.n * self.k + self.m * self.n * self.out_dtype.itemsize
        flops = 2 * self.batch * self.m * self.n * self.k
        return pl.CostEstimate(flops=flops, bytes_accessed=self.batch * values, transcendentals=0)


def _product(plan: _Plan) -> Any:
    """The kernel: (a [e, m, k], a_scale [e, k/128, m], b [e, n, k], b_scale) -> [e, m, n...]."""
    stages, n, width = plan.tiles.stages, plan.tiles.n, plan.store_columns
    # A row of 128 values in pieces of 128 bytes, or of 64 where k is no multiple of 128.
    values = swizzled(128 if plan.k % 128 == 0 else 64, itemsize=1)
    stored = swizzled(sizes.STORE_BYTES, plan.out_dtype.itemsize)
    scratch = dict(
        a_smem=plgpu.SMEM((stages, sizes.M, sizes.K), E4M3, transforms=values),
        b_smem=plgpu.SMEM((stages, n, sizes.K), E4M3, transforms=values),
        a_scale_smem=plgpu.SMEM((stages, sizes.M), jnp.float32),
        b_scale_smem=plgpu.SMEM((stages, n if plan.b_in_rows else BLOCK_SCALES), jnp.float32),
        out_smem=plgpu.SMEM(
            (2, plan.tiles.store_slots, ROWS, width), plan.out_dtype, transforms=stored
        ),
        full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),  # four copies land in a stage
        # Two consumers leave it, in each program whose shared memory b is copied to.
        empty=plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=2, num_barriers=stages
        ),
        scales_read=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    )
    return plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=jax.ShapeDtypeStruct(
            (plan.batch, plan.m, plan.n + -plan.n % width), plan.out_dtype
        ),
        grid=(plan.clusters,),
        grid_names=("cluster",),
        cluster=(plan.tiles.cluster,),
        cluster_names=("member",),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="fp8_gemm",
        scratch_types=scratch,
        cost_estimate=plan.cost,
    )


def _kernel(
    plan, a, a_scale, b, b_scale, out,
    *, a_smem, b_smem, a_scale_smem, b_scale_smem, out_smem, full, empty, scales_read,
):  # fmt: skip
    cluster, member, warpgroup = map(lax.axis_index, ("cluster", "member", "warpgroup"))
    rounds = lax.div(math.prod(plan.grid) - 1 - cluster, plan.clusters) + 1
    steps = rounds * plan.k_steps
    stages, n, width = plan.tiles.stages, plan.tiles.n, plan.store_columns

    def place(turn):
        """Matrix, first row and first column of a tile."""
        per_matrix = plan.grid[1] * plan.grid[2]
        index = cluster + turn * plan.clusters
        i, j = plgpu.planar_snake(lax.rem(index, per_matrix), plan.grid[1:], 0, plan.tiles.band)
        row = i * plan.tiles.cluster_m + member * sizes.M
        return lax.div(index, per_matrix), row, j * n

    def following(stage):
        return lax.select(stage == stages - 1, 0, stage + 1)

    def produce(turn, stage):
        e, row, column = place(turn)
        rows, columns = pl.ds(row, sizes.M), pl.ds(column, n)
        scales = columns if plan.b_in_rows else pl.ds(lax.div(column, BLOCK), BLOCK_SCALES)

        def fill(step, stage):
            @pl.when(turn * plan.k_steps + step >= stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])
                plgpu.barrier_wait(scales_read.at[stage])
                # Scales were read as by any thread, and will be overwritten by TMA.
                plgpu.commit_smem()

            depth, arrived = pl.ds(step * sizes.K, sizes.K), full.at[stage]
            plgpu.copy_gmem_to_smem(a.at[e, rows, depth], a_smem.at[stage], arrived)
            # Each member loads a part of b and sends it to all.
            plgpu.copy_gmem_to_smem(
                b.at[e, columns, depth], b_smem.at[stage], arrived, collective_axes="member"
            )
            plgpu.copy_gmem_to_smem(a_scale.at[e, step, rows], a_scale_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(b_scale.at[e, step, scales], b_scale_smem.at[stage], arrived)
            return following(stage)

        return lax.fori_loop(0, plan.k_steps, fill, stage)

    def consume(turn, stage):
        e, row, column = place(turn)
        rows = pl.ds(warpgroup * ROWS, ROWS)
        promotion = Promotion(
            columns=n,
            rows=rows,
            half=lax.rem(lax.div(column, GROUP), 2),
            is_b_in_rows=plan.b_in_rows,
            a_scale_smem=a_scale_smem,
            b_scale_smem=b_scale_smem,
            empty=empty,
            scales_read=scales_read,
        )

        def step(_, carry):
            stage, sums = carry
            plgpu.barrier_wait(full.at[stage])

            def multiply(part):
                plgpu.wgmma(part, a_smem.at[stage, rows], b_smem.at[stage].transpose((1, 0)))

            sums = promotion.add(sums, stage, multiply)
            return following(stage), sums

        stage, sums = lax.fori_loop(0, plan.k_steps, step, (stage, promotion.zero()))
        pieces = [(i, first) for i in range(len(sums)) for first in range(0, GROUP, width)]
        for number, (i, first) in enumerate(pieces):
            slot = out_smem.at[warpgroup, number % plan.tiles.store_slots]
            plgpu.wait_smem_to_gmem(plan.tiles.store_slots - 1, wait_read_only=True)
            slot[...] = sums[i][:, first : first + width].astype(plan.out_dtype)
            plgpu.commit_smem()
            columns = pl.ds(column + i * GROUP + first, width)
            plgpu.copy_smem_to_gmem(slot, out.at[e, pl.ds(row + warpgroup * ROWS, ROWS), columns])
        return stage

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        stage = lax.fori_loop(0, rounds, produce, jnp.int32(0))

        # A member may end only when no other will arrive at its barriers any more.
        def leave(_, stage):
            plgpu.barrier_wait(empty.at[stage])
            return following(stage)

        oldest = lax.select(steps < stages, 0, stage)
        lax.fori_loop(0, lax.min(steps, stages), leave, oldest)

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        lax.fori_loop(0, rounds, consume, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
