"""The products of groups on CPU: what groups have in common at once, the rest by group.

    group 0   |####|####|##          of every group the first rows, up to a height chosen by how
    group 1   |####|##               large the groups are, in one batched product;
    group 2   |##  |                 then the rest of each in blocks of its rows

In a loop XLA's CPU multiplies blocks of few rows at half a large product's speed or less, so few
and large ones are what counts. FP32 is faster than BF16 there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.quantize.reference import BLOCK, dequantize

HEIGHTS = (512, 256, 128, 64)
"""Rows of a block, and more in the largest until its product takes `LARGE_PRODUCT`."""
LARGE_PRODUCT, MOST_ROWS = 2**26, 2048
"""Multiplications: a millisecond's."""
SHARES = (0.5, 0.75, 1.0)
"""Of the mean group: what the batched product may take of every group, where that is worth it."""
LEAST_COMMON_ROWS = 64
ROWS_A_REST = 64
"""As long as that many rows in the batched product: a group's rest, besides its rows' two times."""


def ragged_rows(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    transpose_b: bool = False,
) -> Float[Array, "rows n"]:
    """See op.py."""
    starts, ends = _spans(group_sizes, a.shape[0])
    return _rows_product(a, b, starts, ends, scales, out_dtype, transpose_b)


def masked_rows(
    a: Float[Array, "groups max_rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    transpose_b: bool = False,
) -> Float[Array, "groups max_rows n"]:
    """See op.py."""
    groups, max_rows, k = a.shape
    starts = jnp.arange(groups, dtype=group_sizes.dtype) * max_rows
    ends = starts + jnp.minimum(group_sizes, max_rows)
    a = a.reshape(-1, k)
    if scales is not None:
        scales = scales[0].reshape(a.shape[0], -1), scales[1]
    out = _rows_product(a, b, starts, ends, scales, out_dtype, transpose_b)
    return out.reshape(groups, max_rows, -1)


def ragged_k(
    a: Float[Array, "a_rows a_columns"],
    b: Float[Array, "b_rows b_columns"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
) -> Float[Array, "groups m n"]:
    """See op.py."""
    if scales is not None:
        a, b = (dequantize(x, scale).T for x, scale in zip((a, b), scales, strict=True))
    rows = a.shape[0]
    starts, ends = _spans(group_sizes, rows)
    heights = _heights(rows, a.shape[1] * b.shape[1])

    def of_common(height):
        if not height:
            return jnp.zeros((starts.size, a.shape[1], b.shape[1]), jnp.float32)
        place = starts[:, None] + jnp.arange(height, dtype=starts.dtype)
        is_own, place = (place < ends[:, None])[..., None], jnp.minimum(place, rows - 1)
        left, right = (jnp.where(is_own, x[place], 0).astype(jnp.float32) for x in (a, b))
        return jnp.einsum("gkm,gkn->gmn", left, right)

    def add_block(height, start, end, is_whole, total):
        start, is_own = _clamped(height, start, end, rows)
        left, right = (
            lax.dynamic_slice_in_dim(x, start, height).astype(jnp.float32) for x in (a, b)
        )
        if not is_whole:
            left, right = jnp.where(is_own, left, 0), jnp.where(is_own, right, 0)
        return total + left.T @ right

    def add_rest(group, start, end, out):
        total = _over_blocks(heights, start, end, add_block, out[group])
        return out.at[group].set(total)

    return _common_then_rest(starts, ends, rows, of_common, add_rest).astype(out_dtype)


def _spans(
    group_sizes: Int[Array, " groups"], rows: int
) -> tuple[Int[Array, " groups"], Int[Array, " groups"]]:
    """Where each group starts and ends."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]]), ends


def _rows_product(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    starts: Int[Array, " groups"],
    ends: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    transpose_b: bool,
) -> Float[Array, "rows n"]:
    """The product of the rows from start to end of each group; zeros in all others."""
    rows, n = a.shape[0], b.shape[2 if transpose_b else 1]
    heights = _heights(rows, n * a.shape[1])
    if scales is not None:
        a = dequantize(a, scales[0])

    def weights(groups):
        if scales is None:
            found = b[groups].astype(jnp.float32)
        else:
            found = dequantize(b[groups], scales[1][groups], (BLOCK, BLOCK))
        return found if transpose_b else jnp.swapaxes(found, -1, -2)

    def of_common(height):
        if not height:
            return jnp.zeros((rows, n), out_dtype)
        of_group = jnp.arange(height, dtype=starts.dtype)
        place = jnp.minimum(starts[:, None] + of_group, rows - 1)
        products = a[place].astype(jnp.float32) @ weights(slice(None))
        row = jnp.arange(rows, dtype=starts.dtype)
        group = jnp.sum(starts[:, None] <= row, axis=0, dtype=starts.dtype) - 1
        place = row - starts[group]
        is_common = (row < ends[group]) & (place < height)
        found = products.astype(out_dtype)[group, jnp.minimum(place, height - 1)]
        return jnp.where(is_common[:, None], found, 0)

    def add_rest(group, start, end, out):
        weight = weights(group)

        def do_block(height, start, end, is_whole, out):
            start, is_own = _clamped(height, start, end, rows)
            own = lax.dynamic_slice_in_dim(a, start, height).astype(jnp.float32)
            product = (own @ weight).astype(out_dtype)
            if not is_whole:
                others = lax.dynamic_slice_in_dim(out, start, height)
                product = jnp.where(is_own, product, others)
            return lax.dynamic_update_slice_in_dim(out, product, start, 0)

        return _over_blocks(heights, start, end, do_block, out)

    return _common_then_rest(starts, ends, rows, of_common, add_rest)


def _common_then_rest(
    starts: Int[Array, " groups"],
    ends: Int[Array, " groups"],
    rows: int,
    of_common: Callable[[int], Array],
    add_rest: Callable[..., Array],
) -> Array:
    """`of_common(height)` of the height that costs least, and to it the rest of each group."""
    mean, sizes = rows // starts.size, ends - starts
    heights = [int(share * mean) for share in SHARES]
    heights = [0, *(height for height in heights if height >= LEAST_COMMON_ROWS)]
    rests = [jnp.maximum(sizes - height, 0) for height in heights]
    costs = [
        starts.size * height + jnp.sum(jnp.where(rest > 0, 2 * rest + ROWS_A_REST, 0))
        for height, rest in zip(heights, rests, strict=True)
    ]
    chosen = jnp.argmin(jnp.stack(costs))
    out = lax.switch(chosen, [partial(of_common, height) for height in heights])
    starts = starts + jnp.asarray(heights, starts.dtype)[chosen]
    has_rest = ends > starts
    groups = jnp.argsort(~has_rest)  # those that have come first

    def step(index, out):
        group = groups[index]
        return add_rest(group, starts[group], ends[group], out)

    return lax.fori_loop(0, jnp.sum(has_rest), step, out)


def _heights(rows: int, multiplications_a_row: int) -> list[int]:
    """Of the blocks for a group's rows, the largest first."""
    largest = min(LARGE_PRODUCT // multiplications_a_row, MOST_ROWS)
    return sorted({min(height, rows) for height in (largest, *HEIGHTS)}, reverse=True)


def _over_blocks(
    heights: list[int],
    start: Int[Array, ""],
    end: Int[Array, ""],
    do_block: Callable[..., Any],
    carry: Any,
) -> Any:
    """`carry` after all blocks from `start` to `end`: of the largest height whole ones, then of
    each as many as leave no more than one of the next."""
    for height, following in zip(heights, [*heights[1:], 0], strict=True):
        is_whole = height == heights[0] != heights[-1]
        left = end - start
        count = left // height if is_whole else (left - following + height - 1) // height

        def step(i, carry, height=height, start=start, is_whole=is_whole):
            return do_block(height, start + i * height, end, is_whole, carry)

        carry = lax.fori_loop(0, count, step, carry)
        start += jnp.maximum(count, 0) * height
    return carry


def _clamped(
    height: int, start: Int[Array, ""], end: Int[Array, ""], rows: int
) -> tuple[Int[Array, ""], jax.Array]:
    """Where a block begins that does not reach past the last row, and which rows are its own."""
    begin = jnp.minimum(start, rows - height)
    row = begin + jnp.arange(height, dtype=begin.dtype)[:, None]
    return begin, (start <= row) & (row < end)
