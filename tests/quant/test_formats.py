"""E5M6 against a table of all its codes, and what waits or travels by bytes and by error."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsv3_jax.quant.formats import (
    E4M3_MAX,
    E4M3_POWER_OF_TWO,
    E4M3_ROWS,
    E5M2_MAX,
    E5M6_MAX,
    E5M6_POWER_OF_TWO,
    E5M6_SMALLEST,
    PLAIN,
    Codec,
    from_e5m6,
    from_exponents,
    pack_e5m6,
    to_e5m6,
    to_exponents,
    unpack_e5m6,
)
from tests.kernels.test_quantize import (
    E4M3,
    E5M2,
    ROW,
    SPECIAL_ROWS,
    TINY,
    assert_same,
    dequantised_by_hand,
    nearest,
    normal,
    quantised_by_hand,
)


def value_of(code: int) -> float:
    """By sign, five bits of exponent with bias 15, and six of mantissa."""
    sign, exponent, mantissa = code >> 11, code >> 6 & 31, code & 63
    if exponent == 31:
        magnitude = np.nan if mantissa else np.inf
    elif exponent == 0:
        magnitude = mantissa / 64 * 2.0**-14
    else:
        magnitude = (1 + mantissa / 64) * 2.0 ** (exponent - 15)
    return -magnitude if sign else magnitude


E5M6_VALUES = np.array([value_of(code) for code in range(4096)])
E5M6 = E5M6_VALUES[: 31 * 64]
"""The finite ones without a sign, ascending."""

CODECS = [E4M3_ROWS, E4M3_POWER_OF_TWO, E5M6_POWER_OF_TWO]
MIXED = np.concatenate([SPECIAL_ROWS, normal((14, 200))])
"""One shape for most tests: each is compiled for every codec."""
IN_RANGE = [0, 2, 4, 7, *range(10, 24)]
"""Rows whose values neither overflow nor become subnormal."""
BITS_OF = {E4M3_ROWS.name: (8, 32), E4M3_POWER_OF_TWO.name: (8, 8), E5M6_POWER_OF_TWO.name: (12, 8)}
"""Of a value and of a tile's scale."""


def codec_cases(codecs: list[Codec]):
    return pytest.mark.parametrize("codec", codecs, ids=lambda codec: codec.name)


def decoded_by_hand(codec: Codec, x: np.ndarray) -> np.ndarray:
    magnitudes = E5M6 if codec is E5M6_POWER_OF_TWO else E4M3
    values, scale = quantised_by_hand(x, ROW, magnitudes, codec is not E4M3_ROWS)
    return dequantised_by_hand(values, scale, ROW)


@functools.partial(jax.jit, static_argnums=0)
def encode(codec: Codec, x: jax.Array) -> tuple[jax.Array, ...]:
    return codec.encode(x)


@functools.partial(jax.jit, static_argnums=(0, 2))
def there_and_back(codec: Codec, x: jax.Array, dtype) -> jax.Array:
    return codec.decode(codec.encode(x), dtype)


def test_constants_are_those_of_the_tables():
    assert (E4M3[-1], E5M2[-1], E5M6[-1]) == (E4M3_MAX, E5M2_MAX, E5M6_MAX)
    assert E5M6_SMALLEST == E5M6[1] == 2.0**-20
    assert E5M6_MAX == 65024 and np.all(np.diff(E5M6) > 0)


def test_every_e5m6_code_decodes_to_its_value():
    found = from_e5m6(jnp.arange(4096, dtype=jnp.uint16))
    assert found.dtype == jnp.float32
    assert_same(found, E5M6_VALUES)


def test_every_finite_e5m6_value_has_its_own_code():
    codes = np.flatnonzero(np.isfinite(E5M6_VALUES)).astype(np.uint16)
    found = to_e5m6(jnp.asarray(E5M6_VALUES[codes], jnp.float32))
    assert found.dtype == jnp.uint16
    np.testing.assert_array_equal(found, codes)


def assert_nearest_code(x: np.ndarray) -> None:
    """Codes of exponent 31 are for NaN alone; subnormal FP32 numbers count as zero."""
    codes = np.asarray(jax.jit(to_e5m6)(jnp.asarray(x)))
    assert np.all(codes < 4096)
    np.testing.assert_array_equal((codes >> 6 & 31) == 31, np.isnan(x))
    assert_same(E5M6_VALUES[codes], nearest(np.where(np.abs(x) < TINY, np.copysign(0, x), x), E5M6))


