"""Causal attention on Hopper, forward: warp-specialised, persistent. Backward has its own file.

    grid: 132 programs, each takes tiles of 128 queries of a head, long ones and short ones in turn
    program: 3 warpgroups, a ring of 2 stages in shared memory, one stage a step of 128 keys

      warpgroup 2    for each tile: wait q_free, then TMA of q [128, 192]
      24 registers     for each step: wait k_free[s], v_free[s], then TMA into stage s
                           k_nope [128, 128] and v [128, 128] of the head, k_rope [128, 64] of all
                                        |
                                        v
      warpgroups 0, 1    for each step: wait k_full[s]
      240 registers      scores [64, 128] = 12 x HGMMA 64 x 128 x 16 of q and k
                         arrive at k_free[s]; running max, p = 2^(scores - max), sum
                         wait v_full[s]
                         mixed [64, 128] = 8 x HGMMA 64 x 128 x 16 of p, in registers, and v
                         arrive at v_free[s]; out = out * 2^(old max - max) + mixed
                     for each tile: out / sum -> shared memory -> TMA, and its log-sum-exp

      tensor core    |wg 0: p v, q k|wg 1: p v, q k|wg 0: p v, q k|wg 1: p v, q k|
      FP32, exp2     |wg 1: softmax |wg 0: softmax |wg 1: softmax |wg 0: softmax |

The warpgroups meet twice a step to keep that order. A step is masked only where a query may not see
all of its keys: at the diagonal, and where documents begin. Blocks before the first key of a tile's
first query are skipped. What is past the end arrives as zeros, and is not stored.

Bound: the tensor core. For a step of one warpgroup, in cycles:

    tensor core     12 x 64 + 8 x 64 = 1,280
    exp2            64 x 128 of them, 16 a cycle: 512, under the other warpgroup's products
    shared memory   wgmma reads 73.7 KB for q k and 32.8 KB for p v; TMA writes 81.9 KB for both
                    warpgroups: 1,152 at 128 bytes a cycle
    L2              81.9 KB for both: 1,056 at 38.8 bytes a cycle

Between p v of one step and q k of the next a warpgroup adds `mixed` to `out`, and the tensor core
waits, for about 200 cycles. Adding it later needs 64 more registers, and ptxas spills.

Source: FlashAttention-3 (arXiv 2407.08608) §3.1, the ping-pong of two warpgroups.
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
from jaxtyping import Array, Float, Int

from dsv3_kernels.cost import work_in_name
from dsv3_kernels.mla_prefill import tiles as sizes
from dsv3_kernels.mla_prefill.reference import LOG2_E
from dsv3_kernels.mla_prefill.tiles import NOPE_DIM, ROPE_DIM, ROWS, TILE, V_DIM, Tiles, Turns

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
"""Of a thread. A program starts with 168 for each; more than 3 x 168 in all would wait for ever."""
MASKED = -(2.0**100)
"""Score of an unseen key: finite, so that a row none of whose keys is seen yet has no NaN, and a
power of two, so that its products are exact: such a row's p is 2^0, to be shrunk to nothing later.
"""
STORE_COLUMNS = 64
"""Of the output in one store: 128 bytes, the widest swizzle."""


def attend(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    scale: float,
    *,
    tiles: Tiles = sizes.FORWARD,
) -> tuple[Float[Array, "batch seq heads v_dim"], Float[Array, "batch heads seq"]]:
    """As `reference.attend`. NotImplementedError: see `unsupported`."""
    if reason := unsupported(q, kv, k_rope):
        raise NotImplementedError(f"mla_prefill on Hopper: {reason}")
    plan = Plan.of(q, first_keys, scale, tiles)
    out, lse = _forward(plan)(q, kv, k_rope, *plan.filled_up(first_keys))
    return out, lse[:, :, : plan.seq]


def unsupported(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
) -> str:
    """Why the kernels will not take these (only shapes and dtypes are looked at), or ''."""
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}, expected bfloat16"
    found = (q.shape[-1], kv.shape[-1], k_rope.shape[-1])
    expected = (NOPE_DIM + ROPE_DIM, NOPE_DIM + V_DIM, ROPE_DIM)
    if found != expected:
        return f"qk_dim, kv_dim and rope_dim are {found}, expected {expected}"
    if q.size == 0:
        return f"q is {list(q.shape)}, expected at least one value"
    return ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A problem, and how it is worked on."""

    batch: int
    seq: int
    heads: int
    packed: bool
    scale: float
    tiles: Tiles

    @classmethod
    def of(cls, q: Array, first_keys: Array | None, scale: float, tiles: Tiles) -> "Plan":
        batch, seq, heads, _ = q.shape
        packed = first_keys is not None
        return cls(batch=batch, seq=seq, heads=heads, packed=packed, scale=scale, tiles=tiles)

    @property
    def turns(self) -> Turns:
        tiles = -(-self.seq // TILE)
        pairs = -(-self.batch * self.heads * tiles // 2)
        programs = min(self.tiles.programs, pairs)
        return Turns(batch=self.batch, heads=self.heads, tiles=tiles, programs=programs)

    @property
    def filled_seq(self) -> int:
        """With the rows past the end of the last tile."""
        return self.turns.tiles * TILE

    def filled_up(self, *arrays: Array | None) -> list[Array]:
        """Those that are there with rows past the end: zeros, or the last of `first_keys`."""
        fill = self.filled_seq - self.seq
        return [
            jnp.pad(
                x,
                [(0, 0)] * (x.ndim - 1) + [(0, fill)],
                mode="edge" if x.ndim == 2 else "constant",
            )
            for x in arrays
            if x is not None
        ]

    def cost(self, products: int, transcendentals: int, bytes_accessed: int) -> pl.CostEstimate:
        """Of `products` values a score, for the tiles of scores up to those on the diagonal."""
        scores = self.batch * self.heads * self.seq * (self.seq + TILE) // 2
        return pl.CostEstimate(
            flops=2 * scores * products,
            transcendentals=scores * transcendentals,
            bytes_accessed=bytes_accessed,
        )

    @property
    def input_bytes(self) -> int:
        """Of q, kv and k_rope."""
        row = self.heads * (2 * NOPE_DIM + ROPE_DIM + V_DIM) + ROPE_DIM
        return 2 * self.batch * self.seq * row

    def kernel(self, body: Any, name: str, out_type: Any, scratch: dict, cost: Any) -> Any:
        if not self.tiles.left_in_registers:
            block = self.tiles.block
            scratch["left_smem"] = swizzled(2, ROWS, block, width=min(block, 64))
        kernel = plgpu.kernel(
            functools.partial(body, self),
            out_type=out_type,
            grid=(self.turns.programs,),
            grid_names=("program",),
            num_threads=3,
            thread_name="warpgroup",
            kernel_name=name,
            scratch_types=scratch,
            cost_estimate=cost,
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )

        def counted(*operands):
            with work_in_name("bf16", cost.flops):
                return kernel(*operands)

        return counted


def swizzled(*shape: int, width: int = 64) -> Any:
    """A buffer of BF16 in shared memory as wgmma and TMA want it, in pieces of `width` columns.

    wgmma wants its left operand in pieces of as many columns, in registers too.
    """
    tiling = plgpu.TilingTransform((8, width))  # pyright: ignore[reportAbstractUsage]
    transforms = tiling, plgpu.SwizzleTransform(2 * width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def multiply(accumulator, left, right, left_smem) -> None:
    """wgmma with `left` in registers, or through `left_smem` [64, k] where there is one."""
    if left_smem is None:
        plgpu.wgmma(accumulator, left, right)
    else:
        left_smem[...] = left
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, left_smem, right)


def spread(vector, shape: tuple[int, int], dim: int):
    """A value for each row (dim 0) or column (dim 1) as a matrix."""
    return lax.broadcast_in_dim(vector, shape, (dim,))


def positions(shape: tuple[int, int], dim: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def _forward(plan: Plan) -> Any:
    """The kernel: (q, kv, k_rope, first_keys if packed) -> out, lse of filled up rows."""
    stages, block = plan.tiles.stages, plan.tiles.block
    rows = plan.batch, plan.seq, plan.heads
    out_type = (
        jax.ShapeDtypeStruct((*rows, V_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.filled_seq), jnp.float32),
    )
    scratch: dict[str, Any] = dict(
        q_nope_smem=swizzled(TILE, NOPE_DIM),
        q_rope_smem=swizzled(TILE, ROPE_DIM),
        k_nope_smem=swizzled(stages, block, NOPE_DIM),
        k_rope_smem=swizzled(stages, block, ROPE_DIM),
        v_smem=swizzled(stages, block, V_DIM),
        out_smem=swizzled(2, ROWS, STORE_COLUMNS),
        q_full=plgpu.Barrier(num_arrivals=2),  # copies
        k_full=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_full=plgpu.Barrier(num_barriers=stages),
        q_free=plgpu.Barrier(num_arrivals=2),  # warpgroups
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        meeting=plgpu.Barrier(num_arrivals=2),
    )
    cost = plan.cost(
        products=NOPE_DIM + ROPE_DIM + V_DIM,
        transcendentals=1,
        bytes_accessed=plan.input_bytes + math.prod(rows) * (2 * V_DIM + 4),
    )
    return plan.kernel(_forward_kernel, "mla_prefill", out_type, scratch, cost)


def _forward_kernel(
    plan, q, kv, k_rope, *refs,
    q_nope_smem, q_rope_smem, k_nope_smem, k_rope_smem, v_smem, out_smem,
    q_full, k_full, v_full, q_free, k_free, v_free, meeting, left_smem=None,
):  # fmt: skip
    first_keys: Any = refs[0] if plan.packed else None
    out, lse = refs[-2:]
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

        pl.when(turn > 0)(lambda: plgpu.barrier_wait(q_free))
        plgpu.copy_gmem_to_smem(q.at[b, queries, h, pl.ds(0, NOPE_DIM)], q_nope_smem, q_full)
        rope = pl.ds(NOPE_DIM, ROPE_DIM)
        plgpu.copy_gmem_to_smem(q.at[b, queries, h, rope], q_rope_smem, q_full)

        def fill(j, step):
            stage, keys = lax.rem(step, stages), pl.ds(j * block, block)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(k_free.at[stage]))
            nope, arrived = pl.ds(0, NOPE_DIM), k_full.at[stage]
            plgpu.copy_gmem_to_smem(kv.at[b, keys, h, nope], k_nope_smem.at[stage], arrived)
            plgpu.copy_gmem_to_smem(k_rope.at[b, keys], k_rope_smem.at[stage], arrived)
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(v_free.at[stage]))
            values = kv.at[b, keys, h, pl.ds(NOPE_DIM, V_DIM)]
            plgpu.copy_gmem_to_smem(values, v_smem.at[stage], v_full.at[stage])
            return step + 1

        return lax.fori_loop(*key_blocks(b, tile), fill, step)

    def consume(turn, step):
        b, h, tile = turns.place(program, turn)
        mine = pl.ds(warpgroup * ROWS, ROWS)
        first_row = tile * TILE + warpgroup * ROWS
        first_block, end = key_blocks(b, tile)
        left = None if left_smem is None else left_smem.at[warpgroup]
        rows = pl.ds(first_row, ROWS)
        of_rows = plgpu.Layout.WGMMA.reduce(1)
        if plan.packed:
            latest_first = first_keys[b, first_row + ROWS - 1]
        plgpu.barrier_wait(q_full)

        def hide_unseen(j, scores):
            seen = positions(shape, 1) + j * block <= positions(shape, 0) + first_row
            if plan.packed:  # read here: there are no registers to keep them
                firsts = plgpu.load(first_keys.at[b, rows], layout=of_rows, optimized=False)
                seen = seen & (positions(shape, 1) + j * block >= spread(firsts, shape, 0))
            return jnp.where(seen, scores, MASKED)

        def attend_block(j, carry):
            step, total, largest, mixed = carry
            stage = lax.rem(step, stages)
            plgpu.barrier_wait(k_full.at[stage])

            def score(accumulator):
                k = k_nope_smem.at[stage].transpose((1, 0))
                plgpu.wgmma(accumulator, q_nope_smem.at[mine], k)
                k = k_rope_smem.at[stage].transpose((1, 0))
                plgpu.wgmma(accumulator, q_rope_smem.at[mine], k)
                plgpu.barrier_arrive_and_wait(meeting)
                return accumulator[...]

            scores = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
            plgpu.barrier_arrive(k_free.at[stage])
            pl.when(j == end - 1)(lambda: plgpu.barrier_arrive(q_free))
            some_unseen = (j + 1) * block > first_row + 1
            if plan.packed:
                some_unseen |= j * block < latest_first
            scores = lax.cond(
                some_unseen, functools.partial(hide_unseen, j), lambda scores: scores, scores
            )
            factor = plan.scale * LOG2_E
            raised = jnp.maximum(largest, jnp.round(jnp.max(scores, axis=1) * factor))
            p = jnp.exp2(scores * factor - spread(raised, shape, 0))
            shrink = jnp.exp2(largest - raised)
            total = total * shrink + jnp.sum(p, axis=1)
            p = p.astype(jnp.bfloat16)
            plgpu.barrier_arrive_and_wait(meeting)
            plgpu.barrier_wait(v_full.at[stage])

            def mix(accumulator):
                multiply(accumulator, p, v_smem.at[stage], left)
                return accumulator[...]

            added = pl.run_scoped(mix, plgpu.ACC((ROWS, V_DIM), jnp.float32))
            plgpu.barrier_arrive(v_free.at[stage])
            mixed = mixed * spread(shrink, mixed.shape, 0) + added
            return step + 1, total, raised, mixed

        def constant(value, shape, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        start = (
            step,
            constant(0, (ROWS,), of_rows),
            constant(-jnp.inf, (ROWS,), of_rows),
            constant(0, (ROWS, V_DIM), plgpu.Layout.WGMMA),
        )
        step, total, largest, mixed = lax.fori_loop(first_block, end, attend_block, start)
        mixed = mixed * spread(1 / total, mixed.shape, 0)
        lse[b, h, rows] = (largest + jnp.log2(total)) * (1 / LOG2_E)
        for first in range(0, V_DIM, STORE_COLUMNS):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            piece = mixed[:, first : first + STORE_COLUMNS].astype(jnp.bfloat16)
            out_smem[warpgroup] = piece
            plgpu.commit_smem()
            columns = pl.ds(first, STORE_COLUMNS)
            plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out.at[b, rows, h, columns])
        return step

    @pl.when(warpgroup == 2)
    def _():
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        lax.fori_loop(0, turns.count(program), produce, jnp.int32(0))

    @pl.when(warpgroup < 2)
    def _():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        # One meeting apart: warpgroup 1 multiplies while 0 takes exponentials.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive_and_wait(meeting))
        lax.fori_loop(0, turns.count(program), consume, jnp.int32(0))
        pl.when(warpgroup == 0)(lambda: plgpu.barrier_arrive_and_wait(meeting))
        plgpu.wait_smem_to_gmem(0)
