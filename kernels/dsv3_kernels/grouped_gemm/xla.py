"""The products of groups on CPU: each group's rows in blocks, as many as it has.

The weights of a group that has rows are copied, and made FP32, once; then a loop over large blocks
of its rows, and one over small ones for the rest. XLA's CPU multiplies FP32 faster than BF16.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.quantize.reference import BLOCK, dequantize

ROW_BLOCKS = (256, 32)
"""Rows of a block: large ones, then the last, of which a part may be others'."""
K_BLOCKS = (512, 128, 32)
"""Where rows are summed over: each block adds to a whole matrix."""


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
    ends = jnp.minimum(jnp.cumsum(group_sizes), a.shape[0])
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
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
    ends = jnp.minimum(jnp.cumsum(group_sizes), rows)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])

    def add_block(height, start, end, is_whole, total):
        start, is_own = _clamped(height, start, end, rows)
        left, right = (
            lax.dynamic_slice_in_dim(x, start, height).astype(jnp.float32) for x in (a, b)
        )
        if not is_whole:
            left, right = jnp.where(is_own, left, 0), jnp.where(is_own, right, 0)
        return total + left.T @ right

    def of_group(bounds):
        total = jnp.zeros((a.shape[1], b.shape[1]), jnp.float32)
        start, end = bounds
        return _over_blocks(K_BLOCKS, rows, start, end, add_block, total).astype(out_dtype)

    return lax.map(of_group, (starts, ends))


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
    b_scale = None
    if scales is not None:
        a, b_scale = dequantize(a, scales[0]), scales[1]

    has_rows = ends > starts
    groups = jnp.argsort(~has_rows)  # those that have come first

    def do_group(index, out):
        group = groups[index]
        weight = b[group].astype(jnp.float32)
        if b_scale is not None:
            weight = dequantize(b[group], b_scale[group], (BLOCK, BLOCK))
        weight = weight if transpose_b else weight.T

        def do_block(height, start, end, is_whole, out):
            start, is_own = _clamped(height, start, end, rows)
            own = lax.dynamic_slice_in_dim(a, start, height).astype(jnp.float32)
            product = (own @ weight).astype(out_dtype)
            if not is_whole:
                others = lax.dynamic_slice_in_dim(out, start, height)
                product = jnp.where(is_own, product, others)
            return lax.dynamic_update_slice_in_dim(out, product, start, 0)

        return _over_blocks(ROW_BLOCKS, rows, starts[group], ends[group], do_block, out)

    return lax.fori_loop(0, jnp.sum(has_rows), do_group, jnp.zeros((rows, n), out_dtype))


def _over_blocks(
    heights: tuple[int, ...],
    rows: int,
    start: Int[Array, ""],
    end: Int[Array, ""],
    do_block: Callable[..., Any],
    carry: Any,
) -> Any:
    """`carry` after all blocks from `start` to `end`: as many whole ones of each height as there
    are, the last of the smallest height, not whole."""
    for height in heights:
        is_last = height == heights[-1]
        height = min(height, rows)
        count = (end - start + (height - 1 if is_last else 0)) // height

        def step(i, carry, height=height, start=start, is_whole=not is_last):
            return do_block(height, start + i * height, end, is_whole, carry)

        carry = lax.fori_loop(0, count, step, carry)
        start += count * height
    return carry


def _clamped(
    height: int, start: Int[Array, ""], end: Int[Array, ""], rows: int
) -> tuple[Int[Array, ""], jax.Array]:
    """Where a block begins that does not reach past the last row, and which rows are its own."""
    begin = jnp.minimum(start, rows - height)
    row = begin + jnp.arange(height, dtype=begin.dtype)[:, None]
    return begin, (start <= row) & (row < end)
