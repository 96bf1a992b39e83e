"""Quantisation in tiles by the largest magnitude of each: the definition.

    scale = amax * (1 / largest value of the dtype), in FP32    (power of two: rounded up to one)
    value = x * (1 / scale), to the nearest value of the dtype, ties to even

Never NaN but where x is: a tile of zeros has scale 1, and magnitudes above 1.75 * 2^127 count as
that, which every dtype here holds exactly, and BF16 too. FP32 values below 2^-126 count as zero
where the device flushes them, as XLA's CPU does.
Source: DeepSeek-V3 Technical Report §3.3.2; the ue8m0 rounding is DeepSeek-V3.1's.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

E4M3 = jnp.float8_e4m3fn
BLOCK = 128
"""Values along one side of a tile."""
MOST = 1.75 * 2.0**127
"""The largest magnitude of a tile."""


def quantize(
    x: Float[Array, "*batch rows columns"],
    tile: tuple[int, int] = (1, BLOCK),
    *,
    dtype: DTypeLike = E4M3,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch rows columns"], Float[Array, "*batch row_tiles column_tiles"]]:
    """Values in `dtype` and FP32 scales, one for each tile of the last two dims.

    The last tile of a row or column may be ragged; it counts as filled up with zeros.
    """
    tiles = in_tiles(x.astype(jnp.float32), tile)
    largest = jnp.float32(jnp.finfo(dtype).max)
    magnitude = jnp.where(jnp.isnan(tiles), 0, jnp.abs(tiles))
    scale = scale_of(jnp.max(magnitude, axis=(-3, -1)), largest, power_of_two)
    inverse = (1 / scale)[..., :, None, :, None]
    values = jnp.clip(tiles * inverse, -largest, largest).astype(dtype)
    return from_tiles(values, x.shape), scale


def scale_of(
    amax: Float[Array, "*tiles"], largest: Float[Array, ""], power_of_two: bool
) -> Float[Array, "*tiles"]:
    """The scale of tiles whose largest magnitudes are `amax`: a normal FP32 number."""
    scale = jnp.minimum(amax, MOST) * (1 / largest)
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    if power_of_two:
        # The exponent, and one more where there is a mantissa.
        bits = jax.lax.bitcast_convert_type(scale, jnp.uint32)
        exponent = (bits + jnp.uint32(0x7FFFFF)) & jnp.uint32(0x7F800000)
        scale = jax.lax.bitcast_convert_type(exponent, jnp.float32)
    return jnp.where(amax == 0, 1.0, scale)


def dequantize(
    values: Float[Array, "*batch rows columns"],
    scale: Float[Array, "*batch row_tiles column_tiles"],
    tile: tuple[int, int] = (1, BLOCK),
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*batch rows columns"]:
    """values * scale, computed in FP32, in `dtype`."""
    tiles = in_tiles(values, tile).astype(jnp.float32) * scale[..., :, None, :, None]
    return from_tiles(tiles.astype(dtype), values.shape)


def in_tiles(
    x: Float[Array, "*batch rows columns"], tile: tuple[int, int]
) -> Float[Array, "*batch row_tiles height column_tiles width"]:
    """`x` filled up with zeros to whole tiles, tile by tile."""
    *batch, rows, columns = x.shape
    (height, width), widths = tile, [(0, 0)] * len(batch)
    if rows % height or columns % width:
        x = jnp.pad(x, [*widths, (0, -rows % height), (0, -columns % width)])
    return x.reshape(*batch, -(-rows // height), height, -(-columns // width), width)


def from_tiles(
    tiles: Shaped[Array, "*batch row_tiles height column_tiles width"], shape: tuple[int, ...]
) -> Shaped[Array, "*batch rows columns"]:
    """What `in_tiles` was given, of that shape."""
    *batch, row_tiles, height, column_tiles, width = tiles.shape
    whole = tiles.reshape(*batch, row_tiles * height, column_tiles * width)
    return whole[..., : shape[-2], : shape[-1]]
