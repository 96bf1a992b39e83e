"""Causal attention on Hopper, backward: a kernel for d_q and one for d_kv, built as the forward's.

    mla_prefill_dq     a tile of 128 queries stays, blocks of 64 keys pass by, in 3 stages
    mla_prefill_dkv    a tile of 128 keys stays, blocks of 32 queries pass by, in 4 stages

      warpgroup 2        TMA of what stays, for each tile; of what passes by, for each step
      24 registers

      warpgroups 0, 1    for each step of dq, [64, 64]: 64 queries of the tile, the block's keys
      240 registers        scores = q k, d_probs = d_out v       12 + 8 HGMMA 64 x 64 x 16
                           P = 2^(scores - lse), dS = P (d_probs - delta)
                           d_q [64, 192] += dS k                 4 HGMMA of 128 columns, 4 of 64
                         for each step of dkv, [64, 32]: 64 keys of the tile, the block's queries
                           scores = k q                          12 HGMMA 64 x 32 x 16
                           P = 2^(scores - lse)
                           d_probs = v d_out                     8 HGMMA 64 x 32 x 16
                           d_v [64, 128] += P d_out              2 x 2 HGMMA of 64 columns
                           dS = P (d_probs - delta)              under that
                           d_k [64, 192] += dS q                 3 x 2 HGMMA of 64 columns

The two warpgroups keep the forward's order, one multiplies while the other takes exponentials, but
wait for each other at the end of a tile. P and dS are rounded to BF16 and stay in registers, as
wgmma's left operand; sums stay in the accumulators. Every sum has one owner and one order, so
gradients are the same bit by bit in each run: no atomics. The price is that scores and d_probs are
computed twice, 18/13 of the products of a kernel that would add d_q up in memory. The rotary key's
gradient leaves in FP32 for each head, and is summed over heads outside.

The sums of dkv are 160 registers of a thread. With blocks of 64 queries ptxas spills, and puts its
wgmma one after the other.

Bound: the tensor core for dq, shared memory for dkv. For a step of one warpgroup, in cycles:

              tensor core                             shared memory              exp2
    dq        640 + 4 x 64 + 4 x 32 = 1,024           832 + 160 of TMA = 992     256
    dkv       12 x 16 + 8 x 16 + 10 x 32 = 640        640 + 81 of TMA = 721      128

Source: FlashAttention-2 (arXiv 2307.08691) §3.1.2 and algorithm 2.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsv3_kernels.mla_prefill import tiles as sizes
from dsv3_kernels.mla_prefill.mosaic_sm90 import (
    CONSUMER_REGISTERS,
    MASKED,
    PRODUCER_REGISTERS,
    STORE_COLUMNS,
    Plan,
    multiply,
    positions,
    spread,
    swizzled,
    unsupported,
)
from dsv3_kernels.mla_prefill.reference import LOG2_E
from dsv3_kernels.mla_prefill.tiles import NOPE_DIM, ROPE_DIM, ROWS, TILE, V_DIM, Tiles

PIECE = 64
"""Columns of what the kernel for d_kv multiplies at once."""
K_PIECES, V_PIECES = (NOPE_DIM + ROPE_DIM) // PIECE, V_DIM // PIECE
NOPE, ROPE, VALUES = pl.ds(0, NOPE_DIM), pl.ds(NOPE_DIM, ROPE_DIM), pl.ds(NOPE_DIM, V_DIM)
"""Columns of q and, the first and the last, of kv."""


def gradients(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
) -> tuple[
    Float[Array, "batch seq heads qk_dim"],
    Float[Array, "batch seq heads kv_dim"],
    Float[Array, "batch seq rope_dim"],
]:
    """As `reference.gradients`. NotImplementedError: see `unsupported`."""
    if reason := unsupported(q, kv, k_rope):
        raise NotImplementedError(f"mla_prefill on Hopper: {reason}")
    operands = q, kv, k_rope, first_keys, lse, d_out, delta, scale
    return gradient_of_queries(*operands), *gradients_of_keys(*operands)


def gradient_of_queries(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
    *,
    tiles: Tiles = sizes.D_Q,
) -> Float[Array, "batch seq heads qk_dim"]:
    """That of q, by the first kernel."""
    plan = Plan.of(q, first_keys, scale, tiles)
    of_rows = plan.filled_up(lse * LOG2_E, delta, first_keys)
    return _d_q(plan)(q, kv, k_rope, d_out, *of_rows)


def gradients_of_keys(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
    *,
    tiles: Tiles = sizes.D_KV,
) -> tuple[Float[Array, "batch seq heads kv_dim"], Float[Array, "batch seq rope_dim"]]:
    """Those of kv and k_rope, by the second kernel."""
    plan = Plan.of(q, first_keys, scale, tiles)
    end_queries = None if first_keys is None else _end_queries(first_keys)
    of_rows = plan.filled_up(lse * LOG2_E, delta, end_queries)
    d_kv, d_k_rope = _d_kv(plan)(q, kv, k_rope, d_out, *of_rows)
    return d_kv, jnp.sum(d_k_rope[:, :, : plan.seq], axis=1).astype(k_rope.dtype)


def _end_queries(first_keys: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """The end of each token's document: the first key of the next."""
    seq = first_keys.shape[1]
    following = jnp.pad(first_keys[:, 1:], [(0, 0), (0, 1)], constant_values=seq)
    ends = jnp.where(following != first_keys, following, seq)
    return lax.cummin(ends, axis=1, reverse=True)


