"""Rotary position embedding, interleaved pairs, with YaRN context extension.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); DeepSeek-V3's inference/model.py.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, YarnConfig


class Rotary(NamedTuple):
    """cos and sin of every position's angles, one per pair of rotary dims."""

    cos: Float[Array, "batch seq pairs"]
    sin: Float[Array, "batch seq pairs"]


def magnitude_scale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature 0.1 * mscale * ln(factor) + 1, and 1 without extension."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """The factor on q.k before softmax: 1/sqrt(qk_head_dim), times YaRN's m^2 if it is used.

    For DeepSeek-V3 with factor 40: 1.873854 / sqrt(192) = 0.135234.
    """
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is not None and config.rope_scaling.mscale_all_dim:
        m = magnitude_scale(config.rope_scaling.factor, config.rope_scaling.mscale_all_dim)
        scale *= m * m
    return scale


def inverse_frequencies(config: ModelConfig) -> Float[np.ndarray, " pairs"]:
    """Radians a position for each pair of rotary dims, YaRN's blend applied."""
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies.astype(np.float32)
    low, high = _correction_range(yarn, dim, config.rope_theta)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0.0, 1.0)
    return (frequencies * (1 - ramp) + frequencies / yarn.factor * ramp).astype(np.float32)


def rotary(config: ModelConfig, positions: Int[Array, "batch seq"]) -> Rotary:
    """cos and sin for the given positions, in FP32."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inverse_frequencies(config))
    scale = _rotary_scale(config.rope_scaling)
    return Rotary(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(
    x: Float[Array, "batch seq *heads dim"], rotary: Rotary
) -> Float[Array, "batch seq *heads dim"]:
    """Turns each pair (x[2i], x[2i+1]) by its position's angle; in FP32, back in x's dtype.

    The result keeps the interleaved layout of DeepSeek's checkpoints and caches. (Hugging Face
    writes the pairs de-interleaved, q and k alike, so its dot products are the same.)
    """
    heads = x.ndim - 3
    cos, sin = (jnp.expand_dims(t, range(2, 2 + heads)) for t in rotary)
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return pairs.reshape(x.shape).astype(x.dtype)


def _correction_range(yarn: YarnConfig, dim: int, theta: float) -> tuple[float, float]:
    """The pairs between which YaRN blends from extrapolation to interpolation."""

    def pair_that_turns(rotations: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelengths) / (2 * math.log(theta))

    low = float(max(math.floor(pair_that_turns(yarn.beta_fast)), 0))
    high = float(min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1))
    return low, high + 0.001 if low == high else high


def _rotary_scale(yarn: YarnConfig | None) -> float:
    """The factor on cos and sin; 1 for DeepSeek-V3, whose two mscales are equal."""
    if yarn is None:
        return 1.0
    if not (yarn.mscale and yarn.mscale_all_dim):
        return magnitude_scale(yarn.factor, 1.0)
    return magnitude_scale(yarn.factor, yarn.mscale) / magnitude_scale(
        yarn.factor, yarn.mscale_all_dim
    )
