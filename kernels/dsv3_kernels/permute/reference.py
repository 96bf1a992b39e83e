"""Rows taken into slots, and summed from them: the definition.

    take_rows   slots[s] = weight[s] * x[row_of_slot[s]]
    sum_rows    y[r] = sum over k of weights[r, k] * slots[slot_of_row[r, k]]
    dot_rows    out[r, k] = <y[r], slots[slot_of_row[r, k]]>

An index that is negative or beyond the last is of nothing: zeros, and no term of a sum. Sums are in
FP32, in the order of k, and rounded once. A product of FP32 may be rounded before it is added or
not, as a device likes; of BF16 it is exact.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def take_rows(
    x: Shaped[Array, "rows width"],
    row_of_slot: Int[Array, " slots"],
    weights: Float[Array, " slots"] | None = None,
) -> Shaped[Array, "slots width"]:
    """Each slot's row, times its weight where there are any."""
    rows = _rows_at(x, row_of_slot)
    if weights is None:
        return rows
    weights = weights.astype(jnp.float32)[:, None]
    # An empty slot's weight, which may be anything, counts for nothing.
    weights = jnp.where(_is_there(x, row_of_slot)[:, None], weights, 0)
    return (rows.astype(jnp.float32) * weights).astype(x.dtype)


def sum_rows(
    slots: Float[Array, "slots width"],
    slot_of_row: Int[Array, "rows top_k"],
    weights: Float[Array, "rows top_k"] | None = None,
) -> Float[Array, "rows width"]:
    """Each row's sum over its slots."""
    total = jnp.zeros((slot_of_row.shape[0], slots.shape[1]), jnp.float32)
    for k in range(slot_of_row.shape[1]):  # one gather a k: all at once would be K times as large
        term = _rows_at(slots, slot_of_row[:, k]).astype(jnp.float32)
        if weights is not None:
            weight = jnp.where(_is_there(slots, slot_of_row[:, k]), weights[:, k], 0)
            term *= weight.astype(jnp.float32)[:, None]
        total += term
    return total.astype(slots.dtype)


def dot_rows(
    y: Float[Array, "rows width"],
    slots: Float[Array, "slots width"],
    slot_of_row: Int[Array, "rows top_k"],
) -> Float[Array, "rows top_k"]:
    """Each row's products with its slots, in FP32."""
    y = y.astype(jnp.float32)
    products = [
        jnp.sum(y * _rows_at(slots, slot_of_row[:, k]).astype(jnp.float32), axis=1)
        for k in range(slot_of_row.shape[1])
    ]
    there = _is_there(slots, slot_of_row)
    return jnp.where(there, jnp.stack(products, axis=1), 0)


def _rows_at(x: Array, index: Int[Array, " slots"]) -> Array:
    there = _is_there(x, index)
    rows = x.at[jnp.where(there, index, 0)].get(mode="promise_in_bounds")
    return jnp.where(there[:, None], rows, jnp.zeros((), x.dtype))


def _is_there(x: Array, index: Array) -> Array:
    return (index >= 0) & (index < x.shape[0])
