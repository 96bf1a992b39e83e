"""Causal attention's gradient of queries on Hopper: drawn in mosaic_sm90_backward.py."""

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

NOPE, ROPE, VALUES = pl.ds(0, NOPE_DIM), pl.ds(NOPE_DIM, ROPE_DIM), pl.ds(NOPE_DIM, V_DIM)
"""Columns of q and, the first and the last, of kv."""


def d_q_kernel(plan: Plan) -> Any:
    """The kernel: (q, kv, k_rope, d_out, log2(e) lse, delta, first_keys if packed) -> d_q."""
    stages, block = plan.tiles.stages, plan.tiles.block
    d_q = jax.ShapeDtypeStruct(
        (plan.batch, plan.seq, plan.heads, NOPE_DIM + ROPE_DIM), jnp.bfloat16
    )
    scratch = scratch_of(plan, kept=3, passing=3) | dict(
        q_nope_smem=swizzled(TILE, NOPE_DIM),
        q_rope_smem=swizzled(TILE, ROPE_DIM),
        d_out_smem=swizzled(TILE, V_DIM),
        k_nope_smem=swizzled(stages, block, NOPE_DIM),
        k_rope_smem=swizzled(stages, block, ROPE_DIM),
        v_smem=swizzled(stages, block, V_DIM),
    )
    cost = plan.cost(
        products=2 * (NOPE_DIM + ROPE_DIM) + V_DIM,
        transcendentals=1,
        bytes_accessed=read_bytes(plan) + 2 * math.prod(d_q.shape),
    )
    return plan.kernel(_kernel, "mla_prefill_dq", d_q, scratch, cost)


def _kernel(
    plan, q, kv, k_rope, d_out, lse, delta, *refs,
    q_nope_smem, q_rope_smem, d_out_smem, k_nope_smem, k_rope_smem, v_smem, out_smem,
    kept_full, kept_free, full, free, meeting, left_smem=None,
):  # fmt: skip
    first_keys: Any = refs[0] if plan.packed else None
    d_q = refs[-1]
    program, warpgroup = map(lax.axis_index, ("program", "warpgroup"))
    turns, stages, block = plan.turns, plan.tiles.stages, plan.tiles.block
    shape = (ROWS, block)

    def key_blocks(b, tile):
        """Those that a tile's queries may see."""
        first = lax.div(first_keys[b, tile * TILE], block) if plan.packed else 0
        return first, lax.div(tile * TILE + TILE - 1, block) + 1

    def produce(turn, step):
        b, h, tile = turns.place(program, turn)
        queries = pl.ds(tile * TILE, TILE)
        pl.when(turn > 0)(lambda: plgpu.barrier_wait(kept_free))
        plgpu.copy_gmem_to_smem(q.at[b, queries, h, NOPE], q_nope_smem, kept_full)
        plgpu.copy_gmem_to_smem(q.at[b, queries, h, ROPE], q_rope_smem, kept_full)
        plgpu.copy_gmem_to_smem(d_out.at[b, queries, h], d_out_smem, kept_full)

        def fill(j, step):
            stage, keys = lax.rem(step, stages), pl.ds(j * block, block)
            arrived = full.at[stage]
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[stage]))
            plgpu.copy_gmem_to_smem(kv.at[b, keys, h, NOPE], k_nope_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(k_rope.at[b, keys], k_rope_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(kv.at[b, keys, h, VALUES], v_smem.at[stage], arrived)
            return step + 1

        return lax.fori_loop(*key_blocks(b, tile), fill, step)

    def consume(warpgroup, turn, step):
        b, h, tile = turns.place(program, turn)
        mine = pl.ds(warpgroup * ROWS, ROWS)
        first_row = tile * TILE + warpgroup * ROWS
        rows = pl.ds(first_row, ROWS)
        first_block, end = key_blocks(b, tile)
        left = None if left_smem is None else left_smem.at[warpgroup]
        of_rows = functools.partial(
            plgpu.load, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
        )
        lse_of_rows, delta_of_rows = of_rows(lse.at[b, h, rows]), of_rows(delta.at[b, h, rows])
        if plan.packed:
            latest_first = first_keys[b, first_row + ROWS - 1]
        plgpu.barrier_wait(kept_full)

        def hide_unseen(j, scores):
            seen = positions(shape, 1) + j * block <= positions(shape, 0) + first_row
            if plan.packed:
                firsts = of_rows(first_keys.at[b, rows])
                seen = seen & (positions(shape, 1) + j * block >= spread(firsts, shape, 0))
            return jnp.where(seen, scores, MASKED)

        def accumulate(d_q_nope, d_q_rope):
            def add_block(j, step):
                stage = lax.rem(step, stages)
                plgpu.barrier_wait(full.at[stage])

                def score(scores, d_probs):
                    k = k_nope_smem.at[stage].transpose((1, 0))
                    plgpu.wgmma(scores, q_nope_smem.at[mine], k)
                    k = k_rope_smem.at[stage].transpose((1, 0))
                    plgpu.wgmma(scores, q_rope_smem.at[mine], k)
                    v = v_smem.at[stage].transpose((1, 0))
                    plgpu.wgmma(d_probs, d_out_smem.at[mine], v)
                    plgpu.barrier_arrive_and_wait(meeting)
                    return scores[...], d_probs[...]

                accumulator = plgpu.ACC(shape, jnp.float32)
                scores, d_probs = pl.run_scoped(score, accumulator, accumulator)
                pl.when(j == end - 1)(lambda: plgpu.barrier_arrive(kept_free))
                some_unseen = (j + 1) * block > first_row + 1
                if plan.packed:
                    some_unseen |= j * block < latest_first
                scores = lax.cond(
                    some_unseen, functools.partial(hide_unseen, j), lambda scores: scores, scores
                )
                factor = plan.scale * LOG2_E
                probs = jnp.exp2(scores * factor - spread(lse_of_rows, shape, 0))
                probs = probs.astype(jnp.bfloat16).astype(jnp.float32)
                d_scores = probs * (d_probs - spread(delta_of_rows, shape, 0))
                d_scores = d_scores.astype(jnp.bfloat16)
                plgpu.barrier_arrive_and_wait(meeting)
                multiply(d_q_nope, d_scores, k_nope_smem.at[stage], left)
                multiply(d_q_rope, d_scores, k_rope_smem.at[stage], left)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[stage])
                return step + 1

            if warpgroup == 1:
                plgpu.barrier_arrive_and_wait(meeting)
            next_step = lax.fori_loop(first_block, end, add_block, step)
            if warpgroup == 0:
                plgpu.barrier_arrive_and_wait(meeting)
            return next_step, d_q_nope[...], d_q_rope[...]

        step, nope, rope = pl.run_scoped(
            accumulate,
            plgpu.ACC((ROWS, NOPE_DIM), jnp.float32),
            plgpu.ACC((ROWS, ROPE_DIM), jnp.float32),
        )
        mine_out = out_smem.at[warpgroup]
        store(nope * plan.scale, mine_out, d_q.at[b, rows, h, NOPE])
        store(rope * plan.scale, mine_out, d_q.at[b, rows, h, ROPE])
        return step

    run(plan, warpgroup, program, produce, consume)
