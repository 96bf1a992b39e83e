"""Models that keep their weights in FP8: half of BF16's memory, and products in FP8.

What the products of quant/recipe.py read is a `ScaledArray`, E4M3 in blocks of 128x128 as
checkpoints have it; the rest, and activations, are BF16. For inference: nothing of it is trained.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.config.checks import require
from dsv3_jax.export.block_fp8 import quantise
from dsv3_jax.export.names import BLOCK, scale_shape, tensor_entries
from dsv3_jax.model.experts import LocalDispatcher, expert_products
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.quant.recipe import make_recipe
from dsv3_jax.quant.scaled_array import ScaledArray, is_scaled

FP8_WEIGHTS = "float8_e4m3fn"


def model_structure(config: ModelConfig, dtype: str) -> Transformer:
    """A model of shapes alone with weights in `dtype`. Raises ValueError for one that FP8 cannot
    hold."""
    if dtype != FP8_WEIGHTS:
        return nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    if config.has_experts:
        rule = f"a multiple of {BLOCK}: gate and up of an expert share blocks of {BLOCK} rows"
        width = config.moe_intermediate_size
        require(width % BLOCK == 0, "moe_intermediate_size", width, rule + f" in {FP8_WEIGHTS}")
    recipe = make_recipe("fp8")
    dispatcher = LocalDispatcher(expert_products(recipe))
    options = {"dtype": recipe.dtype, "dispatcher": dispatcher, "recipe": recipe}
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), **options))
    for path in quantised_paths(config):
        module = reduce(getattr, path[:-1], model)
        shape = getattr(module, path[-1]).shape
        setattr(module, path[-1], nnx.Param(jax.eval_shape(partial(_zeros, shape))))
    return model


def quantised_paths(config: ModelConfig) -> list[tuple[str, ...]]:
    """The attributes that lead to each array that FP8 checkpoints have in blocks."""
    entries = tensor_entries(config)
    return sorted({entry.path for entry in entries if entry.storage == "quantised"})


def converted(weights: nnx.State, structure: nnx.State) -> nnx.State:
    """`weights` as `model_structure` has them: cast, or quantised as `save_hf` does."""

    def convert(like, weight):
        return _quantise_stack(weight) if is_scaled(like) else weight.astype(like.dtype)

    return jax.tree.map(convert, structure, weights, is_leaf=is_scaled)


def _zeros(shape: tuple[int, ...]) -> ScaledArray:
    return ScaledArray(jnp.zeros(shape, FP8_WEIGHTS), jnp.zeros(scale_shape(shape), jnp.float32))


@jax.jit
def _quantise_stack(weight: Float[Array, "*stacked rows columns"]) -> ScaledArray:
    """One matrix after another, so that a stack needs no second FP32 copy."""
    stacked = weight.shape[:-2]
    values, scale = jax.lax.map(quantise, weight.reshape(-1, *weight.shape[-2:]))
    return ScaledArray(values.reshape(weight.shape), scale.reshape(*stacked, *scale.shape[-2:]))
