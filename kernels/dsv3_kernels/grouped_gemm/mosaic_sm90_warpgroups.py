"""What the warpgroups of `grouped_gemm` on Hopper do for a tile: drawn in mosaic_sm90.py."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.fp8_gemm.mosaic_sm90_promotion import BLOCK_SCALES, GROUP, ROWS, Promotion
from dsv3_kernels.grouped_gemm import schedule
from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.grouped_gemm.plan import Plan
from dsv3_kernels.quantize.reference import BLOCK


@dataclass(frozen=True)
class Program:
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
        promotion = Promotion(
            columns=self.plan.tiles.n,
            rows=self.own_rows(),
            half=lax.rem(lax.div(column, GROUP), 2),
            is_b_in_rows=self.plan.is_b_in_rows,
            a_scale_smem=self.a_scale_smem,
            b_scale_smem=self.b_scale_smem,
            empty=self.empty,
            scales_read=self.scales_read,
        )

        def step(_, carry):
            stage, sums = carry
            plgpu.barrier_wait(self.full.at[stage])
            sums = promotion.add(sums, stage, functools.partial(self.multiply, stage))
            return self.following(stage), sums

        return lax.fori_loop(0, steps, step, (stage, promotion.zero()))

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
