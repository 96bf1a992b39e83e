"""Linear maps and embeddings with Hugging Face's weight layout, [out, in]."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.tape import AUTODIFF, Product, Tape
from dsv3_jax.quant.matmul import QuantisedProduct
from dsv3_jax.quant.recipe import Recipe
from dsv3_jax.quant.scaled_array import ScaledArray


class BlockScale(nnx.Variable):
    """The `weight_scale_inv` with which a checkpoint stored a weight as block-FP8.

    Kept beside the dequantised weight so that saving as FP8 gives back the same bytes. The trainer
    drops it. NaN where a stacked weight holds tensors that were not stored as FP8.
    """


FEW_ROWS = 32


def linear(
    x: Float[Array, "*batch in_dim"],
    weight: Float[Array, "out_dim in_dim"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch out_dim"]:
    """x @ weight.T in `dtype` (None: x's), accumulated in FP32.

    For 2 to 32 rows, as in decoding, the weight is the left operand of the product: XLA's CPU
    backend is 2 to 3 times faster with few columns than with few rows (docs/LOG.md, 2026-11-23).
    """
    rows = x.reshape(-1, x.shape[-1])  # two dims: XLA's CPU backward is a tenth faster so
    if 1 < rows.shape[0] <= FEW_ROWS:
        y = _dot_nt(weight, rows, dtype).T
    else:
        y = _dot_nt(rows, weight, dtype)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _dot_nt(
    a: Float[Array, "m k"], b: Float[Array, "n k"], dtype: DTypeLike | None
) -> Float[Array, "m n"]:
    """a @ b.T"""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def product_of(recipe: Recipe, name: str, otherwise: Product = linear) -> Product:
    """The product that `recipe` has for `name`."""
    return QuantisedProduct(recipe.rules[name]) if name in recipe.rules else otherwise


def plain(weight: Array | ScaledArray, dtype: DTypeLike) -> Float[Array, "out_dim in_dim"]:
    """The matrix itself, in `dtype` where it is kept in FP8."""
    return weight.dequantise(dtype) if isinstance(weight, ScaledArray) else weight


class Linear(nnx.Module):
    """A bias-free linear map; `weight` is [out_dim, in_dim]."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        product: Product = linear,
    ):
        self.weight = nnx.Param(normal(rngs, (out_dim, in_dim), std, dtype))
        self.product = product

    def __call__(
        self, x: Float[Array, "*batch in_dim"], tape: Tape = AUTODIFF, name: str = ""
    ) -> Float[Array, "*batch out_dim"]:
        """x @ weight.T; `name` is what `tape` knows the product by."""
        return tape.linear(name, self.product, x, self.weight[...])


class Embedding(nnx.Module):
    """Token embeddings; `weight` is [vocab, hidden]."""

    def __init__(self, vocab: int, hidden: int, *, std: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.weight = nnx.Param(normal(rngs, (vocab, hidden), std, dtype))

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch hidden"]:
        return self.weight[...][tokens]


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DTypeLike
) -> Float[Array, "..."]:
    """A draw from N(0, std^2), made in FP32 so that every dtype starts from the same values."""
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
