"""LogFMT-n: a sign and n-1 bits of logarithm, evenly spaced between a 1x128 tile's limits.

    code 0          zero
    code K >= 1     2 ** (log_min + step * (K - 1)),  step = (log_max - log_min) / (2**(n-1) - 2)

The code is the nearest in linear space. With t = (log2|x| - log_min) / step, the middle between two
codes lies m = log2((1 + 2**step) / 2) / step above the lower: K = floor(t + 2 - m). A magnitude
below code 1 is code 1 down to the middle to where a code one step lower would be, then zero.

The limits travel as BF16: a tile's largest magnitude rounded up and its smallest rounded down, so
the tile lies between them (BF16 values round to themselves). The smallest is raised to 2**-32 of
the largest and to 2**-126, FP32's least normal number; magnitudes below 2**-126 count as zero.
Infinity, and all above BF16's largest number, count as that number. A tile with a NaN has NaN
limits and decodes to NaN throughout; no other tile decodes to any.

Source: Insights into DeepSeek-V3 §3.2; the closed form, the clip and the order of bits are DeepEP's
(internode_ll.cu). DeepEP sends tiles that are constant or reach 1 as plain BF16; here every tile is
encoded, so sizes are static. A constant tile has step 0, and comes back exactly in BF16.
"""

from functools import partial, reduce
from operator import or_
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt, UInt8, UInt16

TILE = 128
"""Values that share their limits."""
GROUP = 16
"""Values that are packed together, in 16-bit words: their magnitudes, then their signs."""
METADATA_BYTES = 4
"""Of a tile: its largest and its smallest magnitude in BF16."""
MIN_BITS, MAX_BITS = 4, 16

# FP32 as integers: magnitudes keep their order, NaN is above all, and nothing flushes subnormals.
TINY = 0x00800000  # 2**-126
LARGEST = 0x7F7F0000  # BF16's largest number
INFINITY = 0x7F800000
NAN = 0x7FC00000
CLIP = 32 << 23  # a factor of 2**32


