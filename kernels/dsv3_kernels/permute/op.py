"""Rows to where their experts want them, and back: the contract and the choice of implementation.

take_rows(x, row_of_slot)              every slot's row                         gathers
sum_rows(slots, slot_of_row, weights)  every row's weighted sum over its slots  gathers, K a row
dot_rows(y, slots, slot_of_row)        every row's products with its slots

permute, unpermute                     the first two with gradients

row_of_slot names the row in each slot, slot_of_row the slots (numbered through all dims) in which
a row is. An index that is negative or beyond the last is of nothing: such a slot is zero, such a
term is left out. The two tables say the same, each in its direction (`plan` makes both); then take
and sum are each other's transposes, and no gradient needs a scatter.
"""

import importlib
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from dsv3_kernels import choice
from dsv3_kernels.permute import reference
from dsv3_kernels.permute.plan import Plan, plan

__all__ = ["Plan", "dot_rows", "permute", "plan", "sum_rows", "take_rows", "unpermute"]
IMPLEMENTATIONS = ("reference", "mosaic")
# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.3 s.


@partial(jax.jit, static_argnames="implementation")
def take_rows(
    x: Shaped[Array, "rows width"],
    row_of_slot: Int[Array, "*slots"],
    weights: Float[Array, "*slots"] | None = None,
    *,
    implementation: str | None = None,
) -> Shaped[Array, "*slots width"]:
    """The row of x in each slot, times the slot's weight if there are any; zeros where it is empty.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `reference`. Raises ValueError for an unknown implementation and for shapes that do not fit,
    NotImplementedError for a case that the named implementation lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _require_indices("row_of_slot", row_of_slot)
    if weights is not None:
        _require_shape("weights", weights, row_of_slot.shape)
    shape = *row_of_slot.shape, x.shape[1]
    if 0 in (x.size, *shape):
        return jnp.zeros(shape, x.dtype)
    table, is_summed = row_of_slot.reshape(-1), weights is not None
    operands = x, table, weights.reshape(-1) if weights is not None else None
    taken = _chosen("take_rows", implementation, operands, (x, table), is_summed=is_summed)
    return taken.reshape(shape)


@partial(jax.jit, static_argnames="implementation")
def sum_rows(
    slots: Float[Array, "*slots width"],
    slot_of_row: Int[Array, "rows top_k"],
    weights: Float[Array, "rows top_k"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """The sum over k of each row's slots, times weights if there are any.

    In FP32 in the order of k, rounded once to the dtype of slots. Chosen and raised as above.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _require_indices("slot_of_row", slot_of_row)
    if weights is not None:
        _require_shape("weights", weights, slot_of_row.shape)
    if 0 in (slots.size, slot_of_row.size):
        return jnp.zeros((slot_of_row.shape[0], slots.shape[-1]), slots.dtype)
    asked = slots.reshape(-1, slots.shape[-1]), slot_of_row
    return _chosen("sum_rows", implementation, (*asked, weights), asked, is_summed=True)


