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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels.cost import flops_in_name
from dsv3_kernels.grouped_gemm import schedule
from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.grouped_gemm.plan import Plan, plan_ragged_k, plan_rows, unsupported
from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.grouped_gemm.tiles import ROWS, Tiles
from dsv3_kernels.quantize.reference import BLOCK

GROUP = 64
"""Columns for which one scale of b in blocks holds, wherever a tile begins."""
BLOCK_SCALES = 32
"""Scales of b in blocks that are copied for a step, of which two are used: TMA writes to multiples
of 128 bytes."""
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""Of a thread. A program starts with 168 for each; more than 3 x 168 in all would wait for ever."""


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
    operands = [_fill_up(x, (8, plan.depth)) for x in (a, b)]
    if scales is not None:
        operands += [_fill_up(jnp.swapaxes(scale, -1, -2), (1, 4)) for scale in scales]
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
    with flops_in_name("fp8" if plan.is_fp8 else "bf16", plan.flops):
        return _kernel_of(plan, out_type, cost)(work, *operands)


def _fill_up(x: Array, multiples: tuple[int, int]) -> Array:
    """`x`, its last two dims filled up with zeros."""
    rows, columns = (-size % of for size, of in zip(x.shape[-2:], multiples, strict=True))
    widths = [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)]
    return jnp.pad(x, widths) if rows or columns else x


def _kernel_of(plan: Plan, out_type: jax.ShapeDtypeStruct, cost: pl.CostEstimate) -> Callable:
    """The kernel: (schedule, a, b, and of FP8 a_scale [k/128, m], b_scale) -> result."""
    stages, n, width = plan.tiles.stages, plan.tiles.n, plan.store_columns

    def operand(lines, is_transposed):
        shape = (plan.depth, lines) if is_transposed else (lines, plan.depth)
        return plgpu.SMEM((stages, *shape), plan.dtype, transforms=_swizzled(plan.dtype))

    slots = (2, plan.store_slots, ROWS, width)
    scratch = dict(
        a_smem=operand(sizes.M, plan.is_a_transposed),
        b_smem=operand(n, plan.is_b_transposed),
        out_smem=plgpu.SMEM(slots, plan.out_dtype, transforms=_swizzled(plan.out_dtype)),
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


def _swizzled(dtype: DTypeLike) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    width = 128 // jnp.dtype(dtype).itemsize
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]


def _kernel(plan, work, a, b, *scales_and_out, **scratch):
    *scales, out = scales_and_out
    cluster, member, warpgroup = map(lax.axis_index, ("cluster", "member", "warpgroup"))
    program = _Program(plan, work, a, b, scales, out, cluster, member, warpgroup, **scratch)

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


@dataclass(frozen=True)
class _Program:
    """A warpgroup of a program, what it can reach, and what it does for a tile."""

    plan: Plan
    work: Any
    a: Any
    b: Any
    scales: list[Any]
    out: Any
    cluster: Any
    member: Any
    warpgroup: Any
    a_smem: Any
    b_smem: Any
    out_smem: Any
    full: Any
    empty: Any
    # What not all have.
    partial_smem: Any = None
    a_scale_smem: Any = None
    b_scale_smem: Any = None
    scales_read: Any = None

    def entries(self):
        return self.work[self.work.shape[0] - 1, 0]

    def rounds(self):
        """Tiles of this program."""
        plan = self.plan
        tiles = self.entries() * plan.column_tiles * (plan.row_tiles if plan.is_k_ragged else 1)
        return lax.div(tiles - 1 - self.cluster + plan.clusters, plan.clusters)

    def place(self, turn):
        """A tile's entry in the schedule, its first row and first column."""
        plan, index = self.plan, self.cluster + turn * self.plan.clusters
        if plan.is_k_ragged:
            shape = plan.row_tiles, plan.column_tiles
            entry = lax.div(index, shape[0] * shape[1])
            index = lax.rem(index, shape[0] * shape[1])
            i, j = plgpu.planar_snake(index, shape, 0, plan.tiles.band)
            row = i * sizes.M
        else:
            shape = self.entries(), plan.column_tiles
            entry, j = plgpu.planar_snake(index, shape, 0, plan.tiles.band)
            row = pl.multiple_of(self.work[entry, schedule.ROW], sizes.M)
        return entry, row, (j * plan.tiles.cluster + self.member) * plan.tiles.n

    def following(self, stage):
        return lax.select(stage == self.plan.tiles.stages - 1, 0, stage + 1)

    def own_rows(self):
        return pl.ds(self.warpgroup * ROWS, ROWS)

    def produce(self, turn, carry):
        """Loads a tile's operands; `carry` is the next stage, and how often one was filled."""
        plan = self.plan
        entry, row, column = self.place(turn)
        first, of_b = 0, [self.b, *self.scales[1:]]
        if plan.is_k_ragged:
            first = pl.multiple_of(self.work[entry, schedule.START], plan.depth)
        else:
            of_b = [ref.at[self.work[entry, schedule.GROUP]] for ref in of_b]
        rows, columns = pl.ds(row, sizes.M), pl.ds(column, plan.tiles.n)

        def fill(step, carry):
            stage, filled = carry

            @pl.when(filled >= plan.tiles.stages)
            def _():
                plgpu.barrier_wait(self.empty.at[stage])
                if plan.is_fp8:
                    plgpu.barrier_wait(self.scales_read.at[stage])
                    # Scales were read as by any thread, and will be overwritten by TMA.
                    plgpu.commit_smem()

            depth, arrived = pl.ds(first + step * plan.depth, plan.depth), self.full.at[stage]
            a_part = self.a.at[(depth, rows) if plan.is_a_transposed else (rows, depth)]
            b_part = of_b[0].at[(depth, columns) if plan.is_b_transposed else (columns, depth)]
            # Each member loads a part of a and sends it to all.
            copy = plgpu.copy_gmem_to_smem
            copy(a_part, self.a_smem.at[stage], arrived, collective_axes="member")
            copy(b_part, self.b_smem.at[stage], arrived)
            if plan.is_fp8:
                block = lax.div(first, BLOCK) + step
                blocks = pl.ds(lax.div(column, BLOCK), BLOCK_SCALES)
                scale_part = of_b[1].at[block, columns if plan.is_b_in_rows else blocks]
                copy(self.scales[0].at[block, rows], self.a_scale_smem.at[stage], arrived)
                copy(scale_part, self.b_scale_smem.at[stage], arrived)
            return self.following(stage), filled + 1

        return lax.fori_loop(0, self.work[entry, schedule.STEPS], fill, carry)

    def leave(self, stage, filled):
        """A member may end only when no other will arrive at its barriers any more."""

        def wait(_, stage):
            plgpu.barrier_wait(self.empty.at[stage])
            return self.following(stage)

        oldest = lax.select(filled < self.plan.tiles.stages, 0, stage)
        lax.fori_loop(0, lax.min(filled, self.plan.tiles.stages), wait, oldest)

    def consume(self, turn, stage):
        """Computes and stores a tile; returns the next stage."""
        plan = self.plan
        entry, row, column = self.place(turn)
        steps = self.work[entry, schedule.STEPS]
        if plan.is_fp8:
            stage, sums = self.accumulate_scaled(steps, stage, column)
        else:
            stage, sums = self.accumulate(steps, stage)
        row += self.warpgroup * ROWS
        if plan.is_k_ragged:
            self.store_whole(sums, self.out.at[entry], row, column)
            return stage
        start, end = (
            jnp.clip(self.work[entry, bound] - row, 0, ROWS)
            for bound in (schedule.START, schedule.END)
        )

        @pl.when(end - start == ROWS)
        def _():
            self.store_whole(sums, self.out, row, column)

        if plan.has_partial_stores:

            @pl.when((end > start) & (end - start < ROWS))
            def _():
                self.store_some(sums, start, end, row, column)

        return stage

    def multiply(self, stage, sums):
        if self.plan.is_a_transposed:
            left = self.a_smem.at[stage, :, self.own_rows()].transpose((1, 0))
        else:
            left = self.a_smem.at[stage, self.own_rows()]
        right = self.b_smem.at[stage]
        plgpu.wgmma(sums, left, right if self.plan.is_b_transposed else right.transpose((1, 0)))

    def accumulate(self, steps, stage):
        """The next stage, and sums in pieces of 64 columns, which the tensor core has added up."""

        def with_sums(sums):
            def step(i, carry):
                stage, before = carry
                plgpu.barrier_wait(self.full.at[stage])
                self.multiply(stage, sums)
                plgpu.wgmma_wait(1)

                @pl.when(i > 0)
                def _():
                    plgpu.barrier_arrive(self.empty.at[before])

                return self.following(stage), stage

            stage_after, last = lax.fori_loop(0, steps, step, (stage, stage))
            plgpu.wgmma_wait(0)

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(self.empty.at[last])

            return stage_after, sums[...]

        columns = self.plan.tiles.n
        stage, sums = pl.run_scoped(with_sums, plgpu.ACC((ROWS, columns), jnp.float32))
        return stage, [sums[:, i : i + GROUP] for i in range(0, columns, GROUP)]

    def accumulate_scaled(self, steps, stage, column):
        """The same, with the sums of each step added here."""
        plan = self.plan
        half = lax.rem(lax.div(column, GROUP), 2)  # a tile of 192 may begin in the midst of a block

        def step(_, carry):
            stage, sums = carry
            plgpu.barrier_wait(self.full.at[stage])

            def with_part(part):
                self.multiply(stage, part)
                layout = plgpu.Layout.WGMMA.reduce(1)
                scale = plgpu.load(self.a_scale_smem.at[stage, self.own_rows()], layout=layout)
                blocks = range(0 if plan.is_b_in_rows else len(sums))
                scales = [scale * self.b_scale_smem[stage, lax.div(half + i, 2)] for i in blocks]
                return scale, scales, part[...]

            accumulator = plgpu.ACC((ROWS, plan.tiles.n), jnp.float32)
            scale, scales, part = pl.run_scoped(with_part, accumulator)
            plgpu.barrier_arrive(self.empty.at[stage])
            if not plan.is_b_in_rows:
                plgpu.barrier_arrive(self.scales_read.at[stage])
            added = []
            for i, total in enumerate(sums):
                piece = part[:, i * GROUP : (i + 1) * GROUP]
                if plan.is_b_in_rows:  # read as late as can be: no registers to keep them
                    layout, columns = plgpu.Layout.WGMMA.reduce(0), pl.ds(i * GROUP, GROUP)
                    column_scale = plgpu.load(self.b_scale_smem.at[stage, columns], layout=layout)
                    piece = piece * lax.broadcast_in_dim(column_scale, piece.shape, (1,))
                row_scale = scale if plan.is_b_in_rows else scales[i]
                added.append(total + piece * lax.broadcast_in_dim(row_scale, piece.shape, (0,)))
            if plan.is_b_in_rows:
                plgpu.barrier_arrive(self.scales_read.at[stage])
            return self.following(stage), tuple(added)

        zero = plgpu.layout_cast(jnp.zeros((ROWS, GROUP), jnp.float32), plgpu.Layout.WGMMA)
        return lax.fori_loop(0, steps, step, (stage, (zero,) * (plan.tiles.n // GROUP)))

    def pieces(self, sums, column) -> Iterator[tuple[int, Any, Any]]:
        """What one store takes: its number, values, and columns of the result."""
        width = self.plan.store_columns
        starts = [(i, first) for i in range(len(sums)) for first in range(0, GROUP, width)]
        for number, (i, first) in enumerate(starts):
            piece = sums[i][:, first : first + width].astype(self.plan.out_dtype)
            yield number, piece, pl.ds(column + i * GROUP + first, width)

    def store_whole(self, sums, result, row, column):
        slots = self.plan.store_slots
        for number, piece, columns in self.pieces(sums, column):
            slot = self.out_smem.at[self.warpgroup, number % slots]
            # Slots begin anew with the tile's first piece.
            plgpu.wait_smem_to_gmem(slots - 1 if number else 0, wait_read_only=True)
            slot[...] = piece
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(slot, result.at[pl.ds(row, ROWS), columns])

    def store_some(self, sums, start, end, row, column):
        """Rows from `start` to `end` of the 64: a copy for each binary digit of their number."""
        slot = self.partial_smem.at[self.warpgroup]
        for _number, piece, columns in self.pieces(sums, column):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            slot[...] = piece
            plgpu.commit_smem()
            begin, height = start, ROWS // 2
            while height:
                has_digit = lax.rem(lax.div(end - start, height), 2) == 1

                @pl.when(has_digit)
                def copy(begin=begin, height=height, columns=columns):
                    target = self.out.at[pl.ds(row + begin, height), columns]
                    plgpu.copy_smem_to_gmem(slot.at[pl.ds(begin, height)], target)

                begin += lax.select(has_digit, height, 0)
                height //= 2
