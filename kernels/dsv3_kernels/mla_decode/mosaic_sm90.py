"""Attention of decoding on Hopper: warp-specialised, persistent, split over keys.

    grid: tiles of 64 rows (queries x heads) x parts of all requests' keys, at most 132 programs
    program: 3 warpgroups; 2 stages in shared memory, each a page: 64 keys [64, 576] in BF16

      warpgroup 2        for each request of the part: wait q_free, then TMA of q [64, 576]
      24 registers         for each page: its number from the table, wait k_free[s], then TMA into
      (FP8: 120)               stage s; FP8 comes through registers, see mosaic_sm90_loads
                                        |
                                        v
      warpgroup 0        for each page: wait k_full[s]
      240 registers          scores [64, 64] = 36 x HGMMA 64 x 64 x 16 of q and k
      (FP8: 192)             wait p_free; running max -> shared memory, arrive at largest_full
                             p = 2^(scores - max) -> shared memory, arrive at p_full
                             out[:, :256] = out * 2^(old max - max) + 4 x HGMMA 64 x 256 x 16 of p,
                                 in registers, and the page's first 256 columns
                             arrive at k_free[s]
                         for each request: out, max and sum of p -> memory, in FP32
      warpgroup 1        for each page: wait k_full[s], largest_full: out * 2^(old max - max)
      240 registers          wait p_full, p -> registers, arrive at p_free
      (FP8: 192)             out[:, 256:] += 4 x HGMMA 64 x 256 x 16 of p and the other columns
                             arrive at k_free[s]
                         for each request: out -> memory, in FP32

      tensor core    | q k (0)            |        | p v (0), p v (1) | q k (0)            |
      FP32, exp2     |                    | (0)    |                  |                    |

A page is key and value: it is read from memory once, and by tiles of rows of the same keys, which
run at once, from L2. The output takes 128 registers of each thread of two warpgroups. A page's rows
behind a request's last token are zeroed, for p is 0 there but they may be NaN. Which parts of which
requests a program has, it reads from a schedule made on the device (schedule.py); the parts of a
request are put together by a second kernel (mosaic_sm90_combine.py).

Bound: memory for up to 64 rows; for 128 in BF16 memory and the tensor core with its waits, near one
another; else the latter. For a page and a tile of rows, in cycles:

    memory          73.7 KB (FP8: 42.0 KB) at 14.5 bytes a cycle: 5,085 (2,895), which tiles of
                    rows share: for 128 rows 2,542 (1,448)
    tensor core     36 x 32 + 2 x 4 x 128 = 2,176, and about 600 while it waits for softmax: 2,776
    exp2            64 x 64 of them, 16 a cycle: 256, in those 600
    shared memory   wgmma reads 147.5 KB for q k and 65.5 KB for p v, TMA writes 73.7 KB: 2,240 at
                    128 bytes a cycle
    L2              73.7 KB: 1,900 at 38.8 bytes a cycle

There is room for q and two pages, so the next scores cannot be computed ahead: k would have to stay
while the page after it is loaded.

Source: Flash-Decoding for the split over keys; FlashMLA for the two halves of the output, and the
schedule.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8

from dsv3_kernels.cost import work_in_name
from dsv3_kernels.mla_decode import mosaic_sm90_loads as loads
from dsv3_kernels.mla_decode import schedule
from dsv3_kernels.mla_decode import tiles as sizes
from dsv3_kernels.mla_decode.mosaic_sm90_combine import combine
from dsv3_kernels.mla_decode.reference import LOG2_E, packed_bytes
from dsv3_kernels.mla_decode.schedule import Schedule
from dsv3_kernels.mla_decode.tiles import BLOCK, LOWEST, QK_DIM, ROWS, STAGES, V_DIM, Tiles

HALF = V_DIM // 2
"""Columns of the output of a warpgroup."""


def attend(
    q: Float[Array, "batch queries heads qk_dim"],
    pages: Float[Array, "pages page_size qk_dim"] | UInt8[Array, "pages page_size row_bytes"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = V_DIM,
    splits: int | None = None,
    tiles: Tiles | None = None,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """As `reference.attend`. NotImplementedError: see `unsupported`."""
    if reason := unsupported(q, pages, page_table, v_dim):
        raise NotImplementedError(f"mla_decode on Hopper: {reason}")
    batch, queries, heads, _ = q.shape
    is_packed = pages.dtype == jnp.uint8
    plan = Plan(
        batch=batch,
        queries=queries,
        heads=heads,
        max_pages=page_table.shape[1],
        is_packed=is_packed,
        scale=scale,
        splits=splits,
        tiles=tiles or (sizes.FP8 if is_packed else sizes.BF16),
    )
    page_table, lengths = page_table.astype(jnp.int32), lengths.astype(jnp.int32)
    cuts = schedule.make(lengths, plan.parts)
    of_requests = q.reshape(batch, plan.rows, QK_DIM), page_table, lengths
    parts, stats = _attend(plan)(*of_requests, *cuts, *loads.views_of(pages))
    out, lse = combine(parts, stats, cuts, plan.rows)
    return out.reshape(*q.shape[:3], V_DIM), lse.reshape(q.shape[:3])


def unsupported(
    q: Float[Array, "batch queries heads qk_dim"],
    pages: Float[Array, "pages page_size qk_dim"] | UInt8[Array, "pages page_size row_bytes"],
    page_table: Int[Array, "batch max_pages"],
    v_dim: int,
) -> str:
    """Why the kernels will not take these (only shapes and dtypes are looked at), or ''."""
    if q.dtype != jnp.bfloat16:
        return f"q is {q.dtype}, expected bfloat16"
    if pages.dtype not in (jnp.bfloat16, jnp.uint8):
        return f"pages is {pages.dtype}, expected bfloat16 or uint8"
    if (found := (q.shape[-1], v_dim)) != (QK_DIM, V_DIM):
        return f"qk_dim and v_dim are {found}, expected {(QK_DIM, V_DIM)}"
    if pages.shape[1] != BLOCK:
        return f"page_size is {pages.shape[1]}, expected {BLOCK}"
    for name, array in (("q", q), ("pages", pages), ("page_table", page_table)):
        if array.size == 0:
            return f"{name} is {list(array.shape)}, expected at least one value"
    return ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A problem, and how it is worked on."""

    batch: int
    queries: int
    heads: int
    max_pages: int
    is_packed: bool
    scale: float
    splits: int | None
    tiles: Tiles

    @property
    def rows(self) -> int:
        """Of a request: its queries' heads."""
        return self.queries * self.heads

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def parts(self) -> int:
        """Of all keys. A program works on one of them, for a tile of rows."""
        return self.splits or sizes.parts_at_once(self.row_tiles, self.tiles.programs)

    @property
    def flops(self) -> int:
        """Of all that the tables have room for: how much of it is used, only the device knows."""
        return 2 * self.batch * self.rows * self.max_pages * BLOCK * (QK_DIM + V_DIM)

    @property
    def read_bytes(self) -> int:
        """Queries, and as many cached tokens: not all pages that there are."""
        row = packed_bytes(QK_DIM, V_DIM) if self.is_packed else 2 * QK_DIM
        return self.batch * (2 * self.rows * QK_DIM + self.max_pages * BLOCK * row)


