"""AdamW as published: FP32 master weights, FP32 or BF16 moments, no decay on norms.

Source: DeepSeek-V3 Technical Report §4.2 and §3.3.2 (BF16 moments); the report states no epsilon.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.parallel.sharding import add_over

CLIP_EPS = 1e-6
"""Added to the norm before dividing, as PyTorch's clip_grad_norm_ does."""


class GradientNorm(NamedTuple):
    """The global norm, and each tensor's sum of squares ([layers] for a stacked tensor)."""

    total: Float[Array, ""]
    squares: nnx.State


class Moments(NamedTuple):
    """AdamW's running means of the gradient and of its square, in `moment_dtype`."""

    first: nnx.State
    second: nnx.State


def init_moments(config: OptimizerConfig, params: nnx.State) -> Moments:
    """Zeros for every parameter."""
    dtype = jnp.dtype(config.moment_dtype)
    return Moments(
        *(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params) for _ in Moments._fields)
    )


def adamw_update(
    config: OptimizerConfig,
    params: nnx.State,
    moments: Moments,
    gradients: nnx.State,
    *,
    step: Int[Array, ""],
    learning_rate: Float[Array, ""],
) -> tuple[nnx.State, Moments]:
    """Parameters and moments after step `step` (from 1), all arithmetic in FP32.

    p <- p - lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p), decay where `decays` says so.
    """
    t = step.astype(jnp.float32)
    bias1, bias2 = 1 - config.beta1**t, 1 - config.beta2**t

    def update(path, param, first, second, gradient):
        m = config.beta1 * first.astype(jnp.float32) + (1 - config.beta1) * gradient
        v = config.beta2 * second.astype(jnp.float32) + (1 - config.beta2) * jnp.square(gradient)
        direction = (m / bias1) / (jnp.sqrt(v / bias2) + config.eps)
        if decays(path):
            direction += config.weight_decay * param
        return param - learning_rate * direction, m.astype(first.dtype), v.astype(second.dtype)

    updated = jax.tree.map_with_path(update, params, moments.first, moments.second, gradients)
    new_params, first, second = jax.tree.transpose(
        jax.tree.structure(params), jax.tree.structure((0, 0, 0)), updated
    )
    return new_params, Moments(first, second)


def decays(path: tuple) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to the gains of norms."""
    return not any("norm" in str(part) for part in path)


def gradient_norm(
    gradients: nnx.State, stacked: nnx.State, placements: nnx.State | None = None
) -> GradientNorm:
    """Norms in FP32. `stacked` is True for tensors whose first dim is the layer.

    `placements` says over which devices the shards of a tensor lie, inside shard_map.
    """

    def squares(gradient, is_stacked):
        axes = tuple(range(1 if is_stacked else 0, gradient.ndim))
        return jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=axes)

    by_tensor = jax.tree.map(squares, gradients, stacked)
    if placements is not None:
        by_tensor = jax.tree.map(lambda s, p: add_over(p.shard_axes, s), by_tensor, placements)
    return GradientNorm(
        jnp.sqrt(sum(jnp.sum(leaf) for leaf in jax.tree.leaves(by_tensor))), by_tensor
    )


def clip_factor(norm: Float[Array, ""], clip_norm: float) -> Float[Array, ""]:
    """What gradients are multiplied by so that their global norm is at most `clip_norm`."""
    return jnp.minimum(1.0, clip_norm / (norm + CLIP_EPS))