def test_every_e5m6_midpoint_and_its_neighbours():
    middle = ((E5M6[1:] + E5M6[:-1]) / 2).astype(np.float32)
    points = [middle, E5M6.astype(np.float32)]
    points += [np.nextafter(y, np.float32(to)) for y in points for to in (-np.inf, np.inf)]
    x = np.concatenate(points)
    assert_nearest_code(np.concatenate([x, -x]))


def test_e5m6_beyond_its_ends():
    largest = np.finfo(np.float32).max
    x = np.float32([65024.1, 65280, 65536, 1e30, largest, np.inf, 2**-21, 2**-22, TINY, 1e-45, 0])
    assert_nearest_code(np.concatenate([x, -x, np.float32([np.nan])]))
    np.testing.assert_array_equal(from_e5m6(to_e5m6(jnp.asarray(x[:6]))), E5M6_MAX)
    as_bfloat16 = jnp.asarray([jnp.inf, 3e38, -jnp.inf], jnp.bfloat16)
    np.testing.assert_array_equal(to_e5m6(as_bfloat16), [0x7BF, 0x7BF, 0xFBF])


@settings(max_examples=100)
@given(arrays(np.float32, 64, elements=st.floats(width=32), fill=st.floats(-1, 1, width=32)))
def test_any_number_has_the_nearest_e5m6_code(x):
    assert_nearest_code(x)


def test_rounding_to_zero_and_ties_away_would_be_detected():
    x = np.float32([1 + 1 / 128, 1 + 3 / 128, 1 + 1.9 / 64])
    assert_same(from_e5m6(to_e5m6(jnp.asarray(x))), np.array([1, 1 + 2 / 64, 1 + 2 / 64]))
    for wrong in (np.floor(x * 64) / 64, np.floor(x * 64 + 0.5) / 64):
        with pytest.raises(AssertionError):
            assert_same(wrong, nearest(x, E5M6))


def test_two_codes_in_three_bytes_by_hand():
    packed = pack_e5m6(jnp.array([[0xABC, 0x123, 0x456, 0xDEF]], jnp.uint16))
    assert np.asarray(packed).tobytes() == bytes.fromhex("ab1245de c63f")


def test_unpack_gives_back_every_code():
    codes = jnp.asarray(np.random.default_rng(0).permutation(8192) % 4096, jnp.uint16)
    for shape in [(2, 2, 2048), (4096, 2), (0, 2)]:
        some = codes[: np.prod(shape)].reshape(shape)
        packed = jax.jit(pack_e5m6)(some)
        assert packed.dtype == jnp.uint8 and packed.shape == (*shape[:-1], shape[-1] * 3 // 2)
        np.testing.assert_array_equal(jax.jit(unpack_e5m6)(packed), some)


def test_an_odd_number_of_e5m6_columns_is_named():
    with pytest.raises(ValueError, match="201 columns of E5M6, expected an even number"):
        pack_e5m6(jnp.zeros((2, 201), jnp.uint16))
    with pytest.raises(ValueError, match="201 columns of E5M6, expected an even number"):
        jax.eval_shape(E5M6_POWER_OF_TWO.encode, jnp.zeros((2, 201)))


def test_exponents_of_all_powers_of_two():
    exponents = np.arange(1, 255, dtype=np.uint8)
    scale = 2.0 ** (exponents.astype(np.float64) - 127)
    found = to_exponents(jnp.asarray(scale, jnp.float32))
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, exponents)
    np.testing.assert_array_equal(from_exponents(jnp.asarray(exponents)), scale)


def bytes_of(part: jax.ShapeDtypeStruct) -> int:
    return part.size * part.dtype.itemsize


