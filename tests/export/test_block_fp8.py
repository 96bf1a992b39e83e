"""Block quantisation against loops in NumPy, ragged edges and kept scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.export.block_fp8 import dequantise, quantise
from tests.export.hub_files import dequantise_by_hand, quantise_by_hand

SHAPE = (200, 130)


def weight_with_special_blocks(seed: int = 0) -> np.ndarray:
    """Blocks of very different size; the last one is all zero."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(SHAPE).astype(np.float32)
    weight[:128, :128] *= 1e-6
    weight[:128, 128:] *= 3e4
    weight[128:, 128:] = 0
    return weight


def assert_bits(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.asarray(found).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_fresh_scales_are_those_of_the_loops(dtype):
    weight = weight_with_special_blocks().astype(dtype)
    found = quantise(jnp.asarray(weight))
    expected = quantise_by_hand("w", weight.astype(np.float32))
    assert_bits(found.values, expected["w"])
    assert_bits(found.scale, expected["w_scale_inv"])
    assert found.scale[1, 1] == 1


def test_one_block_of_ties():
    """Quotients that lie between two E4M3 values; a product with 1/scale would miss them."""
    weight = np.linspace(-448, 448, 897, dtype=np.float32)[None] * np.float32(3)
    found = quantise(jnp.asarray(weight[:, 400:500]))
    expected = quantise_by_hand("w", weight[:, 400:500])
    assert_bits(found.values, expected["w"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_show_in_the_scale(bad):
    weight = weight_with_special_blocks()
    weight[150, 3] = bad
    kept = jnp.ones((2, 2))
    for found in (quantise(jnp.asarray(weight)), quantise(jnp.asarray(weight), kept)):
        np.testing.assert_array_equal(np.isfinite(found.scale), [[True, True], [False, True]])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantised_in_float32_then_cast(dtype):
    stored = quantise_by_hand("w", weight_with_special_blocks() / 64)
    found = dequantise(stored["w"], stored["w_scale_inv"], jnp.dtype(dtype))
    assert_bits(found, dequantise_by_hand(*stored.values()).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_kept_scales_give_every_stored_byte_back(dtype, power_of_two):
    """All finite E4M3 values under scales that amax / 448 would not give, zero among them."""
    rng = np.random.default_rng(1)
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[~np.isin(codes, [0x7F, 0xFF])]
    values = rng.choice(codes, SHAPE).view(ml_dtypes.float8_e4m3fn)
    values[128:, 128:] = 0
    scale = rng.uniform(1e-5, 3e-2, (2, 2)).astype(np.float32)
    if power_of_two:
        scale = np.exp2(np.ceil(np.log2(scale)))
    for last in (scale[1, 1], 0.0):
        scale[1, 1] = last
        loaded = dequantise(values, scale, jnp.dtype(dtype))
        again = quantise(loaded, jnp.asarray(scale))
        assert_bits(again.values, values)
        assert_bits(again.scale, scale)


def test_changed_blocks_alone_get_a_fresh_scale():
    stored = quantise_by_hand("w", weight_with_special_blocks())
    kept = stored["w_scale_inv"] * np.float32(2)
    kept[0, 1] = np.nan  # was not FP8
    halved = (stored["w"].astype(np.float32) / 2).astype(stored["w"].dtype)
    weight = dequantise_by_hand(halved, np.nan_to_num(kept, nan=1.0))
    weight[130, 3] *= 1.001
    found = quantise(jnp.asarray(weight), jnp.asarray(kept))
    fresh = quantise_by_hand("w", weight)["w_scale_inv"]
    assert found.scale[0, 0] == kept[0, 0] and found.scale[1, 1] == kept[1, 1]
    assert found.scale[0, 1] == fresh[0, 1] and found.scale[1, 0] == fresh[1, 0]
    assert fresh[1, 0] != kept[1, 0]


def test_conversion_to_e4m3_rounds_to_nearest_even():
    """XLA's conversion at every value, every midpoint and their neighbours."""
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    middle = (grid[1:] + grid[:-1]) / 2
    near = [np.nextafter(middle, np.float32(side)) for side in (-np.inf, np.inf)]
    x = np.concatenate([grid, middle, *near])
    found = jax.jit(lambda x: x.astype(jnp.float8_e4m3fn))(x)
    assert_bits(found, x.astype(ml_dtypes.float8_e4m3fn))


def test_values_are_within_half_a_step_and_swapped_scales_are_not():
    """A step of E4M3 is at most 1/8 of the value, or 2^-9 of the scale near zero."""
    weight = weight_with_special_blocks()
    values, scale = map(np.asarray, quantise(jnp.asarray(weight)))

    def is_close(scale: np.ndarray) -> bool:
        spread = dequantise_by_hand(np.ones(SHAPE, np.float32), scale)
        error = np.abs(dequantise_by_hand(values, scale) - weight)
        return bool(np.all(error <= np.maximum(np.abs(weight) / 16, spread * 2**-10) * 1.0001))

    assert is_close(scale)
    assert not is_close(scale[::-1])
