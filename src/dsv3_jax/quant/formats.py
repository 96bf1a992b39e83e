"""Number formats of the recipe: their constants, and E5M6, which no library has.

    E4M3   1-4-3   largest 448    no infinity       products' operands, the dispatch wire
    E5M2   1-5-2   largest 57344                    only for comparison: the recipe has none
    E5M6   1-5-6   largest 65024                    the input of o_proj while it waits for backward

E5M6 is IEEE half precision with four bits of mantissa fewer: the report names the format and gives
no encoding. Source: DeepSeek-V3 Technical Report §3.3.2 and §3.3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8, UInt16

from dsv3_kernels.quantize.op import BLOCK, dequantize, quantize
from dsv3_kernels.quantize.reference import from_tiles, in_tiles, scale_of

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
E4M3_MAX, E5M2_MAX, E5M6_MAX = 448.0, 57344.0, 65024.0
E5M6_SMALLEST = 2.0**-20
"""The step between denormal E5M6 values."""
ROW, BLOCKS = (1, BLOCK), (BLOCK, BLOCK)
"""Tiles: 128 channels of a token; 128x128 of a weight."""


@dataclass(frozen=True)
class Codec:
    """How a tensor waits for backward, or travels: arrays by `parts`, which `decode` reads.

    `decode(arrays, dtype)` gives values in `dtype`.
    """

    name: str
    parts: tuple[str, ...]
    encode: Callable[[Array], tuple[Array, ...]]
    decode: Callable[[tuple[Array, ...], DTypeLike], Array]


PLAIN = Codec("plain", ("",), lambda x: (x,), lambda arrays, dtype: arrays[0].astype(dtype))
"""As it is."""


def _encode_rows(x: Float[Array, "*batch columns"]) -> tuple[Array, ...]:
    return quantize(_rows(x), ROW)


def _decode_rows(arrays: tuple[Array, ...], dtype: DTypeLike) -> Float[Array, "*batch columns"]:
    values, scale = arrays
    return dequantize(values, scale, ROW, dtype)


def _encode_exponents(x: Float[Array, "*batch columns"]) -> tuple[Array, ...]:
    values, scale = quantize(_rows(x), ROW, power_of_two=True)
    return values, to_exponents(scale)


def _decode_exponents(arrays: tuple[Array, ...], dtype: DTypeLike) -> Array:
    values, exponents = arrays
    return dequantize(values, from_exponents(exponents), ROW, dtype)


def _encode_e5m6(x: Float[Array, "*batch columns"]) -> tuple[Array, ...]:
    tiles = in_tiles(_rows(x).astype(jnp.float32), ROW)
    magnitude = jnp.where(jnp.isnan(tiles), 0, jnp.abs(tiles))
    amax = jnp.max(magnitude, axis=(-3, -1))
    scale = scale_of(amax, jnp.float32(E5M6_MAX), power_of_two=True)
    codes = to_e5m6(tiles * (1 / scale)[..., :, None, :, None])
    return pack_e5m6(from_tiles(codes, x.shape)), to_exponents(scale)


def _decode_e5m6(arrays: tuple[Array, ...], dtype: DTypeLike) -> Array:
    packed, exponents = arrays
    values = from_e5m6(unpack_e5m6(packed))
    return dequantize(values, from_exponents(exponents), ROW, dtype)


def _rows(x: Float[Array, "*batch columns"]) -> Float[Array, "*batch columns"]:
    assert x.ndim >= 2, "a tensor of rows"
    return x


E4M3_ROWS = Codec("E4M3, 1x128, FP32 scales", ("", ":scale"), _encode_rows, _decode_rows)
E4M3_POWER_OF_TWO = Codec(
    "E4M3, 1x128, power-of-two scales", ("", ":exponent"), _encode_exponents, _decode_exponents
)
E5M6_POWER_OF_TWO = Codec(
    "E5M6, 1x128, power-of-two scales", ("", ":exponent"), _encode_e5m6, _decode_e5m6
)


def to_exponents(scale: Float[Array, "*tiles"]) -> UInt8[Array, "*tiles"]:
    """Power-of-two scales as their biased exponents (ue8m0)."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
    return (bits >> 23).astype(jnp.uint8)


def from_exponents(exponents: UInt8[Array, "*tiles"]) -> Float[Array, "*tiles"]:
    """FP32 scales of biased exponents 1 to 254."""
    return jax.lax.bitcast_convert_type(exponents.astype(jnp.uint32) << 23, jnp.float32)


def to_e5m6(x: Float[Array, "*dims"]) -> UInt16[Array, "*dims"]:
    """12-bit codes of the nearest values, ties to even; above the largest value, the largest."""
    clipped = jnp.clip(x.astype(jnp.float32), -E5M6_MAX, E5M6_MAX)
    # Half of the last place that is left, and to even: on the bits of FP32 for normal numbers, by
    # adding and taking away a large number for denormal ones.
    bits = jax.lax.bitcast_convert_type(clipped, jnp.uint32)
    dropped = 23 - 6
    rounded = bits + jnp.uint32((1 << (dropped - 1)) - 1) + ((bits >> dropped) & 1)
    normal = jax.lax.bitcast_convert_type(
        rounded & jnp.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF), jnp.float32
    )
    steps = jnp.round(clipped * (1 / E5M6_SMALLEST))  # round() is to even
    value = jnp.where(jnp.abs(clipped) < 2.0**-14, steps * E5M6_SMALLEST, normal)
    value = jnp.where(jnp.isnan(x), jnp.nan, value)
    half = jax.lax.bitcast_convert_type(value.astype(jnp.float16), jnp.uint16)
    return half >> 4


def from_e5m6(codes: UInt16[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Their FP32 values."""
    return jax.lax.bitcast_convert_type(codes << 4, jnp.float16).astype(jnp.float32)


def pack_e5m6(codes: UInt16[Array, "*batch columns"]) -> UInt8[Array, "*batch bytes"]:
    """Two codes in three bytes: the high bytes of all, then the low halves, two a byte.

    Raises ValueError for an odd number of columns.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} columns of E5M6, expected an even number")
    high, low = (codes >> 4).astype(jnp.uint8), (codes & 15).astype(jnp.uint8)
    first, second = low[..., : low.shape[-1] // 2], low[..., low.shape[-1] // 2 :]
    return jnp.concatenate([high, first << 4 | second], axis=-1)


def unpack_e5m6(packed: UInt8[Array, "*batch bytes"]) -> UInt16[Array, "*batch columns"]:
    """The codes that `pack_e5m6` was given."""
    columns = packed.shape[-1] * 2 // 3
    high, low = packed[..., :columns], packed[..., columns:]
    low = jnp.concatenate([low >> 4, low & 15], axis=-1)
    return high.astype(jnp.uint16) << 4 | low.astype(jnp.uint16)
