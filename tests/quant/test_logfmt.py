"""LogFMT-n against a search through all codes in float64, closed forms and bytes packed by hand."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from dsv3_jax.quant.logfmt import round_trip
from dsv3_kernels.logfmt.reference import TILE, Encoded, decode, encode, pack, packed_bytes, unpack

ALL_BITS = range(4, 17)
ROWS, COLUMNS = 2, 3 * TILE
"""One shape for most tests: each is compiled for every number of bits."""
LOG_ERROR = 2e-5
"""Relative, of a magnitude that went through FP32 logarithms of up to 127: 1.2e-5."""
TINY = 2.0**-126
BFLOAT16 = np.arange(0x0080, 0x7F80, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
"""All positive normal numbers, ascending."""
SPECIAL = [0.0, -0.0, 1e-45, -1e-39, TINY, -TINY, 1.0, 3e38, 3.4e38, -3.4028234e38, np.inf, -np.inf]


def normal(shape: tuple[int, ...] = (ROWS, COLUMNS), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def magnitudes_by_hand(x: np.ndarray) -> np.ndarray:
    """As they count: subnormals are zero, nothing is above BF16's largest."""
    magnitude = np.minimum(np.abs(np.asarray(x, np.float64)), BFLOAT16[-1])
    return np.where(magnitude < TINY, 0, magnitude)


