"""FP8 weights in blocks of 128x128, each with one FP32 scale: value = stored * scale.

The last block of a row or column may be ragged; it counts as filled up with zeros.
Source: DeepSeek's README_WEIGHTS.md; DeepSeek-V3 Technical Report §3.3.2.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dsv3_jax.export.names import BLOCK

E4M3_MAX = 448.0


class QuantisedWeight(NamedTuple):
    """E4M3 values and their scales; `weight_scale_inv` in files."""

    values: Float[Array, "rows columns"]
    scale: Float[Array, "row_blocks column_blocks"]


@partial(jax.jit, static_argnames="dtype")
def dequantise(
    values: Float[Array, "rows columns"],
    scale: Float[Array, "row_blocks column_blocks"],
    dtype: jnp.dtype,
) -> Float[Array, "rows columns"]:
    """values * scale, computed in FP32, in `dtype`."""
    return (values.astype(jnp.float32) * _spread(scale, values.shape)).astype(dtype)


@jax.jit
def quantise(
    weight: Float[Array, "rows columns"],
    kept_scale: Float[Array, "row_blocks column_blocks"] | None = None,
) -> QuantisedWeight:
    """`weight` as E4M3 with scale amax / 448 in each block: 1 if it is all zero, infinite if it has
    a value that is not finite.

    Where a block is exactly what `dequantise` makes of some E4M3 values and `kept_scale`, those are
    the result: what was loaded from FP8 is given back to the bit.
    """
    fresh = _fresh_scale(weight)
    if kept_scale is None:
        return QuantisedWeight(_to_e4m3(weight, fresh), fresh)
    kept_values = _to_e4m3(weight, kept_scale)
    restored = kept_values.astype(jnp.float32) * _spread(kept_scale, weight.shape)
    differs = _round_to(restored, weight.dtype) != weight.astype(jnp.float32)
    is_kept = ~_any_in_block(differs) & jnp.isfinite(kept_scale)
    scale = jnp.where(is_kept, kept_scale, fresh)
    return QuantisedWeight(_to_e4m3(weight, scale), scale)


def _fresh_scale(weight: Float[Array, "rows columns"]) -> Float[Array, "row_blocks column_blocks"]:
    magnitude = jnp.abs(weight.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), jnp.inf, magnitude)  # a maximum may pass over NaN
    amax = jnp.max(_in_blocks(magnitude), axis=(1, 3))
    smallest = jnp.finfo(jnp.float32).tiny
    return jnp.where(amax == 0, 1.0, jnp.maximum(_divide(amax, jnp.float32(E4M3_MAX)), smallest))


def _to_e4m3(
    weight: Float[Array, "rows columns"], scale: Float[Array, "row_blocks column_blocks"]
) -> Float[Array, "rows columns"]:
    """weight / scale to the nearest E4M3 value, ties to even. A scale of 0 divides nothing."""
    divisor = _spread(jnp.where(scale == 0, 1.0, scale), weight.shape)
    quotient = _divide(weight.astype(jnp.float32), divisor)
    return jnp.clip(quotient, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)


def _divide(x: Float[Array, "..."], divisor: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / divisor, correctly rounded.

    Where XLA sees one number dividing many it multiplies by the reciprocal; the barrier hides it.
    """
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))


def _round_to(x: Float[Array, "rows columns"], dtype: jnp.dtype) -> Float[Array, "rows columns"]:
    """FP32 values as they are after storing in `dtype`.

    Not as two casts: XLA may drop a pair of them (it allows excess precision).
    """
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


def _spread(
    scale: Float[Array, "row_blocks column_blocks"], shape: tuple[int, ...]
) -> Float[Array, "rows columns"]:
    """Each scale at every place of its block."""
    rows, columns = scale.shape
    blocks = jnp.broadcast_to(scale[:, None, :, None], (rows, BLOCK, columns, BLOCK))
    return blocks.reshape(rows * BLOCK, columns * BLOCK)[: shape[0], : shape[1]]


def _in_blocks(
    weight: Float[Array, "rows columns"] | Bool[Array, "rows columns"],
) -> Float[Array, "row_blocks block column_blocks block"] | Bool[Array, "..."]:
    rows, columns = weight.shape
    padded = jnp.pad(weight, ((0, -rows % BLOCK), (0, -columns % BLOCK)))
    return padded.reshape(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _any_in_block(
    condition: Bool[Array, "rows columns"],
) -> Bool[Array, "row_blocks column_blocks"]:
    return jnp.any(_in_blocks(condition), axis=(1, 3))
