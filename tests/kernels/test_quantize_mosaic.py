"""The Hopper kernels of quantize: raced on the CPU, compiled for sm_90a, bit by bit as defined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.quantize import mosaic_sm90, reference, tiles
from tests.kernels.compiled import compiled_cases

ROWS, BLOCKS, COLUMNS = (1, 128), (128, 128), (128, 1)


def values_of(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normal numbers over many orders of magnitude, and what may go wrong."""
    random = np.random.default_rng(sum(shape))
    x = random.normal(size=shape) * np.exp(3 * random.normal(size=shape))
    x[..., 0, :6] = [np.inf, -np.inf, np.nan, 0, 1e-40, -0.0]
    x[..., 1, :] = 0
    x[..., 2, :] = 1e-39
    x[..., 3, :] = 3e38
    return jnp.asarray(x, jnp.float32).astype(dtype)


def raced(x: jax.Array, tile: tuple[int, int], power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        if tile == COLUMNS:
            return mosaic_sm90.quantize_transposed(x, power_of_two=power_of_two)
        return mosaic_sm90.quantize(x, tile, power_of_two=power_of_two)


def defined(x: jax.Array, tile: tuple[int, int], power_of_two: bool) -> tuple[jax.Array, jax.Array]:
    if tile == COLUMNS:
        x, tile = jnp.swapaxes(x, -1, -2), ROWS
    return reference.quantize(x, tile, power_of_two=power_of_two)


def assert_same_bits(got: jax.Array, want: jax.Array) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    unsigned = {1: np.uint8, 4: np.uint32}[got.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(got).view(unsigned), np.asarray(want).view(unsigned))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize("tile", [ROWS, COLUMNS, BLOCKS])
@pytest.mark.parametrize(
    ("shape", "dtype", "power_of_two"),
    [
        ((192, 192), "bfloat16", False),  # tiles past both edges
        slow((192, 192), "float32", False),
        slow((128, 256), "bfloat16", True),
        # Sizes that TMA cannot tile, filled up outside.
        slow((2, 70, 100), "float32", True),
    ],
)
def test_values_and_scales_are_the_references(shape, dtype, power_of_two, tile):
    x = values_of(shape, dtype)
    got = raced(x, tile, power_of_two)
    want = defined(x, tile, power_of_two)
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])


@pytest.mark.interpret
def test_two_rows_swapped_are_seen():
    x = values_of((64, 128), "bfloat16")
    values, scale = raced(x, ROWS, power_of_two=False)
    swapped = defined(x.at[4:6].set(x[5:3:-1]), ROWS, power_of_two=False)
    with pytest.raises(AssertionError):
        assert_same_bits(values, swapped[0])
    with pytest.raises(AssertionError):
        assert_same_bits(scale, swapped[1])


@pytest.mark.parametrize("off", range(-3, 4))
def test_a_reciprocal_is_the_nearest_for_every_mantissa(off):
    """From what Mosaic's division may give, up to 3 units of the last place off."""
    mantissas = np.arange(2**23, dtype=np.int32)
    x = (mantissas | 0x3F800000).view(np.float32)
    want = (1 / x.astype(np.longdouble)).astype(np.float32)
    rough = (want.view(np.int32) + off).view(np.float32)
    got = jax.jit(mosaic_sm90.refine_reciprocal)(x, rough)
    np.testing.assert_array_equal(np.asarray(got), want)


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    for report in compiled_cases("quantize"):
        [kernel] = report["compiled"]
        counts = kernel["instructions"]
        rows = 128 if report["case"].startswith("blocks") else tiles.M
        assert (counts["UTMALDG"], counts["UTMASTG"]) == (1, 1)  # x, values
        assert counts["F2FP"] == rows * tiles.K // 128 // 2  # two values each
        itemsize = 4 if report["case"].endswith("FP32") else 2
        assert kernel["shared_memory_bytes"] <= tiles.shared_memory_bytes(itemsize, rows) + 4096
        assert tiles.programs_per_sm(itemsize, rows, kernel["registers"]) >= 2
        # A warp of each program on each scheduler issues its instructions while memory moves its
        # bytes, and enough is under way while one program computes.
        assert report["shares"]["issue"] == report["shares"]["latency"] == 1


def test_what_the_kernels_will_not_take():
    x = values_of((8, 128), "float32")
    assert mosaic_sm90.unsupported(x, ROWS, jnp.float8_e4m3fn) == ""
    with pytest.raises(NotImplementedError, match="x is float16, expected bfloat16 or float32"):
        mosaic_sm90.quantize(x.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match=r"tile is \(1, 64\), expected one of"):
        mosaic_sm90.quantize(x, (1, 64))
    with pytest.raises(NotImplementedError, match="dtype is float8_e5m2, expected float8_e4m3fn"):
        mosaic_sm90.quantize_transposed(x, dtype=jnp.float8_e5m2)
    assert mosaic_sm90.unsupported(x[:0], ROWS, jnp.float8_e4m3fn).startswith("x is [0, 128]")
