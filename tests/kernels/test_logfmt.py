"""Packed LogFMT: bytes taken apart with whole numbers, against a search in float64.

The codes by themselves, for every number of bits, are tested in tests/quant/test_logfmt.py.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.logfmt import reference
from dsv3_kernels.logfmt.op import decode, encode, packed_bytes

TILE = 128
LOG_ERROR = 2e-5
"""Relative, of a magnitude that went through FP32 logarithms."""


def rows_of(shape: tuple[int, ...]) -> np.ndarray:
    """BF16 values over 2**20, with zeros and a constant tile among them."""
    random = np.random.default_rng(sum(shape))
    x = random.normal(size=shape) * np.exp2(random.uniform(-10, 10, size=shape))
    x[..., 5], x[..., TILE : 2 * TILE] = 0, -0.3
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def values_by_hand(packed: np.ndarray, bits: int) -> np.ndarray:
    """What each packed tile stands for, in float64."""
    values = []
    for tile in packed.reshape(-1, 16 * bits + 4):
        largest, smallest = tile[-4:].view(ml_dtypes.bfloat16).astype(np.float64)
        smallest = max(smallest, largest / 2**32)
        codes = np.exp2(np.linspace(np.log2(smallest), np.log2(largest), 2 ** (bits - 1) - 1))
        for group in range(8):
            number = int.from_bytes(tile[2 * bits * group : 2 * bits * (group + 1)], "little")
            for lane in range(16):
                code = number >> (lane * (bits - 1)) & (2 ** (bits - 1) - 1)
                sign = -1 if number >> (16 * (bits - 1) + lane) & 1 else 1
                values.append(sign * (0 if code == 0 else codes[code - 1]))
    return np.array(values)


def assert_nearest(x: np.ndarray, found: np.ndarray, bits: int) -> None:
    """No value is further than half the gap between codes around it, up to one step below the
    smallest, from where it is zero."""
    for tile, of_tile in zip(x.reshape(-1, TILE), found.reshape(-1, TILE), strict=True):
        magnitude = np.abs(tile).astype(np.float64)
        largest = magnitude.max()
        step = np.log2(largest / max(magnitude.min(), largest / 2**32)) / (2 ** (bits - 1) - 2)
        half_a_gap = np.maximum(magnitude * np.expm1(step * np.log(2)) / 2, largest * 2.0**-32)
        error = np.abs(of_tile - tile)
        assert np.all(error <= half_a_gap + LOG_ERROR * magnitude)
        np.testing.assert_array_equal(
            np.signbit(of_tile[magnitude > 0]), np.signbit(tile[tile != 0])
        )


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_bytes_stand_for_the_nearest_codes(bits, implementation):
    x = rows_of((3, 2, 3 * TILE))
    packed = np.asarray(encode(jnp.asarray(x), bits, implementation=implementation))
    assert packed.shape == (3, 2, packed_bytes(3 * TILE, bits)) == (3, 2, 3 * (16 * bits + 4))
    by_hand = values_by_hand(packed, bits)
    assert_nearest(x, by_hand, bits)
    found = decode(jnp.asarray(packed), 3 * TILE, bits, implementation=implementation)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, by_hand.reshape(x.shape), rtol=LOG_ERROR)
    rounded = decode(jnp.asarray(packed), 3 * TILE, bits, "bfloat16")
    np.testing.assert_array_equal(rounded, found.astype(jnp.bfloat16))

    with pytest.raises(AssertionError):
        assert_nearest(x[..., ::-1], by_hand, bits)
    with pytest.raises(AssertionError):
        assert_nearest(x, values_by_hand(np.roll(packed, 16 * bits + 4, axis=-1), bits), bits)


def test_the_default_is_the_reference_on_cpu():
    x = jnp.asarray(rows_of((4, 2 * TILE)), jnp.bfloat16)
    for bits in (5, 10):
        packed = jax.jit(functools.partial(encode, bits=bits))(x)
        np.testing.assert_array_equal(packed, reference.pack(reference.encode(x, bits), bits))
        expected = reference.decode(reference.unpack(packed, 2 * TILE, bits), bits)
        np.testing.assert_array_equal(decode(packed, 2 * TILE, bits), expected)


def test_no_rows():
    packed = encode(jnp.zeros((0, TILE)), 10)
    assert packed.shape == (0, 164) and decode(packed, TILE, 10).shape == (0, TILE)


def test_what_does_not_fit_is_named():
    x, packed = jnp.ones((2, TILE)), jnp.zeros((2, 164), jnp.uint8)
    with pytest.raises(ValueError, match="implementation is 'triton', expected one of reference"):
        encode(x, 10, implementation="triton")
    with pytest.raises(ValueError, match="implementation is 'triton', expected one of reference"):
        decode(packed, TILE, 10, implementation="triton")
    for implementation in (None, "mosaic"):
        with pytest.raises(ValueError, match="columns: 100, the last dimension, is not a multiple"):
            encode(x[:, :100], 10, implementation=implementation)
        with pytest.raises(ValueError, match=r"bits: 3 is not in 4\.\.16"):
            encode(x, 3, implementation=implementation)
        with pytest.raises(ValueError, match="packed: 164 bytes in a row, not 132 for 128 columns"):
            inspect.unwrap(decode)(packed, TILE, 8, implementation=implementation)