def swizzled(*shape: int) -> Any:
    """A buffer of BF16 in shared memory as wgmma and TMA want it, in pieces of 64 columns."""
    tiling = plgpu.TilingTransform((8, 64))  # pyright: ignore[reportAbstractUsage]
    transforms = tiling, plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=transforms)


def spread(vector, shape: tuple[int, int]):
    """A value for each row as a matrix."""
    return lax.broadcast_in_dim(vector, shape, (0,))


def positions(shape: tuple[int, int], dim: int):
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def constant(value: int | float, shape: tuple[int, ...], layout: Any):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _attend(plan: Plan) -> Any:
    """The kernel: (q, page_table, lengths, the schedule's, the pages') -> parts, their m and l."""
    slots, filled_rows = plan.parts + plan.batch - 1, plan.row_tiles * ROWS
    out_type = (
        jax.ShapeDtypeStruct((slots, filled_rows, V_DIM), jnp.float32),
        jax.ShapeDtypeStruct((slots, 2, filled_rows), jnp.float32),
    )
    scratch: dict[str, Any] = dict(
        q_smem=swizzled(1, ROWS, QK_DIM),
        k_smem=swizzled(STAGES, BLOCK, QK_DIM),
        p_smem=swizzled(ROWS, BLOCK),
        largest_smem=plgpu.SMEM((ROWS,), jnp.float32),
        q_full=plgpu.Barrier(),
        q_free=plgpu.Barrier(),
        k_full=plgpu.Barrier(num_barriers=STAGES),
        k_free=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),  # warpgroups
        largest_full=plgpu.Barrier(),
        p_full=plgpu.Barrier(),
        p_free=plgpu.Barrier(),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=out_type,
        grid=(plan.row_tiles, plan.parts),
        grid_names=("row_tile", "part"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name="mla_decode",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,  # rows lie within warps
            # Threads write what other warpgroups read, or they alone: barriers of ours are enough.
            unsafe_no_auto_barriers=True,
        ),
    )

    def counted(*operands):
        with work_in_name("bf16", plan.flops, plan.read_bytes):
            return kernel(*operands)

    return counted