class Encoded(NamedTuple):
    """Codes and the limits of their tiles."""

    codes: UInt[Array, "*batch columns"]
    """sign << (bits - 1) | code; uint8 up to 8 bits, else uint16."""
    log_min: Float[Array, "*batch tiles"]
    """log2 of code 1, FP32."""
    log_max: Float[Array, "*batch tiles"]
    """log2 of the largest code, FP32."""


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of a packed row: 164 for each 128 columns with 10 bits, 132 with 8."""
    _check(columns, bits)
    return columns // TILE * (TILE * bits // 8 + METADATA_BYTES)


def require_packed(row_bytes: int, columns: int, bits: int) -> None:
    """ValueError for a packed row that has not as many bytes as it should."""
    if row_bytes != packed_bytes(columns, bits):
        rule = f"{packed_bytes(columns, bits)} for {columns} columns of {bits} bits"
        raise ValueError(f"packed: {row_bytes} bytes in a row, not {rule}")


def _check(columns: int, bits: int) -> None:
    """ValueError for a row that is not whole tiles, or for bits outside 4..16."""
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits: {bits} is not in {MIN_BITS}..{MAX_BITS}")
    if columns % TILE:
        raise ValueError(f"columns: {columns}, the last dimension, is not a multiple of {TILE}")


@partial(jax.jit, static_argnames="bits")
def encode(x: Float[Array, "*batch columns"], bits: int) -> Encoded:
    """`x` in `bits` bits a value. The sign of a zero is kept."""
    *batch, columns = x.shape
    _check(columns, bits)
    tiles = x.astype(jnp.float32).reshape(*batch, columns // TILE, TILE)
    stored = jax.lax.bitcast_convert_type(tiles, jnp.int32)
    magnitude = stored & 0x7FFFFFFF
    magnitude = jnp.where(magnitude < TINY, 0, magnitude)
    magnitude = jnp.minimum(magnitude, NAN)  # any NaN, so that rounding up does not overflow
    rounded_down = jnp.min(magnitude, axis=-1) & ~0xFFFF
    rounded_up = (jnp.max(magnitude, axis=-1) + 0xFFFF) & ~0xFFFF
    smallest, largest = clip_limits(rounded_down, rounded_up)
    log_min, log_max = _log_limits(smallest, largest)

    step = (log_max - log_min) / steps(bits)
    step = jnp.where(step > 0, step, 1)  # without steps every code but zero is 1
    # log2((1 + 2**step) / 2) / step, also where 2**step rounds to 1
    exponent = step * jnp.log(jnp.float32(2))
    middle = jnp.log1p(jnp.expm1(exponent) / 2) / exponent
    log = jnp.log2(jax.lax.bitcast_convert_type(magnitude, jnp.float32))
    first, step, rounding = _once_per_tile(log_min, step, 2 - middle)
    code = jnp.floor((log - first) / step + rounding)
    # Where steps are fine the logarithm's rounding must not make the smallest magnitude zero.
    least = (magnitude >= smallest[..., None]).astype(jnp.float32)
    # The comparison is false for NaN, whose conversion is undefined.
    code = jnp.where(code > least, jnp.minimum(code, steps(bits) + 1), least).astype(jnp.int32)
    codes = code | jnp.where(stored < 0, 1 << (bits - 1), 0)
    return Encoded(codes.astype(_code_dtype(bits)).reshape(x.shape), log_min, log_max)


@partial(jax.jit, static_argnames=("bits", "dtype"))
def decode(
    encoded: Encoded, bits: int, dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch columns"]:
    """The values, computed in FP32, in `dtype`; at most its largest number."""
    _check(encoded.codes.shape[-1], bits)
    log_min, log_max = encoded.log_min, encoded.log_max
    first, step = _once_per_tile(log_min, (log_max - log_min) / steps(bits))
    codes = encoded.codes.reshape(*log_min.shape, TILE).astype(jnp.int32)
    code = codes & ((1 << (bits - 1)) - 1)
    magnitude = jnp.exp2(first + step * (code - 1).astype(jnp.float32))
    smallest, largest = jnp.finfo(jnp.float32).tiny, float(jnp.finfo(dtype).max)
    magnitude = jnp.where(code == 0, 0, jnp.clip(magnitude, smallest, largest))
    magnitude = jnp.where(jnp.isnan(step), jnp.nan, magnitude)
    values = jnp.where(codes >> (bits - 1) == 1, -magnitude, magnitude)
    return values.astype(dtype).reshape(encoded.codes.shape)


@partial(jax.jit, static_argnames="bits")
def pack(encoded: Encoded, bits: int) -> UInt8[Array, "*batch bytes"]:
    """`packed_bytes` for each row: tile by tile 8 groups of codes, then the largest and the
    smallest magnitude in BF16.

    A group is 16 magnitudes of bits - 1 bits and 16 signs, the lowest bit and byte first.
    """
    *batch, columns = encoded.codes.shape
    _check(columns, bits)
    codes = jax.lax.optimization_barrier(encoded.codes)  # once, not for each word
    groups = codes.reshape(*batch, columns // TILE, TILE // GROUP, GROUP)
    words = _to_words(groups.astype(jnp.uint32), bits - 1).reshape(
        *groups.shape[:-2], TILE // GROUP * bits
    )
    limits = jnp.stack([_to_bfloat16(encoded.log_max), _to_bfloat16(encoded.log_min)], axis=-1)
    tiles = jnp.concatenate([words, limits], axis=-1)
    in_bytes = jnp.stack([tiles & 0xFF, tiles >> 8], axis=-1).astype(jnp.uint8)
    return in_bytes.reshape(*batch, packed_bytes(columns, bits))


@partial(jax.jit, static_argnames=("columns", "bits"))
def unpack(packed: UInt8[Array, "*batch bytes"], columns: int, bits: int) -> Encoded:
    """What `pack` was given."""
    *batch, row_bytes = packed.shape
    require_packed(row_bytes, columns, bits)
    words = (columns // TILE, packed_bytes(TILE, bits) // 2)
    in_bytes = packed.reshape(*batch, *words, 2).astype(jnp.uint16)
    tiles = jax.lax.optimization_barrier(in_bytes[..., 0] | (in_bytes[..., 1] << 8))
    groups = tiles[..., :-2].reshape(*tiles.shape[:-1], TILE // GROUP, bits)
    codes = _from_words(groups.astype(jnp.uint32), bits - 1).astype(_code_dtype(bits))
    codes = jax.lax.optimization_barrier(codes)  # once, not for each user
    limits = tiles[..., -2:].astype(jnp.int32) << 16
    log_min, log_max = _log_limits(*clip_limits(limits[..., 1], limits[..., 0]))
    return Encoded(codes.reshape(*batch, columns), log_min, log_max)


def _once_per_tile(*values: Float[Array, "*tiles"]) -> list[Float[Array, "*tiles 1"]]:
    """Ready to meet a tile's values. Without the barrier XLA computes them again for each value."""
    return [jax.lax.optimization_barrier(value)[..., None] for value in values]


