"""How FP8's tiles are used: what underflows, what is at the limit, how large the scales are.

One part of a batch goes forward and backward once more with a tape that looks at the operands of
every FP8 product. Each statistic is a sum, so it comes out as the gradient of zeros (`meters`) that
are given in: through scans over layers, rematerialisation and meshes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.parallel.tape import Product, Tape
from dsv3_jax.quant.formats import Codec
from dsv3_jax.quant.recipe import Operand, ProductRule, Recipe
from dsv3_jax.quant.scaled_array import quantise
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.loss import training_loss
from dsv3_kernels.quantize.reference import in_tiles
from dsv3_kernels.swiglu_quantize.reference import activation

OPERANDS = ("input", "weight", "gradient")
SUMS = 7
"""Values, of them not zero, underflown and at the limit; tiles that are not all zero, log2 of their
scales and its square."""

Meters = dict[str, dict[str, Float[Array, " sums"]]]


class Meter(Tape):
    """JAX differentiates; the gradients of `meters`, [product][operand], are the sums, of products
    that have one of `rules`."""

    def __init__(self, meters: Meters, rules: Mapping[str, ProductRule]):
        self.meters = meters
        self.rules = rules

    def linear(self, name: str, product: Product, x: Any, weight: Any) -> Array:
        if name not in self.rules:
            return product(x, weight)
        rule, meters = self.rules[name], self.meters[name]
        x = _watch_value(rule.input, x, meters["input"])
        weight = _watch_value(rule.weight, weight, meters["weight"])
        return _watch_gradient(rule.gradient, product(x, weight), meters["gradient"])

    def from_kept(self, names: tuple[str, ...], codec: Codec, function, *arguments: Any) -> Array:
        del names, codec  # backward reads what was computed: nothing else changes hands here
        return function(*arguments)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch_value(operand: Operand, x: Any, meter: Array) -> Any:
    """`x`; the gradient of `meter` are its sums, those of SwiGLU's output where x is its inputs."""
    del operand, meter
    return x


_watch_value.defvjp(
    lambda operand, x, meter: (x, x), lambda operand, x, d_x: (d_x, _sums(operand, x))
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch_gradient(operand: Operand, y: Array, meter: Array) -> Array:
    """`y`; the gradient of `meter` are the sums of y's gradient."""
    del operand, meter
    return y


_watch_gradient.defvjp(
    lambda operand, y, meter: (y, None), lambda operand, _, d_y: (d_y, _sums(operand, d_y))
)


def _sums(operand: Operand, x: Any) -> Float[Array, " sums"]:
    if isinstance(x, tuple):
        h, weights = x
        x = activation(h, weights, None)
    made = quantise(x, operand.tile, dtype=operand.dtype, power_of_two=operand.power_of_two)
    largest = float(jnp.finfo(operand.dtype).max)
    magnitude = jnp.abs(made.values.astype(jnp.float32))
    is_used = jnp.max(in_tiles(magnitude, made.tile), axis=(-3, -1)) > 0
    log_scale = jnp.where(is_used, jnp.log2(made.scale), 0)
    sums = (
        x.size,
        jnp.sum(x != 0),
        jnp.sum((x != 0) & (magnitude == 0)),
        jnp.sum(magnitude == largest),
        jnp.sum(is_used),
        jnp.sum(log_scale),
        jnp.sum(jnp.square(log_scale)),
    )
    return jnp.stack([jnp.asarray(value, jnp.float32) for value in sums])


class ScaleStatistics:
    """`statistics(state, rows, documents, mtp_weight)` of a layout with FP8 products."""

    def __init__(self, layout: Layout, recipe: Recipe):
        config = layout.config
        self.meters: Meters = {
            name: {operand: jnp.zeros((SUMS,), jnp.float32) for operand in OPERANDS}
            for name in recipe.rules
        }

        def sums(model, rows, documents, meters, predictions, mtp_weight):
            graph, weights = nnx.split(model)

            def loss(meters):
                metered = nnx.merge(graph, weights)
                metered.tape = Meter(meters, recipe.rules)
                return training_loss(
                    metered,
                    rows,
                    documents,
                    predictions=predictions,
                    sequences=predictions / (rows.shape[1] - 1),
                    mtp_weight=mtp_weight,
                    balance_weight=config.loss.balance_weight,
                )[0]

            return jax.grad(loss)(meters)

        self._sums = layout.sum_over_tokens(sums)
        self._predictions = np.float32(config.train.batch_size * config.data.seq_len)

    def __call__(
        self, state: Any, rows: jax.Array, documents: jax.Array | None, mtp_weight: float
    ) -> dict[str, float]:
        """By `fp8/PRODUCT/OPERAND/STATISTIC`, of the products that the model has."""
        replicated = self.meters, self._predictions, np.float32(mtp_weight)
        found = jax.tree.map(np.asarray, self._sums(state, rows, documents, *replicated))
        return {
            f"fp8/{product}/{operand}/{statistic}": value
            for product, operands in found.items()
            for operand, sums in operands.items()
            if sums[0] > 0
            for statistic, value in _means(sums).items()
        }


def _means(sums: Float[np.ndarray, " sums"]) -> dict[str, float]:
    """Shares of the values (of those not zero, what became zero), and of log2(scale) mean and
    standard deviation over the tiles."""
    values, not_zero, underflown, at_limit, tiles, log_scale, squares = map(float, sums)
    tiles = max(tiles, 1.0)
    mean = log_scale / tiles
    return {
        "underflow": underflown / max(not_zero, 1.0),
        "saturation": at_limit / values,
        "log2_scale_mean": mean,
        "log2_scale_std": max(squares / tiles - mean * mean, 0.0) ** 0.5,
    }