@partial(jax.jit, static_argnames="implementation")
def dot_rows(
    y: Float[Array, "rows width"],
    slots: Float[Array, "*slots width"],
    slot_of_row: Int[Array, "rows top_k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "rows top_k"]:
    """The products of each row with its slots, summed in FP32; 0 for nothing.

    Chosen and raised as above.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _require_indices("slot_of_row", slot_of_row)
    _require_shape("y", y, (slot_of_row.shape[0], slots.shape[-1]))
    if y.dtype != slots.dtype:
        raise ValueError(f"y is {y.dtype} and slots {slots.dtype}, expected one dtype")
    if 0 in (slots.size, slot_of_row.size):
        return jnp.zeros(slot_of_row.shape, jnp.float32)
    asked = slots.reshape(-1, slots.shape[-1]), slot_of_row
    needs = dict(is_summed=True, is_exact=True)
    return _chosen("dot_rows", implementation, (y, *asked), asked, **needs)


def permute(
    x: Float[Array, "rows width"],
    row_of_slot: Int[Array, "*slots"],
    slot_of_row: Int[Array, "rows top_k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*slots width"]:
    """`take_rows`, differentiable in x. Chosen and raised as above.

    >>> slots = permute(x, routed.row_of_slot, routed.slot_of_row)  # routed = plan(experts, 8)
    """
    _require_indices("slot_of_row", slot_of_row)
    if slot_of_row.shape[0] != x.shape[0]:
        found = f"slot_of_row is {list(slot_of_row.shape)} and x {list(x.shape)}"
        raise ValueError(f"{found}, expected as many rows")
    return _permute(implementation, x, row_of_slot, slot_of_row)


def unpermute(
    slots: Float[Array, "*slots width"],
    weights: Float[Array, "rows top_k"] | None,
    row_of_slot: Int[Array, "*slots"],
    slot_of_row: Int[Array, "rows top_k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "rows width"]:
    """`sum_rows`, differentiable in slots and weights. Chosen and raised as above."""
    _require_indices("row_of_slot", row_of_slot)
    _require_shape("row_of_slot", row_of_slot, slots.shape[:-1])
    return _unpermute(implementation, slots, weights, row_of_slot, slot_of_row)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _permute(implementation, x, row_of_slot, slot_of_row):
    del slot_of_row
    return take_rows(x, row_of_slot, implementation=implementation)


def _permute_forward(implementation, x, row_of_slot, slot_of_row):
    return _permute(implementation, x, row_of_slot, slot_of_row), slot_of_row


def _permute_backward(implementation, slot_of_row, d_slots):
    return sum_rows(d_slots, slot_of_row, implementation=implementation), None, None


_permute.defvjp(_permute_forward, _permute_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unpermute(implementation, slots, weights, row_of_slot, slot_of_row):
    del row_of_slot
    return sum_rows(slots, slot_of_row, weights, implementation=implementation)


def _unpermute_forward(implementation, slots, weights, row_of_slot, slot_of_row):
    y = _unpermute(implementation, slots, weights, row_of_slot, slot_of_row)
    kept = None if weights is None else slots  # which only the gradient of weights needs
    return y, (kept, weights, row_of_slot, slot_of_row)


def _unpermute_backward(implementation, residuals, d_y):
    slots, weights, row_of_slot, slot_of_row = residuals
    options = dict(implementation=implementation)
    if weights is None:
        return take_rows(d_y, row_of_slot, **options), None, None, None
    of_slot = _weights_of_slots(weights, slot_of_row, math.prod(row_of_slot.shape))
    d_slots = take_rows(d_y, row_of_slot, of_slot.reshape(row_of_slot.shape), **options)
    d_weights = dot_rows(d_y, slots, slot_of_row, **options).astype(weights.dtype)
    return d_slots, d_weights, None, None


_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def _weights_of_slots(
    weights: Float[Array, "rows top_k"], slot_of_row: Int[Array, "rows top_k"], slots: int
) -> Float[Array, " slots"]:
    """Each slot's weight. Numbers alone are scattered, a thousandth of what the rows are."""
    has_slot = (slot_of_row >= 0) & (slot_of_row < slots)
    # Each pair without one has its own place beyond the end, so that unique is true.
    beyond = slots + jnp.arange(weights.size, dtype=slot_of_row.dtype).reshape(weights.shape)
    place = jnp.where(has_slot, slot_of_row, beyond)
    return jnp.zeros(slots, weights.dtype).at[place].set(weights, mode="drop", unique_indices=True)


def _chosen(name: str, named: str | None, operands: tuple, asked: tuple, **needs: bool) -> Array:
    """The result of `name` for `operands`; of `asked` and `needs` the kernel must be capable."""
    return choice.run(
        name,
        named,
        operands,
        kernel=lambda: getattr(_mosaic(), name),
        unsupported=lambda: _mosaic().unsupported(*asked, **needs),
        plain=getattr(reference, name),
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second, which a start on CPU can do without."""
    return importlib.import_module("dsv3_kernels.permute.mosaic_sm90")


def _require_indices(name: str, indices: Array) -> None:
    if indices.dtype != jnp.int32:
        raise ValueError(f"{name} is {indices.dtype}, expected int32")


def _require_shape(name: str, array: Array, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ValueError(f"{name} is {list(array.shape)}, expected {list(expected)}")