def _to_words(codes: UInt[Array, "*tiles 16"], width: int) -> UInt16[Array, "*tiles words"]:
    """`width` words of 16 magnitudes laid end to end, `width` bits each, and one of their signs."""
    lanes, starts = np.arange(GROUP, dtype=np.uint32), GROUP * np.arange(width)
    magnitudes = codes & ((1 << width) - 1)
    first = starts // width
    pieces = 1 + np.max((starts + GROUP - 1) // width - first)
    words = []
    for lane in (first + piece for piece in range(pieces)):
        # What is not of this word comes to lie above its 16 bits, or is shifted out below.
        place = lane * width - starts
        up, down = np.maximum(place, 0).astype(np.uint32), np.maximum(-place, 0).astype(np.uint32)
        words.append(magnitudes[..., np.minimum(lane, GROUP - 1)] << up >> down)
    signs = jnp.sum((codes >> width) << lanes, axis=-1, keepdims=True, dtype=jnp.uint32)
    return jnp.concatenate([reduce(or_, words), signs], axis=-1).astype(jnp.uint16)


def _from_words(words: UInt[Array, "*tiles words"], width: int) -> UInt[Array, "*tiles 16"]:
    """What `_to_words` was given: a magnitude lies in one word or in two that follow each other."""
    lanes = np.arange(GROUP, dtype=np.uint32)
    pairs = words | (jnp.roll(words, -1, axis=-1) << GROUP)
    magnitudes = pairs[..., lanes * width // GROUP] >> (lanes * width % GROUP)
    return (magnitudes & ((1 << width) - 1)) | ((words[..., -1:] >> lanes) & 1) << width


def clip_limits(
    smallest: Int[Array, "*tiles"], largest: Int[Array, "*tiles"]
) -> tuple[Int[Array, "*tiles"], Int[Array, "*tiles"]]:
    """The magnitudes of code 1 and of the largest code; both NaN if the largest is."""
    clipped = jnp.clip(largest, TINY, LARGEST)
    smallest = jnp.clip(smallest, jnp.maximum(clipped - CLIP, TINY), clipped)
    is_nan = largest > INFINITY
    return jnp.where(is_nan, NAN, smallest), jnp.where(is_nan, NAN, clipped)


def _log_limits(
    smallest: Int[Array, "*tiles"], largest: Int[Array, "*tiles"]
) -> tuple[Float[Array, "*tiles"], Float[Array, "*tiles"]]:
    """log_min and log_max of `clip_limits`, the same wherever they are computed: without the
    barrier a logarithm's last product may be fused with what uses it, and rounded otherwise.
    """
    floats = [jax.lax.bitcast_convert_type(bound, jnp.float32) for bound in (smallest, largest)]
    log_min, log_max = jax.lax.optimization_barrier([jnp.log2(bound) for bound in floats])
    return log_min, log_max


def _to_bfloat16(log: Float[Array, "*tiles"]) -> UInt16[Array, "*tiles"]:
    """The bits of the BF16 number whose log2 this is."""
    nearest = (jax.lax.bitcast_convert_type(jnp.exp2(log), jnp.uint32) + 0x8000) >> 16
    return jnp.where(jnp.isnan(log), NAN >> 16, nearest).astype(jnp.uint16)


def steps(bits: int) -> int:
    """Between the smallest and the largest code."""
    return 2 ** (bits - 1) - 2


def _code_dtype(bits: int) -> DTypeLike:
    return jnp.uint8 if bits <= 8 else jnp.uint16
