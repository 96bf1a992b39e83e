"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LATENT_NORM_EPS = 1e-6
"""eps of `q_a_layernorm` and `kv_a_layernorm`, whatever `rms_norm_eps` says: DeepSeek's modeling
file and Hugging Face leave these two at the library default."""


def rms_norm(
    x: Float[Array, "*batch dim"], weight: Float[Array, " dim"], eps: float
) -> Float[Array, "*batch dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in FP32, in x's dtype."""
    x32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse_rms * weight.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMS normalisation with a learned gain."""

    def __init__(self, dim: int, *, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((dim,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return rms_norm(x, self.weight[...], self.eps)
