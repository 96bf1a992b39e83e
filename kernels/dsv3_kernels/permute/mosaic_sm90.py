"""Rows into slots and sums of them on Hopper: one row of the result, one program.

    take_rows   row_of_slot[s]       x's row -> 128 threads' registers -> slots' row s
    sum_rows    slot_of_row[r, all]  slots' row of k = 0 -> sums += weight * row
                                     slots' row of k = 1 -> sums += weight * row ... -> y's row r
    dot_rows    slot_of_row[r, all]  y's row r, kept in registers
                                     slots' row of k = 0 -> products -> their sum -> out[r, 0] ...

    program: one warpgroup, nothing in shared memory but what `dot_rows` adds up

      thread       0          1                127        0
      columns  |  0..7    |  8..15   | ... | 1016..1023 | 1024.. |     of BF16: LDG.128, STG.128

      a row of 7,168 BF16: 7 loads of each thread, all under way at once
      indices and weights: scalars, the same for all threads; where one is of nothing, a branch goes
      around the loads, so that an empty slot costs no reading

Four to sixteen programs share an SM, each with a row under way: 57 KB and more, where memory's
latency of about 1,000 cycles asks for 15 KB. Hopper's TMA has no gather, so it would take a row at
a time as well, through shared memory and barriers, and wants rows of a multiple of 16 bytes, which
the wire's 7,240 are not: those are read 8 bytes at a time, and the last 72 by 128 threads that
reach back over columns they share with others, and write them the same values.

Bound: memory, 14.5 bytes a cycle of an SM. A row of 7,168 BF16, read and written, takes 1,977
cycles, in which the four schedulers start 1,977 instructions of each of a program's warps: to take
it needs 40 of them, to sum 8 rows of as many slots (8,896 cycles) about 1,300.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels.permute import tiles as sizes
from dsv3_kernels.permute.tiles import Span

SUM_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
TAKE_DTYPES = (*SUM_DTYPES, jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.uint8))


def take_rows(
    x: Shaped[Array, "rows width"],
    row_of_slot: Int[Array, " slots"],
    weights: Float[Array, " slots"] | None = None,
) -> Shaped[Array, "slots width"]:
    """As the reference, bit by bit. NotImplementedError: see `unsupported`."""
    _require("take_rows", x, row_of_slot, is_summed=weights is not None)
    (rows, width), slots = x.shape, row_of_slot.shape[0]
    return _kernel(
        functools.partial(_take_kernel, _spans(x), rows, weights is not None),
        "take_rows",
        jax.ShapeDtypeStruct((slots, width), x.dtype),
        programs=slots,
        bytes_moved=2 * slots * width * x.dtype.itemsize,
    )(x, row_of_slot, *_as_scalars(weights))


def sum_rows(
    slots: Float[Array, "slots width"],
    slot_of_row: Int[Array, "rows top_k"],
    weights: Float[Array, "rows top_k"] | None = None,
) -> Float[Array, "rows width"]:
    """As the reference; products of FP32 are not rounded before they are added."""
    _require("sum_rows", slots, slot_of_row, is_summed=True)
    (rows, top_k), width = slot_of_row.shape, slots.shape[1]
    return _kernel(
        functools.partial(_sum_kernel, _spans(slots), slots.shape[0], top_k, weights is not None),
        "sum_rows",
        jax.ShapeDtypeStruct((rows, width), slots.dtype),
        programs=rows,
        bytes_moved=(top_k + 1) * rows * width * slots.dtype.itemsize,
    )(slots, slot_of_row.reshape(-1), *_as_scalars(weights))


def dot_rows(
    y: Float[Array, "rows width"],
    slots: Float[Array, "slots width"],
    slot_of_row: Int[Array, "rows top_k"],
) -> Float[Array, "rows top_k"]:
    """As the reference, but for the order in which products are added."""
    _require("dot_rows", slots, slot_of_row, is_summed=True, is_exact=True)
    rows, top_k = slot_of_row.shape
    products = _kernel(
        functools.partial(_dot_kernel, _spans(slots), slots.shape[0], top_k),
        "dot_rows",
        jax.ShapeDtypeStruct((rows * top_k,), jnp.float32),
        programs=rows,
        bytes_moved=(top_k + 1) * y.size * y.dtype.itemsize,
    )(y, slots, slot_of_row.reshape(-1))
    return products.reshape(rows, top_k)


def unsupported(
    x: Shaped[Array, "rows width"],
    table: Int[Array, " slots"] | Int[Array, "rows_of_table top_k"],
    *,
    is_summed: bool,
    is_exact: bool = False,
) -> str:
    """Why the kernels will not take rows of x at the indices of `table` (only shapes and dtypes are
    looked at), or an empty string.

    `is_summed` of rows that are added or multiplied, `is_exact` where no column may be had twice.
    """
    dtypes, width = SUM_DTYPES if is_summed else TAKE_DTYPES, x.shape[1]
    if x.dtype not in dtypes:
        expected = ", ".join(map(str, dtypes))
        return f"rows are {x.dtype}, expected one of {expected}"
    if not 0 < max(x.shape[0], table.shape[0]) * width < 2**31 or 0 in (x.size, table.size):
        found = f"rows are {list(x.shape)} and indices {list(table.shape)}"
        return f"{found}, expected at least one value and fewer than 2^31"
    if table.ndim == 2 and table.shape[1] > sizes.MOST_TOP_K:
        return f"top_k is {table.shape[1]}, expected at most {sizes.MOST_TOP_K}"
    if width < sizes.THREADS or (is_summed and width > sizes.MOST_COLUMNS):
        most = f" to {sizes.MOST_COLUMNS}" if is_summed else " or more"
        return f"width is {width}, expected {sizes.THREADS}{most}"
    if (registers := sizes.row_registers(width, x.dtype.itemsize)) > sizes.MOST_REGISTERS:
        return f"a row takes {registers} registers a thread, expected {sizes.MOST_REGISTERS}"
    if is_exact and width % sizes.THREADS:
        return f"width is {width}, expected a multiple of {sizes.THREADS}"
    return ""


def _take_kernel(spans, rows, has_weights, x, row_of_slot, *refs):
    slot, out = lax.axis_index("row"), refs[-1]
    row = row_of_slot[slot]
    is_there = _is_there(row, rows)

    @pl.when(is_there)
    def _():
        taken = _load_row(spans, x, row)
        if has_weights:
            weight = refs[0][slot]
            taken = [(part.astype(jnp.float32) * weight).astype(x.dtype) for part in taken]
        _store_row(spans, out, slot, taken)

    @pl.when(jnp.logical_not(is_there))
    def _():
        _store_row(spans, out, slot, _zeros(spans, x.dtype))


def _sum_kernel(spans, slots, top_k, has_weights, x, slot_of_row, *refs):
    row, out = lax.axis_index("row"), refs[-1]
    # All before the first of them is needed: they lie side by side, and come in few loads.
    indices = [slot_of_row[row * top_k + k] for k in range(top_k)]
    weights = [refs[0][row * top_k + k] if has_weights else None for k in range(top_k)]
    totals = _zeros(spans, jnp.float32)
    for index, weight in zip(indices, weights, strict=True):

        def add(totals, index=index, weight=weight):
            terms = [part.astype(jnp.float32) for part in _load_row(spans, x, index)]
            if weight is not None:
                terms = [weight * term for term in terms]
            return [total + term for total, term in zip(totals, terms, strict=True)]

        totals = lax.cond(_is_there(index, slots), add, lambda totals: totals, totals)
    _store_row(spans, out, row, [total.astype(out.dtype) for total in totals])


def _dot_kernel(spans, slots, top_k, y, x, slot_of_row, out):
    row = lax.axis_index("row")
    indices = [slot_of_row[row * top_k + k] for k in range(top_k)]
    of_row = [part.astype(jnp.float32) for part in _load_row(spans, y, row)]
    for k, index in enumerate(indices):

        def multiply(index=index):
            parts = zip(of_row, _load_row(spans, x, index), strict=True)
            return sum(jnp.sum(mine * part.astype(jnp.float32)) for mine, part in parts)

        is_there = _is_there(index, slots)
        out[row * top_k + k] = lax.cond(is_there, multiply, lambda: jnp.float32(0))


def _load_row(spans: tuple[Span, ...], x: Any, row: Array) -> list[Array]:
    return [
        plgpu.load(x.at[row, pl.ds(span.start, span.size)], layout=_layout(span), optimized=False)
        for span in spans
    ]


def _store_row(spans: tuple[Span, ...], out: Any, row: Array, parts: list[Array]) -> None:
    for span, part in zip(spans, parts, strict=True):
        out[row, pl.ds(span.start, span.size)] = part


def _zeros(spans: tuple[Span, ...], dtype: Any) -> list[Array]:
    return [plgpu.layout_cast(jnp.zeros(span.size, dtype), _layout(span)) for span in spans]


def _layout(span: Span) -> Any:
    return plgpu.Layout.WG_STRIDED((span.size,), vec_size=span.vector)


def _is_there(index: Array, count: int) -> Array:
    return (index >= 0) & (index < count)


def _as_scalars(weights: Array | None) -> list[Array]:
    return [] if weights is None else [weights.astype(jnp.float32).reshape(-1)]


def _spans(x: Array) -> tuple[Span, ...]:
    return sizes.spans(x.shape[1], x.dtype.itemsize)


def _kernel(
    body: Any, name: str, out_type: Any, *, programs: int, bytes_moved: int
) -> Callable[..., Array]:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(programs,),
        grid_names=("row",),
        kernel_name=name,
        cost_estimate=pl.CostEstimate(flops=0, bytes_accessed=bytes_moved, transcendentals=0),
    )


def _require(name: str, x: Array, table: Array, **needs: bool) -> None:
    if reason := unsupported(x, table, **needs):
        raise NotImplementedError(f"{name} on Hopper: {reason}")