def limits_by_hand(tile: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest magnitude that have codes."""
    magnitude = magnitudes_by_hand(tile)
    largest = BFLOAT16[np.searchsorted(BFLOAT16, np.max(magnitude), side="left")]
    below = np.searchsorted(BFLOAT16, np.min(magnitude), side="right") - 1
    smallest = BFLOAT16[below] if below >= 0 else 0.0
    return max(smallest, largest / 2**32, TINY), largest


def values_by_hand(smallest: float, largest: float, bits: int) -> np.ndarray:
    """What the codes from 1 on stand for."""
    return np.exp2(np.linspace(np.log2(smallest), np.log2(largest), 2 ** (bits - 1) - 1))


def excess_error(tile: np.ndarray, codes: np.ndarray, bits: int) -> float:
    """How much further than the nearest the chosen codes are, relative to the magnitudes.

    Instead of zero the values hold what zero is taken from: one step below code 1, or zero itself
    where there is no step.
    """
    smallest, largest = limits_by_hand(tile)
    values = values_by_hand(smallest, largest, bits)
    below = 0.0 if smallest == largest else smallest**2 / values[1]
    magnitude = magnitudes_by_hand(tile)[:, None]
    distance = np.abs(magnitude - np.concatenate([[below], values]))
    chosen = np.take_along_axis(distance, codes[:, None].astype(np.int64), axis=1)[:, 0]
    return float(np.max((chosen - distance.min(axis=1)) / np.maximum(magnitude[:, 0], TINY)))


def split(codes: jax.Array, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs and codes."""
    codes = np.asarray(codes).astype(np.int64)
    return codes >> (bits - 1), codes & (2 ** (bits - 1) - 1)


def in_tiles(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).reshape(-1, TILE)


def signal_to_noise(x: np.ndarray, found: ArrayLike) -> float:
    """In dB."""
    x, found = np.asarray(x, np.float64), np.asarray(found, np.float64)
    return float(10 * np.log10(np.sum(x**2) / np.sum((x - found) ** 2)))


def a_tile(rng, low: int, width: int, specials: list[float]) -> np.ndarray:
    exponents = rng.uniform(low, min(low + width, 127.99), TILE)
    tile = np.where(rng.random(TILE) < 0.5, -1, 1) * np.exp2(exponents)
    for value in specials:
        tile[rng.integers(TILE)] = value
    return tile.astype(np.float32)


@st.composite
def rows_of_tiles(draw) -> np.ndarray:
    """Magnitudes of any range, with zeros, subnormals, infinities and constants among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tiles = [
        a_tile(
            rng,
            draw(st.integers(-140, 127)),
            draw(st.sampled_from([0, 1, 8, 31, 33, 120])),
            draw(st.lists(st.sampled_from(SPECIAL), max_size=4)),
        )
        for _ in range(ROWS * COLUMNS // TILE)
    ]
    x = np.reshape(tiles, (ROWS, COLUMNS))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if draw(st.booleans()) else x


EDGES = np.empty((6, TILE), np.float32)
"""Zeros; constants that are in BF16 and not; the least and the largest; neighbours in FP32."""
EDGES[:5] = np.float32([[0.0], [-0.3], [0.302734375], [TINY], [3.4e38]])
EDGES[5] = np.resize(np.float32([1 + 2**-23, 1]), TILE) * np.float32(2.0**-100)


@settings(max_examples=60)
@given(rows_of_tiles(), st.sampled_from(ALL_BITS))
@example(EDGES.reshape(ROWS, COLUMNS), 4)
@example(EDGES.reshape(ROWS, COLUMNS), 10)
@example(EDGES.reshape(ROWS, COLUMNS), 16)
def test_every_code_is_the_nearest_in_linear_space(x, bits):
    encoded = encode(jnp.asarray(x), bits)
    signs, codes = split(encoded.codes, bits)
    np.testing.assert_array_equal(signs, np.signbit(x))
    np.testing.assert_array_equal(codes[magnitudes_by_hand(x) == 0], 0)
    decoded = np.asarray(decode(encoded, bits), np.float64)
    for tile, chosen, found in zip(*map(in_tiles, (x, codes, decoded)), strict=True):
        assert excess_error(tile, chosen, bits) < LOG_ERROR
        values = np.append(0, values_by_hand(*limits_by_hand(tile), bits))[chosen]
        np.testing.assert_allclose(found, np.copysign(values, tile), rtol=LOG_ERROR)


@pytest.mark.parametrize("bits", [4, 8])
def test_log_space_rounding_would_be_detected(bits):
    """The same assertion fails for the code whose logarithm is nearest."""
    tile = normal((TILE,))
    tile[0] = 1e-9
    smallest, largest = limits_by_hand(tile)
    step = np.log2(largest / smallest) / (2 ** (bits - 1) - 2)
    log_space = np.rint(np.log2(np.abs(tile) / smallest) / step) + 1
    assert excess_error(tile, log_space, bits) > 10 * LOG_ERROR


@pytest.mark.parametrize("bits", ALL_BITS)
def test_every_code_decodes_to_its_closed_form(bits):
    limits = np.array([[-126, -126], [-126, -94], [-9, 2], [0, 0], [-31.5, 0.5], [95, 127]])
    every = np.arange(2**bits)
    columns = max(TILE, 2**bits)
    tiles_in_row = columns // TILE
    encoded = Encoded(
        jnp.asarray(np.resize(every, (len(limits), columns)), jnp.uint16),
        jnp.asarray(np.repeat(limits[:, :1], tiles_in_row, axis=1), jnp.float32),
        jnp.asarray(np.repeat(limits[:, 1:], tiles_in_row, axis=1), jnp.float32),
    )
    found = np.asarray(decode(encoded, bits), np.float64)[:, : 2**bits]
    magnitude = np.stack([np.append(0, values_by_hand(*2.0**pair, bits)) for pair in limits])
    np.testing.assert_allclose(found, np.hstack([magnitude, -magnitude]), rtol=LOG_ERROR)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decoded_in_float32_then_cast_within_the_range_of_the_dtype(dtype):
    x = normal()
    x[1] *= 1e4
    x[1, 0] = 65519  # rounds up to 2**16 in BF16
    encoded = encode(jnp.asarray(x), 10)
    largest = float(jnp.finfo(dtype).max)
    expected = jnp.clip(decode(encoded, 10), -largest, largest).astype(dtype)
    found = decode(encoded, 10, dtype)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    assert np.all(np.isfinite(np.asarray(found, np.float32)))


@pytest.mark.parametrize(("bits", "expected"), [(8, 37.0), (10, 49.2)])
def test_signal_to_noise_of_normal_values(bits, expected):
    """Of BF16 values, where the tile's limits are exact."""
    x = normal((4096, TILE)).astype(ml_dtypes.bfloat16)
    found = decode(encode(jnp.asarray(x), bits), bits, jnp.float32)
    assert abs(signal_to_noise(x, found) - expected) < 0.2
    # FP32's largest value, which holds a twentieth of a tile's energy, has no code of its own.
    x = normal((4096, TILE))
    assert -0.3 < signal_to_noise(x, round_trip(jnp.asarray(x), bits)) - expected < 0.2


def test_each_bit_halves_the_error():
    batches = normal((25, ROWS, COLUMNS))

    def quality(bits: int) -> float:
        return signal_to_noise(batches, [decode(encode(x, bits), bits) for x in batches])

    gains = np.diff([quality(bits) for bits in ALL_BITS])
    assert np.all(gains > 5)
    np.testing.assert_allclose(gains[4:], 20 * np.log10(2), atol=0.3)


def test_constants_and_large_magnitudes_come_back():
    """Where DeepEP sends plain BF16: a tile of one magnitude, and magnitudes from 1 up."""
    constants = np.repeat([1.0, 0.302734375, TINY, BFLOAT16[-1], 1.25e30, 7.0], TILE)
    x = np.copysign(constants.reshape(ROWS, COLUMNS), normal()).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(round_trip(jnp.asarray(x), 10)), x)
    powers = 2.0 ** np.resize(np.arange(7), (ROWS, COLUMNS))  # 64 is 6 steps of n=4 above 1
    np.testing.assert_allclose(round_trip(jnp.asarray(powers, jnp.float32), 4), powers, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_nan_shows_in_its_tile_only(dtype):
    x = normal()
    x[0, :2] = np.int32(-1).view(np.float32), np.inf  # the NaN with all bits set
    x[0, TILE : TILE + 2] = np.inf, -np.inf
    x[1, :TILE] = 0
    encoded = encode(jnp.asarray(x, dtype), 10)
    for received in (encoded, unpack(pack(encoded, 10), COLUMNS, 10)):
        found = np.asarray(decode(received, 10, dtype), np.float64)
        assert np.all(np.isnan(found[0, :TILE]))
        assert np.all(np.isfinite(found[0, TILE:])) and np.all(np.isfinite(found[1]))
        np.testing.assert_array_equal(found[1, :TILE], 0)
        infinite = np.array([BFLOAT16[-1], -BFLOAT16[-1]])
        np.testing.assert_allclose(found[0, TILE : TILE + 2], infinite, rtol=LOG_ERROR)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_unpack_gives_back_what_was_packed(bits):
    x = normal(seed=bits)
    x[0, :TILE], x[0, TILE + 7], x[1, :TILE], x[1, -1] = 0, 0, 0.3, np.nan
    x[1, TILE : 2 * TILE] *= 1e-37
    encoded = encode(jnp.asarray(x), bits)
    packed = pack(encoded, bits)
    assert packed.shape == (ROWS, 3 * (16 * bits + 4)) == (ROWS, packed_bytes(COLUMNS, bits))
    for found, expected in zip(unpack(packed, COLUMNS, bits), encoded, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


def test_no_rows_and_rows_of_any_rank():
    empty = jnp.zeros((0, TILE))
    packed = pack(encode(empty, 8), 8)
    assert packed.shape == (0, 132)
    assert decode(unpack(packed, TILE, 8), 8).shape == (0, TILE)
    x = jnp.asarray(normal((2, 3, 2 * TILE)))
    packed = pack(encode(x, 8), 8)
    np.testing.assert_array_equal(packed[1, 2], pack(encode(x[1, 2], 8), 8))
    np.testing.assert_array_equal(unpack(packed, 2 * TILE, 8).codes, encode(x, 8).codes)


def test_bytes_on_the_wire():
    assert packed_bytes(7168, 10) == 56 * 164 and packed_bytes(7168, 8) == 56 * 132
    assert round(100 * packed_bytes(7168, 10) / (2 * 7168), 2) == 64.06


@pytest.mark.parametrize("bits", ALL_BITS)
def test_the_bits_of_packed_tiles(bits):
    """Each group as one whole number; the limits 0.75 and 2**-31 in BF16."""
    codes = np.random.default_rng(bits).integers(2**bits, size=(ROWS, COLUMNS))
    expected = b""
    for tile in in_tiles(codes):
        for group in tile.reshape(-1, 16).tolist():
            number = 0
            for lane, code in enumerate(group):
                number |= (code % 2 ** (bits - 1)) << (lane * (bits - 1))
                number |= (code >> (bits - 1)) << (16 * (bits - 1) + lane)
            expected += number.to_bytes(2 * bits, "little")
        expected += bytes.fromhex("403f 0030")
    log_min, log_max = (np.full((ROWS, 3), np.log2(x), np.float32) for x in (2.0**-31, 0.75))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    packed = pack(Encoded(jnp.asarray(codes, dtype), log_min, log_max), bits)
    assert np.asarray(packed).tobytes() == expected


def test_a_tile_packed_by_hand():
    """Lanes 0..7, 0..7 of 3 bits are octal 76543210; every second sign is set."""
    codes = np.array([lane % 8 + 8 * (lane % 2) for lane in range(TILE)])
    encoded = Encoded(jnp.asarray(codes, jnp.uint8), jnp.array([-1.0]), jnp.array([1.0]))
    group = bytes.fromhex("88c6fa 88c6fa aaaa")
    assert np.asarray(pack(encoded, 4)).tobytes() == 8 * group + bytes.fromhex("0040 003f")


def test_limits_of_a_foreign_sender_are_clipped_as_ours():
    """DeepEP sends a smallest magnitude of zero; the receiver takes it as 2**-32 of the largest."""
    x = normal()
    x[:, ::TILE] = 0
    encoded = encode(jnp.asarray(x), 10)
    packed = np.array(pack(encoded, 10))
    packed[1, -2:] = 0
    np.testing.assert_array_equal(unpack(packed, COLUMNS, 10).log_min, encoded.log_min)
    np.testing.assert_allclose(encoded.log_min, encoded.log_max - 32, rtol=1e-6)


def test_compiled_together_the_same():
    x = jnp.asarray(normal((64, TILE)))

    def there_and_back(x):
        return decode(unpack(pack(encode(x, 10), 10), TILE, 10), 10)

    apart = there_and_back(x)
    np.testing.assert_array_equal(jax.jit(there_and_back)(x), apart)
    np.testing.assert_array_equal(jax.jit(round_trip, static_argnums=1)(x, 10), apart)
    np.testing.assert_array_equal(jax.vmap(there_and_back)(x), apart)


def test_not_compiled_the_same_but_for_ties():
    """Compiled, a product may be fused with a sum, so a tie may tip."""
    x = normal()
    with jax.disable_jit():
        encoded = encode(jnp.asarray(x), 10)
        decoded = decode(encoded, 10)
    _, codes = split(encoded.codes, 10)
    for tile, chosen in zip(in_tiles(x), in_tiles(codes), strict=True):
        assert excess_error(tile, chosen, 10) < LOG_ERROR
    assert np.mean(codes != split(encode(jnp.asarray(x), 10).codes, 10)[1]) < 0.005
    np.testing.assert_allclose(decoded, decode(encoded, 10), rtol=LOG_ERROR)


@pytest.mark.parametrize("bits", [8, 10])
def test_bfloat16_is_encoded_as_the_same_values_in_float32(bits):
    x = jnp.asarray(normal(), jnp.bfloat16)
    for found, expected in zip(encode(x, bits), encode(x.astype(jnp.float32), bits), strict=True):
        np.testing.assert_array_equal(found, expected)
    found = round_trip(x, bits)
    assert found.dtype == jnp.bfloat16
    before, after = (in_tiles(values.astype(jnp.float32)) for values in (x, found))
    largest = np.argmax(np.abs(before), axis=1)
    every = np.arange(len(largest))
    np.testing.assert_array_equal(after[every, largest], before[every, largest])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_passes_straight_through(dtype):
    x, cotangent = jnp.asarray(normal(), dtype), jnp.asarray(normal(seed=1), dtype)
    value, pullback = jax.vjp(functools.partial(round_trip, bits=8), x)
    (gradient,) = pullback(cotangent)
    assert value.dtype == gradient.dtype == dtype
    assert np.any(np.asarray(value != x))
    np.testing.assert_array_equal(np.asarray(gradient), np.asarray(cotangent))


@pytest.mark.parametrize(
    ("columns", "bits", "message"),
    [
        (100, 10, "columns: 100, the last dimension, is not a multiple of 128"),
        (128, 3, "bits: 3 is not in 4..16"),
        (128, 17, "bits: 17 is not in 4..16"),
    ],
)
def test_what_cannot_be_encoded_is_named(columns, bits, message):
    with pytest.raises(ValueError, match=message):
        encode(jnp.zeros((2, columns)), bits)
    with pytest.raises(ValueError, match=message):
        packed_bytes(columns, bits)


def test_a_packed_row_of_wrong_size_is_named():
    with pytest.raises(ValueError, match="packed: 164 bytes in a row, not 132 for 128 columns of"):
        unpack(jnp.zeros((2, 164), jnp.uint8), 128, 8)