def _scratch(plan: Plan, kept: int, passing: int) -> dict[str, Any]:
    """Buffers and barriers that both kernels have; `kept` and `passing` count copies."""
    stages = plan.tiles.stages
    return dict(
        out_smem=swizzled(2, ROWS, STORE_COLUMNS),
        kept_full=plgpu.Barrier(num_arrivals=kept),
        kept_free=plgpu.Barrier(num_arrivals=2),  # warpgroups
        full=plgpu.Barrier(num_arrivals=passing, num_barriers=stages),
        free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        meeting=plgpu.Barrier(num_arrivals=2),
    )


def _run(plan: Plan, warpgroup, program, produce, consume) -> None:
    """All turns of a program, in each of its warpgroups."""

    def consume_all(number: int):
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        turns = plan.turns.count(program)
        lax.fori_loop(0, turns, functools.partial(consume, number), jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        lax.fori_loop(0, plan.turns.count(program), produce, jnp.int32(0))

    # A copy of the code for each: where a warpgroup's rows are is then no variable, and takes no
    # registers.
    for number in range(2):
        pl.when(warpgroup == number)(functools.partial(consume_all, number))


def _store(values, smem, destination) -> None:
    """`values` [64, columns] to `destination`, 64 columns at a time through `smem`."""
    for first in range(0, values.shape[1], STORE_COLUMNS):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = values[:, first : first + STORE_COLUMNS].astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, destination.at[:, pl.ds(first, STORE_COLUMNS)])


def _d_q(plan: Plan) -> Any:
    """The kernel: (q, kv, k_rope, d_out, log2(e) lse, delta, first_keys if packed) -> d_q."""
    stages, block = plan.tiles.stages, plan.tiles.block
    d_q = jax.ShapeDtypeStruct(
        (plan.batch, plan.seq, plan.heads, NOPE_DIM + ROPE_DIM), jnp.bfloat16
    )
    scratch = _scratch(plan, kept=3, passing=3) | dict(
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
        bytes_accessed=_read_bytes(plan) + 2 * math.prod(d_q.shape),
    )
    return plan.kernel(_d_q_kernel, "mla_prefill_dq", d_q, scratch, cost)


def _d_q_kernel(
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
        _store(nope * plan.scale, mine_out, d_q.at[b, rows, h, NOPE])
        _store(rope * plan.scale, mine_out, d_q.at[b, rows, h, ROPE])
        return step

    _run(plan, warpgroup, program, produce, consume)


def _d_kv(plan: Plan) -> Any:
    """The kernel: (q, kv, k_rope, d_out, log2(e) lse, delta, end_queries if packed) -> d_kv, and
    d_k_rope of each head and of filled up rows, in FP32."""
    stages, block = plan.tiles.stages, plan.tiles.block
    out_type = (
        jax.ShapeDtypeStruct((plan.batch, plan.seq, plan.heads, NOPE_DIM + V_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.filled_seq, ROPE_DIM), jnp.float32),
    )
    # In pieces of 64 columns, one after the other: few addresses to keep in registers.
    pieces = K_PIECES + V_PIECES
    scratch = _scratch(plan, kept=pieces, passing=pieces + 2) | dict(
        kept_smem=swizzled(pieces, TILE, PIECE, width=block),
        passing_smem=swizzled(stages, pieces, block, PIECE, width=block),
        of_queries_smem=plgpu.SMEM((stages, 2, block), jnp.float32),
    )
    cost = plan.cost(
        products=2 * (NOPE_DIM + ROPE_DIM + V_DIM),
        transcendentals=1,
        bytes_accessed=_read_bytes(plan)
        + sum(out.dtype.itemsize * math.prod(out.shape) for out in out_type),
    )
    return plan.kernel(_d_kv_kernel, "mla_prefill_dkv", out_type, scratch, cost)


def _d_kv_kernel(
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
            _store(total, out_smem.at[warpgroup], d_kv.at[b, rows, h, columns])
        return step

    _run(plan, warpgroup, program, produce, consume)


def _read_bytes(plan: Plan) -> int:
    """Of q, kv, k_rope, d_out, lse and delta."""
    return plan.input_bytes + plan.batch * plan.seq * plan.heads * (2 * V_DIM + 2 * 4)
