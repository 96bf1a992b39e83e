"""Causal attention's gradients of keys and values on Hopper: drawn in mosaic_sm90_backward.py."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.mla_prefill.mosaic_sm90 import MASKED, Plan, multiply, positions, spread, swizzled
from dsv3_kernels.mla_prefill.mosaic_sm90_warpgroups import read_bytes, run, scratch_of, store
from dsv3_kernels.mla_prefill.reference import LOG2_E
from dsv3_kernels.mla_prefill.tiles import NOPE_DIM, ROPE_DIM, ROWS, TILE, V_DIM

PIECE = 64
"""Columns of what the kernel for d_kv multiplies at once."""
K_PIECES, V_PIECES = (NOPE_DIM + ROPE_DIM) // PIECE, V_DIM // PIECE


def d_kv_kernel(plan: Plan) -> Any:
    """The kernel: (q, kv, k_rope, d_out, log2(e) lse, delta, end_queries if packed) -> d_kv, and
    d_k_rope of each head and of filled up rows, in FP32."""
    stages, block = plan.tiles.stages, plan.tiles.block
    out_type = (
        jax.ShapeDtypeStruct((plan.batch, plan.seq, plan.heads, NOPE_DIM + V_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.filled_seq, ROPE_DIM), jnp.float32),
    )
    # In pieces of 64 columns, one after the other: few addresses to keep in registers.
    pieces = K_PIECES + V_PIECES
    scratch = scratch_of(plan, kept=pieces, passing=pieces + 2) | dict(
        kept_smem=swizzled(pieces, TILE, PIECE, width=block),
        passing_smem=swizzled(stages, pieces, block, PIECE, width=block),
        of_queries_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
    )
    cost = plan.cost(
        products=2 * (NOPE_DIM + ROPE_DIM + V_DIM),
        transcendentals=1,
        bytes_accessed=read_bytes(plan)
        + sum(out.dtype.itemsize * math.prod(out.shape) for out in out_type),
    )
    return plan.kernel(_kernel, "mla_prefill_dkv", out_type, scratch, cost)


def _kernel(
    plan, q, kv, k_rope, d_out, lse, delta, *refs,
    kept_smem, passing_smem, of_queries_smem, out_smem,
    kept_full, kept_free, full, free, meeting, left_smem=None,
):  # fmt: skip
    end_queries: Any = refs[0] if plan.packed else None
    d_kv, d_k_rope = refs[-2:]
    program, warpgroup = map(lax.axis_index, ("program", "warpgroup"))
    turns, stages, block = plan.turns, plan.tiles.stages, plan.tiles.block
    shape = (ROWS, block)

    def pieces(columns: int, start: int = 0):
        return [pl.ds(start + first, PIECE) for first in range(0, columns, PIECE)]

    def query_blocks(b, tile):
        """Those that may see a tile's keys."""
        last_key = tile * TILE + TILE - 1
        end = end_queries[b, last_key] if plan.packed else plan.seq
        return lax.div(tile * TILE, block), lax.div(end - 1, block) + 1

    def produce(turn, step):
        b, h, tile = turns.place(program, turn)
        keys = pl.ds(tile * TILE, TILE)
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(kept_free))
        sources = [
            *(kv.at[b, keys, h, columns] for columns in pieces(NOPE_DIM)),
            k_rope.at[b, keys],
            *(kv.at[b, keys, h, columns] for columns in pieces(V_DIM, start=NOPE_DIM)),
        ]
        for i, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source, kept_smem.at[i], kept_full)

        def fill(i, step):
            stage, queries = lax.rem(step, stages), pl.ds(i * block, block)
            arrived = full.at[stage]

            @pl.when(step >= stages)
            def _():
                plgpu.barrier_wait(free.at[stage])
                # lse and delta were read as by any thread, and will be overwritten by TMA.
                plgpu.commit_smem()

            sources = [
                *(q.at[b, queries, h, columns] for columns in pieces(NOPE_DIM + ROPE_DIM)),
                *(d_out.at[b, queries, h, columns] for columns in pieces(V_DIM)),
            ]
            for n, source in enumerate(sources):
                plgpu.copy_gmem_to_smem(source, passing_smem.at[stage, n], arrived)
            for n, source in enumerate((lse, delta)):
                into = of_queries_smem.at[stage, n]
                plgpu.copy_gmem_to_smem(source.at[b, h, queries], into, arrived)
            return step + 1

        return lax.fori_loop(*query_blocks(b, tile), fill, step)

    def consume(warpgroup, turn, step):
        b, h, tile = turns.place(program, turn)
        mine = pl.ds(warpgroup * ROWS, ROWS)
        first_row = tile * TILE + warpgroup * ROWS
        rows = pl.ds(first_row, ROWS)
        first_block, end = query_blocks(b, tile)
        left = None if left_smem is None else left_smem.at[warpgroup]
        of_columns = functools.partial(plgpu.load, layout=plgpu.Layout.WGMMA.reduce(0))
        if plan.packed:
            layout = plgpu.Layout.WGMMA.reduce(1)
            ends = plgpu.load(end_queries.at[b, rows], layout=layout, optimized=False)
        plgpu.barrier_wait(kept_full)

        def hide_unseen(i, scores):
            seen = positions(shape, 0) + first_row <= positions(shape, 1) + i * block
            if plan.packed:
                seen = seen & (positions(shape, 1) + i * block < spread(ends, shape, 0))
            return jnp.where(seen, scores, MASKED)

        def accumulate(*sums):
            def add_block(i, step):
                stage = lax.rem(step, stages)
                passing = [passing_smem.at[stage, n] for n in range(len(sums))]
                plgpu.barrier_wait(full.at[stage])

                def multiply_kept(accumulator, pieces):
                    for n in pieces:
                        right = passing[n].transpose((1, 0))
                        plgpu.wgmma(accumulator, kept_smem.at[n, mine], right)

                def score(scores):
                    multiply_kept(scores, range(K_PIECES))
                    plgpu.barrier_arrive_and_wait(meeting)
                    return scores[...]

                accumulator = plgpu.ACC(shape, jnp.float32)
                scores = pl.run_scoped(score, accumulator)
                # The last step's d_k is there too.
                pl.when(step > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                if plan.packed:  # where to hide what would take a register more
                    scores = hide_unseen(i, scores)
                else:
                    hide = functools.partial(hide_unseen, i)
                    some_unseen = i * block < first_row + ROWS - 1
                    scores = lax.cond(some_unseen, hide, lambda scores: scores, scores)
                factor = plan.scale * LOG2_E
                lse_of_columns = spread(of_columns(of_queries_smem.at[stage, 0]), shape, 1)
                probs = jnp.exp2(scores * factor - lse_of_columns).astype(jnp.bfloat16)
                plgpu.barrier_arrive_and_wait(meeting)

                def add_values(d_probs):
                    multiply_kept(d_probs, range(K_PIECES, len(sums)))
                    for d_v, d_out in zip(sums[K_PIECES:], passing[K_PIECES:], strict=True):
                        multiply(d_v, probs, d_out, left)
                    # d_v may go on.
                    return plgpu.wgmma_accumulator_load(d_probs, wait_n=V_PIECES)

                d_probs = pl.run_scoped(add_values, accumulator)
                delta_of_columns = spread(of_columns(of_queries_smem.at[stage, 1]), shape, 1)
                d_scores = probs.astype(jnp.float32) * (d_probs - delta_of_columns)
                d_scores = d_scores.astype(jnp.bfloat16)
                for d_k, q in zip(sums[:K_PIECES], passing[:K_PIECES], strict=True):
                    multiply(d_k, d_scores, q, left)
                return step + 1

            # What stays is needed to the end, and free only when both are there: no warpgroup may
            # wait in a tile for one that is in the next.
            if warpgroup == 1:
                plgpu.barrier_arrive_and_wait(meeting)
            next_step = lax.fori_loop(first_block, end, add_block, step)
            if warpgroup == 0:
                plgpu.barrier_arrive_and_wait(meeting)
            return next_step, *(total[...] for total in sums)

        accumulators = [plgpu.ACC((ROWS, PIECE), jnp.float32)] * (K_PIECES + V_PIECES)
        step, *sums = pl.run_scoped(accumulate, *accumulators)
        plgpu.barrier_arrive(kept_free)
        nope, rope, values = sums[: K_PIECES - 1], sums[K_PIECES - 1], sums[K_PIECES:]
        # Once more, rather than in registers all the while.
        b, h, tile = turns.place(program, lax.optimization_barrier(turn))
        rows = pl.ds(tile * TILE + warpgroup * ROWS, ROWS)
        d_k_rope[b, h, rows] = rope * plan.scale
        stored = [d_k * plan.scale for d_k in nope] + values
        for total, columns in zip(stored, pieces(NOPE_DIM + V_DIM), strict=True):
            store(total, out_smem.at[warpgroup], d_kv.at[b, rows, h, columns])
        return step

    run(plan, warpgroup, program, produce, consume)
