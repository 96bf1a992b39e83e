"""Products that follow a `ProductRule`, and stacked ones that follow none, with their gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.quant.formats import E4M3, PLAIN, ROW
from dsv3_jax.quant.recipe import Operand, ProductRule
from dsv3_jax.quant.scaled_array import ScaledArray, quantise, quantise_transposed
from dsv3_kernels import choice
from dsv3_kernels.fp8_gemm.op import fp8_gemm
from dsv3_kernels.grouped_gemm.op import masked_rows
from dsv3_kernels.grouped_gemm.plan import unsupported
from dsv3_kernels.quantize.op import BLOCK
from dsv3_kernels.swiglu_quantize.op import (
    swiglu_backward,
    swiglu_quantize,
    swiglu_quantize_transposed,
)
from dsv3_kernels.target import is_hopper


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
        rows = x if weight.ndim == 3 else x.reshape(-1, x.shape[-1])
        y = _product(self.rule, expected, rows, *_parts(weight), filled)
        return y.reshape(*x.shape[:-1], weight.shape[-2])


WeightedInput = tuple[Float[Array, "*rows double_width"], Float[Array, "*rows"]]
"""SwiGLU's input h = [gate ; up], and a weight for each row."""


@dataclass(frozen=True)
class SwigluProduct:
    """a W^T for a = silu(gate) * up * weight, made in FP8 at once, and made again in backward.

    h is [rows, 2F] for one W [out, F], [E, rows, 2F] for stacked ones. W, `filled`, `expected` and
    what comes out are as `QuantisedProduct` has them; a is computed in FP32 and rounded once.
    """

    rule: ProductRule

    @staticmethod
    def can_follow(rule: ProductRule) -> bool:
        """Whether `rule` has a in tiles of 1x128 and does not keep it."""
        inputs = rule.input, rule.input_columns
        are_rows = all((operand.tile, operand.dtype) == (ROW, E4M3) for operand in inputs)
        return are_rows and rule.kept is PLAIN

    def __call__(
        self,
        x: WeightedInput,
        weight: Any,
        filled: Int[Array, " matrices"] | None = None,
        expected: int | None = None,
    ) -> Float[Array, "..."]:
        return _swiglu_product(self.rule, expected, *x, *_parts(weight), filled)


def _parts(weight: Any) -> tuple[ScaledArray | None, Array | None]:
    """The weight in 8 bits, or None where it is to be made; and what has its gradient, if any."""
    if not isinstance(weight, ScaledArray):
        return None, weight
    return ScaledArray(weight.values, weight.scale, weight.tile), weight.handle


# `quantised` and `weight` are what `_parts` gives.


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
    quantised, like = _operand(rule, quantised, weight)
    with jax.named_scope("quantise"):
        rows = _quantise(x, rule.input)
        kept = rule.kept.encode(x)
    return _multiply(rows, quantised, x.dtype, filled, expected), (kept, quantised, like, filled)


def _backward(
    rule: ProductRule, expected: int | None, residuals: Any, dy: Array
) -> tuple[Array, None, Array | None, None]:
    kept, quantised, like, filled = residuals
    dx = _input_gradient(rule, expected, dy, quantised, filled)
    if like is None:
        return dx, None, None, None
    with jax.named_scope("quantise"):
        x = rule.kept.decode(kept, jnp.float32)
        columns = _quantise_columns(x, rule.input_columns)
    return dx, None, _weight_gradient(rule, dy, columns, like), None


_product.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu_product(
    rule: ProductRule,
    expected: int | None,
    h: Array,
    weights: Array,
    quantised: ScaledArray | None,
    weight: Array | None,
    filled: Array | None,
) -> Array:
    return _swiglu_forward(rule, expected, h, weights, quantised, weight, filled)[0]


def _swiglu_forward(
    rule: ProductRule,
    expected: int | None,
    h: Array,
    weights: Array,
    quantised: ScaledArray | None,
    weight: Array | None,
    filled: Array | None,
) -> tuple[Array, Any]:
    quantised, like = _operand(rule, quantised, weight)
    with jax.named_scope("quantise"):
        exact = rule.input.power_of_two
        values, scale = swiglu_quantize(h, weights, filled, power_of_two=exact)
    rows = ScaledArray(values, scale, ROW)
    y = _multiply(rows, quantised, h.dtype, filled, expected)
    return y, (h, weights, quantised, like, filled)