def _kernel(
    plan, q, page_table, lengths, origins, ends, requests, size, *refs,
    q_smem, k_smem, p_smem, largest_smem,
    q_full, q_free, k_full, k_free, largest_full, p_full, p_free,
):  # fmt: skip
    *pages, parts, stats = refs
    row_tile, part, warpgroup = map(lax.axis_index, ("row_tile", "part", "warpgroup"))
    in_place, queries = plan.tiles.in_place, plan.queries
    rows = pl.ds(row_tile * ROWS, ROWS)
    shape, of_rows = (ROWS, BLOCK), plgpu.Layout.WGMMA.reduce(1)
    no_output = constant(0, (ROWS, HALF), plgpu.Layout.WGMMA)
    turns = schedule.Turns(part, lengths, Schedule(origins, ends, requests, size))
    make_load = loads.fp8 if plan.is_packed else loads.bf16
    load = make_load(pages, page_table, k_smem, k_full, k_free)

    def produce(b, first, end, step):
        pl.when(step > 0)(lambda: plgpu.barrier_wait(q_free))
        plgpu.copy_gmem_to_smem(q.at[b, rows], q_smem.at[0], q_full)
        return load(b, first, end, step)

    def mix(p, shrunk, stage, columns, cached):
        """`shrunk` plus p v, for a warpgroup's columns of v."""
        values = k_smem.at[stage, :, columns]

        @pl.when(cached < BLOCK)
        def _():  # what a page holds behind the last token may be NaN
            for first in range(0, HALF, 64):
                piece = values.at[:, pl.ds(first, 64)]
                seen = positions((BLOCK, 64), 0) < cached
                piece[...] = jnp.where(seen, piece[...], jnp.bfloat16(0))
            plgpu.commit_smem()

        def multiply(accumulator):
            plgpu.wgmma(accumulator, p, values)
            return None if in_place else accumulator[...]

        if in_place:
            mixed = pl.run_state(multiply)(plgpu.ACC.init(shrunk))
        else:
            mixed = shrunk + pl.run_scoped(multiply, plgpu.ACC((ROWS, HALF), jnp.float32))
        plgpu.barrier_arrive(k_free.at[stage])
        return mixed

    def hide_unseen(j, length, scores):
        """Those of keys behind a row's query."""
        row = positions(shape, 0) + row_tile * ROWS
        last = lax.broadcast(length - queries, shape)
        for query in range(1, queries):
            last = last + jnp.where(row >= query * plan.heads, jnp.int32(1), jnp.int32(0))
        return jnp.where(positions(shape, 1) + j * BLOCK <= last, scores, -jnp.inf)

    def attend(b, first, end, step):
        length = lengths[b]
        plgpu.barrier_wait(q_full)

        def attend_block(j, carry):
            step, total, largest, mixed = carry
            stage = lax.rem(step, STAGES)
            plgpu.barrier_wait(k_full.at[stage])

            def score(accumulator):
                # 0, which the compiler cannot see: it would keep q's descriptors in registers.
                left = q_smem.at[lax.min(step, 0)]
                plgpu.wgmma(accumulator, left, k_smem.at[stage].transpose((1, 0)))
                return accumulator[...]

            scores = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
            pl.when(j == end - 1)(lambda: plgpu.barrier_arrive(q_free))
            some_unseen = (j + 1) * BLOCK > length - (queries - 1)
            scores = lax.cond(
                some_unseen, functools.partial(hide_unseen, j, length), lambda x: x, scores
            )
            factor = plan.scale * LOG2_E
            raised = jnp.maximum(largest, jnp.round(jnp.max(scores, axis=1) * factor))
            pl.when(step > 0)(lambda: plgpu.barrier_wait(p_free))
            largest_smem[...] = raised
            plgpu.barrier_arrive(largest_full)
            shrink = jnp.exp2(largest - raised)
            p = jnp.exp2(scores * factor - spread(raised, shape))
            total = total * shrink + jnp.sum(p, axis=1)
            p = p.astype(jnp.bfloat16)
            p_smem[...] = p
            if not in_place:  # only then does wgmma read it there
                plgpu.commit_smem()
            plgpu.barrier_arrive(p_full)
            shrunk = mixed * spread(shrink, mixed.shape)
            left = p if in_place else p_smem
            mixed = mix(left, shrunk, stage, pl.ds(0, HALF), length - j * BLOCK)
            return step + 1, total, raised, mixed

        start = step, constant(0, (ROWS,), of_rows), constant(LOWEST, (ROWS,), of_rows), no_output
        step, total, largest, mixed = lax.fori_loop(first, end, attend_block, start)
        slot = part + b
        stats[slot, 0, rows] = largest
        stats[slot, 1, rows] = total
        parts[slot, rows, pl.ds(0, HALF)] = mixed
        return step

    def follow(b, first, end, step):
        length = lengths[b]

        def follow_block(j, carry):
            step, largest, mixed = carry
            stage = lax.rem(step, STAGES)
            plgpu.barrier_wait(k_full.at[stage])
            plgpu.barrier_wait(largest_full)
            raised = plgpu.load(largest_smem, layout=of_rows)
            shrunk = mixed * spread(jnp.exp2(largest - raised), mixed.shape)
            plgpu.barrier_wait(p_full)
            left = p_smem
            if in_place:
                left = plgpu.load(p_smem, layout=plgpu.Layout.WGMMA)
                plgpu.barrier_arrive(p_free)
            mixed = mix(left, shrunk, stage, pl.ds(HALF, HALF), length - j * BLOCK)
            if not in_place:
                plgpu.barrier_arrive(p_free)
            return step + 1, raised, mixed

        start = step, constant(LOWEST, (ROWS,), of_rows), no_output
        step, _, mixed = lax.fori_loop(first, end, follow_block, start)
        parts[part + b, rows, pl.ds(HALF, HALF)] = mixed
        return step

    for number, work in enumerate((attend, follow, produce)):

        @pl.when(warpgroup == number)
        def _(work=work):
            if work is produce:
                plgpu.set_max_registers(plan.tiles.producer_registers, action="decrease")
            else:
                plgpu.set_max_registers(plan.tiles.consumer_registers, action="increase")
            turns.each(work)
