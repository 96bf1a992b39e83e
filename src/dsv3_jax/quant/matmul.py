"""Products that follow a `ProductRule`, with their gradients."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.quant.formats import ROW
from dsv3_jax.quant.recipe import Operand, ProductRule
from dsv3_jax.quant.scaled_array import ScaledArray, quantise, quantise_transposed
from dsv3_kernels.fp8_gemm.op import fp8_gemm
from dsv3_kernels.grouped_gemm.op import masked_rows
from dsv3_kernels.quantize.op import BLOCK


@dataclass(frozen=True)
class QuantisedProduct:
    """x W^T for x [..., in] and W [out, in], or by matrix for x [E, rows, in] and W [E, out, in].

    The result is in x's dtype, the gradient of W in W's. A W that is quantised already is a
    constant; `with_handles` gives it a gradient. Of stacked matrices `filled` may tell how many of
    their rows there are, `expected` how many are likely: x has zeros behind them, and so has the
    result.
    """

    rule: ProductRule

    def __call__(
        self,
        x: Float[Array, "*batch in_dim"],
        weight: Any,
        filled: Int[Array, " matrices"] | None = None,
        expected: int | None = None,
    ) -> Float[Array, "..."]:
        is_scaled = isinstance(weight, ScaledArray)
        handle = weight.handle if is_scaled else weight
        constant = ScaledArray(weight.values, weight.scale, weight.tile) if is_scaled else None
        rows = x if weight.ndim == 3 else x.reshape(-1, x.shape[-1])
        y = _product(self.rule, expected, rows, constant, handle, filled)
        return y.reshape(*x.shape[:-1], weight.shape[-2])


# `quantised` is the weight, or None where it is to be made of `weight`, whose gradient is wanted.


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    rule: ProductRule,
    expected: int | None,
    x: Array,
    quantised: ScaledArray | None,
    weight: Array | None,
    filled: Array | None,
) -> Array:
    return _forward(rule, expected, x, quantised, weight, filled)[0]


def _forward(
    rule: ProductRule,
    expected: int | None,
    x: Array,
    quantised: ScaledArray | None,
    weight: Array | None,
    filled: Array | None,
) -> tuple[Array, Any]:
    with jax.named_scope("quantise"):
        if quantised is None:
            quantised = _quantise(weight, rule.weight)
        rows = _quantise(x, rule.input)
        kept = rule.kept.encode(x)
    like = None if weight is None else jnp.zeros((0,), weight.dtype)
    return _multiply(rows, quantised, x.dtype, filled, expected), (kept, quantised, like, filled)


def _backward(
    rule: ProductRule, expected: int | None, residuals: Any, dy: Array
) -> tuple[Array, None, Array | None, None]:
    kept, quantised, like, filled = residuals
    with jax.named_scope("quantise"):
        gradient = _quantise(dy, rule.gradient)
    dx = _multiply(gradient, quantised.transposed(), dy.dtype, filled, expected)
    if like is None:
        return dx, None, None, None
    with jax.named_scope("quantise"):
        columns = _quantise_columns(dy, rule.gradient_columns)
        x = rule.kept.decode(kept, jnp.float32)
        input_columns = _quantise_columns(x, rule.input_columns)
    return dx, None, _multiply(columns, input_columns, like.dtype), None


_product.defvjp(_forward, _backward)


def _quantise(x: Any, operand: Operand) -> ScaledArray:
    return quantise(x, operand.tile, dtype=operand.dtype, power_of_two=operand.power_of_two)


def _quantise_columns(x: Array, operand: Operand) -> ScaledArray:
    """The transpose of `x` by `operand`."""
    if operand.tile != ROW:
        return _quantise(jnp.swapaxes(x, -1, -2), operand)
    return quantise_transposed(x, dtype=operand.dtype, power_of_two=operand.power_of_two)


def _multiply(
    a: ScaledArray,
    b: ScaledArray,
    dtype: DTypeLike,
    filled: Array | None = None,
    expected: int | None = None,
) -> Array:
    """a b^T, a in tiles of 1x128 whatever it was made in."""
    a = a.of_rows()
    if filled is not None and b.tile == (BLOCK, BLOCK):
        scales = a.scale, b.scale
        options = dict(scales=scales, expected_rows=expected)
        y = masked_rows(a.values, b.values, filled, dtype, **options)
        return jnp.where(jnp.arange(y.shape[1])[:, None] < filled[:, None, None], y, 0)
    if b.tile != (BLOCK, BLOCK):
        b = b.of_rows()
    return fp8_gemm(a.values, a.scale, b.values, b.scale, dtype)