def _swiglu_backward(
    rule: ProductRule, expected: int | None, residuals: Any, dy: Array
) -> tuple[Array, Array, None, Array | None, None]:
    h, weights, quantised, like, filled = residuals
    d_a = _input_gradient(rule, expected, dy, quantised, filled)
    d_h, d_weights = swiglu_backward(h, weights, d_a, filled)
    assert d_weights is not None  # there are weights
    d_weights = d_weights.astype(weights.dtype)
    if like is None:
        return d_h, d_weights, None, None, None
    with jax.named_scope("quantise"):
        exact = rule.input_columns.power_of_two
        values, scale = swiglu_quantize_transposed(h, weights, filled, power_of_two=exact)
    columns = ScaledArray(values, scale, ROW)
    return d_h, d_weights, None, _weight_gradient(rule, dy, columns, like), None


_swiglu_product.defvjp(_swiglu_forward, _swiglu_backward)


def _operand(
    rule: ProductRule, quantised: ScaledArray | None, weight: Array | None
) -> tuple[ScaledArray, Array | None]:
    """The weight in 8 bits, and an empty array in its gradient's dtype if it is to have one."""
    if quantised is None:
        with jax.named_scope("quantise"):
            quantised = _quantise(weight, rule.weight)
    return quantised, None if weight is None else jnp.zeros((0,), weight.dtype)


def _input_gradient(
    rule: ProductRule,
    expected: int | None,
    dy: Array,
    quantised: ScaledArray,
    filled: Array | None,
) -> Array:
    """dy W"""
    with jax.named_scope("quantise"):
        gradient = _quantise(dy, rule.gradient)
    return _multiply(gradient, quantised.transposed(), dy.dtype, filled, expected)


def _weight_gradient(
    rule: ProductRule, dy: Array, input_columns: ScaledArray, like: Array
) -> Array:
    """dy^T x, of the transpose of x."""
    with jax.named_scope("quantise"):
        columns = _quantise_columns(dy, rule.gradient_columns)
    return _multiply(columns, input_columns, like.dtype)


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
        return _without_rest(masked_rows(a.values, b.values, filled, dtype, **options), filled)
    if b.tile != (BLOCK, BLOCK):
        b = b.of_rows()
    return fp8_gemm(a.values, a.scale, b.values, b.scale, dtype)


def stacked_product(
    x: Float[Array, "matrices rows in_dim"],
    weight: Float[Array, "matrices out_dim in_dim"],
    filled: Int[Array, " matrices"] | None = None,
    expected: int | None = None,
) -> Float[Array, "matrices rows out_dim"]:
    """x W^T by matrix, in their dtype; `filled` and `expected` are as `QuantisedProduct` has them.

    In BF16 on a Hopper GPU only filled rows are multiplied, by W and in backward dy by W; anywhere
    else, and for the gradient of W, it is one product of all rows.
    """
    if filled is None or not is_hopper():
        return _all_rows(x, weight)
    return _stacked(expected, x, weight, filled)


def _all_rows(x: Array, weight: Array) -> Array:
    return jnp.einsum("eci,eoi->eco", x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stacked(expected: int | None, x: Array, weight: Array, filled: Array) -> Array:
    return _filled_rows(_all_rows, x, weight, filled, expected)


def _stacked_forward(
    expected: int | None, x: Array, weight: Array, filled: Array
) -> tuple[Array, Any]:
    return _stacked(expected, x, weight, filled), (x, weight, filled)


def _stacked_backward(expected: int | None, residuals: Any, dy: Array) -> tuple[Array, Array, None]:
    x, weight, filled = residuals
    all_rows = partial(jnp.einsum, "eco,eoi->eci")
    dx = _filled_rows(all_rows, dy, weight, filled, expected, transpose_b=True)
    return dx, jnp.einsum("eco,eci->eoi", dy, x), None


_stacked.defvjp(_stacked_forward, _stacked_backward)


def _filled_rows(
    all_rows: Callable[[Array, Array], Array],
    a: Array,
    b: Array,
    filled: Array,
    expected: int | None,
    **transposed: bool,
) -> Array:
    """`all_rows(a, b)`, of filled rows where the kernel has them; zeros behind them there."""

    def multiply(a, b, filled):
        options = dict(expected_rows=expected, implementation="mosaic", **transposed)
        return _without_rest(masked_rows(a, b, filled, a.dtype, **options), filled)

    return choice.run(
        "experts' products",
        None,
        (a, b, filled),
        kernel=lambda: multiply,
        unsupported=lambda: unsupported(a, b, None, a.dtype),
        plain=lambda a, b, _: all_rows(a, b),
        plain_name="a product of all rows",
    )


def _without_rest(y: Array, filled: Array) -> Array:
    """`y` with zeros behind the filled rows."""
    return jnp.where(jnp.arange(y.shape[1])[:, None] < filled[:, None, None], y, 0)