@codec_cases(CODECS)
@pytest.mark.parametrize("shape", [(6, 384), (2, 3, 200), (0, 256)])
def test_bytes_of_each_value_and_scale(codec, shape):
    parts = jax.eval_shape(codec.encode, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    of_value, of_scale = BITS_OF[codec.name]
    rows, tiles = int(np.prod(shape[:-1])), -(-shape[-1] // 128)
    assert len(parts) == len(codec.parts) == len(set(codec.parts))
    found = [8 * bytes_of(part) for part in parts]
    assert found == [rows * shape[-1] * of_value, rows * tiles * of_scale]


def test_bytes_of_a_value_of_whole_tiles():
    x = jax.ShapeDtypeStruct((3, 7168), jnp.bfloat16)
    parts = [jax.eval_shape(codec.encode, x) for codec in CODECS]
    per_value = [sum(map(bytes_of, some)) / x.size for some in parts]
    assert per_value == [1 + 4 / 128, 1 + 1 / 128, 1.5 + 1 / 128]


@codec_cases(CODECS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decodes_to_the_nearest_values_bit_by_bit(codec, dtype):
    x = MIXED[IN_RANGE].astype(dtype)
    found = there_and_back(codec, jnp.asarray(MIXED, dtype), dtype)
    assert found.dtype == dtype
    expected = decoded_by_hand(codec, x).astype(dtype).astype(np.float64)
    assert_same(np.asarray(found)[IN_RANGE], expected)


@codec_cases(CODECS)
def test_decodes_rows_of_any_rank(codec):
    x = normal((2, 3, 256))
    assert_same(there_and_back(codec, jnp.asarray(x), "float32"), decoded_by_hand(codec, x))


@codec_cases(CODECS)
def test_relative_errors_of_the_normal_range(codec):
    """Half a step, which is 2^-m of a value with m bits of mantissa; and the bound is tight."""
    normal_from, bound = (2.0**-14, 2.0**-7) if codec is E5M6_POWER_OF_TWO else (2.0**-6, 2.0**-4)
    x = normal(MIXED.shape, seed=3)
    found = np.asarray(there_and_back(codec, jnp.asarray(x), "float32"), np.float64)
    largest = E5M6_MAX if codec is E5M6_POWER_OF_TWO else E4M3_MAX
    # A power-of-two scale is less than twice the quotient.
    amax = np.max(np.abs(x), axis=1, keepdims=True)  # of the tile or more
    is_normal = np.abs(x) >= normal_from * 2 * amax / largest
    error = np.abs(found - x)[is_normal] / np.abs(x)[is_normal]
    assert np.mean(is_normal) > 0.9
    assert 0.9 * bound < np.max(error) <= bound * 1.000001


@codec_cases([E4M3_POWER_OF_TWO, E5M6_POWER_OF_TWO])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_powers_of_two_add_nothing_the_second_time(codec, dtype):
    once = there_and_back(codec, jnp.asarray(MIXED, dtype), dtype)
    again = there_and_back(codec, once, dtype)
    assert_same(again, np.asarray(once).astype(np.float64))


@codec_cases(CODECS)
def test_a_nan_shows_where_it_is_and_zeros_stay(codec):
    found = np.asarray(there_and_back(codec, jnp.asarray(MIXED), "float32"))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(MIXED))
    np.testing.assert_array_equal(found[0], 0)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [
        (E4M3_ROWS, "float32"),
        (E4M3_ROWS, "bfloat16"),
        (E4M3_POWER_OF_TWO, "bfloat16"),
        (E5M6_POWER_OF_TWO, "bfloat16"),
    ],
)
def test_what_overflowed_is_decoded_to_something_finite(codec, dtype):
    x = np.zeros(MIXED.shape, np.float32)
    x[0, :2], x[1] = (np.inf, -np.inf), np.finfo(np.float32).max
    found = there_and_back(codec, jnp.asarray(x, "float32"), dtype)
    assert np.all(np.isfinite(np.asarray(found, np.float32)))


@codec_cases(CODECS)
def test_swapped_scales_are_seen(codec):
    x = normal((2, 256))
    values, scale = encode(codec, jnp.asarray(x))
    swapped = jnp.asarray(np.asarray(scale)[::-1])
    for scales, is_right in [(scale, True), (swapped, False)]:
        found = np.asarray(codec.decode((values, scales), jnp.float32))
        assert np.array_equal(found, decoded_by_hand(codec, x)) == is_right


def test_plain_is_as_it_is():
    x = jnp.asarray(normal((2, 3)), jnp.bfloat16)
    assert PLAIN.encode(x)[0] is x and PLAIN.parts == ("",)
    assert_same(PLAIN.decode((x,), jnp.float32), np.asarray(x).astype(np.float64))
