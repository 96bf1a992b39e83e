"""Quantisation in tiles against a search through all values of the format, bit by bit.

XLA on CPU takes subnormal FP32 numbers for zero, and so does what is done by hand here.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import ArrayLike

from dsv3_kernels.quantize.op import dequantize, quantize, quantize_transposed

TINY = np.float32(2.0**-126)
LARGEST = np.float32(np.finfo(np.float32).max)
INFINITE_COUNTS_AS = np.float32(1.75 * 2.0**127)
ROW, BLOCK = (1, 128), (128, 128)


def magnitudes_of(dtype) -> np.ndarray:
    """What the byte patterns stand for that are finite and have no sign; by code, so ascending."""
    values = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return values[np.isfinite(values) & ~np.signbit(values)]


E4M3 = magnitudes_of(ml_dtypes.float8_e4m3fn)
E5M2 = magnitudes_of(ml_dtypes.float8_e5m2)


def nearest(x: ArrayLike, magnitudes: np.ndarray) -> np.ndarray:
    """The nearest of `magnitudes`, with x's sign; of two as near the one with an even code."""
    x = np.asarray(x, np.float64)
    size = np.abs(x)
    above = np.clip(np.searchsorted(magnitudes, size), 1, len(magnitudes) - 1)
    below = above - 1
    to_below, to_above = size - magnitudes[below], magnitudes[above] - size
    even = np.where(below % 2 == 0, below, above)
    code = np.where(to_below < to_above, below, np.where(to_below > to_above, above, even))
    return np.where(np.isnan(x), np.nan, np.copysign(magnitudes[code], x))


POWERS = 2.0 ** np.arange(-126, 128)


def quantised_by_hand(
    x: np.ndarray, tile: tuple[int, int], magnitudes: np.ndarray, power_of_two: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The values in float64 and the scales in float32."""
    x = np.asarray(x, np.float32)
    x = np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)
    amax = np.abs(np.where(np.isnan(x), 0, x))
    for dim in (-1, -2):
        amax = np.maximum.reduceat(amax, np.arange(0, x.shape[dim], tile[dim]), axis=dim)
    amax, largest = np.minimum(amax, INFINITE_COUNTS_AS), magnitudes[-1]
    if power_of_two:
        scale = POWERS[np.searchsorted(largest * POWERS, amax)].astype(np.float32)
    else:
        scale = np.maximum(amax * (1 / np.float32(largest)), TINY)
    scale = np.where(amax == 0, np.float32(1), scale)
    return nearest(x * spread(np.float32(1) / scale, x.shape, tile), magnitudes), scale


def spread(scale: np.ndarray, shape: tuple[int, ...], tile: tuple[int, int]) -> np.ndarray:
    """Each scale at every place of its tile."""
    rows, columns = (np.arange(size) // of for size, of in zip(shape[-2:], tile, strict=True))
    return scale[..., rows[:, None], columns]


def dequantised_by_hand(values: np.ndarray, scale: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """FP32 products with the scale of each value's tile."""
    return values.astype(np.float32) * spread(scale, values.shape, tile)


def assert_same(found: jax.Array, expected: np.ndarray) -> None:
    """The same numbers with the same signs; NaN at the same places."""
    found = np.asarray(found).astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    signs = np.signbit(found) == np.signbit(expected)
    assert np.all(signs | np.isnan(found))


def assert_quantised(found, x, tile, power_of_two, magnitudes=E4M3) -> None:
    values, scale = quantised_by_hand(np.asarray(x), tile, magnitudes, power_of_two)
    assert found[1].dtype == jnp.float32
    assert_same(found[1], scale.astype(np.float64))
    assert_same(found[0], values)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def compiled(x: jax.Array, tile=ROW, power_of_two=False, dtype="float8_e4m3fn"):
    """Without a look at the other implementations, which takes longer than the rest."""
    options = dict(dtype=dtype, power_of_two=power_of_two, implementation="reference")
    return quantize(x, tile, **options)


dequantised = jax.jit(dequantize, static_argnums=(2, 3))


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Rows of very different size."""
    rng = np.random.default_rng(seed)
    rows = np.exp2(rng.integers(-20, 20, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * rows).astype(np.float32)


SPECIAL_ROWS = np.zeros((10, 200), np.float32)
"""Zeros; infinities; NaN; the least and the largest; subnormals alone and beside a small number."""
SPECIAL_ROWS[0, ::2] = -0.0
SPECIAL_ROWS[1, :4] = np.inf, -np.inf, 1, -3e38
SPECIAL_ROWS[2] = normal((200,), seed=2)
SPECIAL_ROWS[2, [3, 150]] = np.nan
SPECIAL_ROWS[3, :3] = np.nan, np.inf, 1e30
SPECIAL_ROWS[4, :128] = np.nan
SPECIAL_ROWS[5, :4] = LARGEST, -LARGEST, LARGEST / 448, 1
SPECIAL_ROWS[6, :3] = TINY, -TINY, TINY / 2
SPECIAL_ROWS[7, :3] = 1e-40, -1e-45, TINY / 2
SPECIAL_ROWS[8, :4] = TINY * 300, TINY * 3, TINY / 2, -TINY
SPECIAL_ROWS[9, 127:130] = 448, -1e-3, 2.0**-9

CASES = [
    ((3, 256), ROW),
    ((2, 3, 5, 300), ROW),
    ((130, 200), BLOCK),
    ((2, 256, 128), BLOCK),
    ((140, 130), (140, 130)),
    ((5, 40), (2, 16)),
    ((1, 1), BLOCK),
    ((0, 256), ROW),
]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(("shape", "tile"), CASES)
def test_values_and_scales_bit_by_bit(shape, tile, power_of_two):
    x = jnp.asarray(normal(shape))
    assert_quantised(compiled(x, tile, power_of_two), x, tile, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", [ROW, BLOCK, (2, 200)])
def test_zeros_infinities_nan_and_subnormals(tile, power_of_two):
    x = jnp.asarray(SPECIAL_ROWS)
    found = compiled(x, tile, power_of_two)
    assert_quantised(found, x, tile, power_of_two)
    values, scale = np.asarray(found[0]).astype(np.float32), np.asarray(found[1])
    np.testing.assert_array_equal(np.isnan(values), np.isnan(SPECIAL_ROWS))
    assert np.all(np.isfinite(scale))
    if tile == ROW:
        assert np.all(scale[0] == 1) and scale[4, 0] == 1 and scale[7, 0] == 1
        assert scale[6, 0] == scale[8, 0] == TINY
        np.testing.assert_array_equal(values[1, :2], [448, -448])
        quotient = INFINITE_COUNTS_AS / np.float32(448)
        rounded_up = 2 ** np.ceil(np.log2(quotient))
        np.testing.assert_allclose(scale[1, 0], rounded_up if power_of_two else quotient)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_bfloat16_is_quantised_as_the_same_values_in_float32(power_of_two):
    x = np.concatenate([normal((7, 200)), SPECIAL_ROWS]).astype(ml_dtypes.bfloat16)
    found = compiled(jnp.asarray(x), ROW, power_of_two)
    assert_quantised(found, x.astype(np.float32), ROW, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_e5m2_has_its_own_largest_value(power_of_two):
    x = np.concatenate([normal((7, 200)), SPECIAL_ROWS])
    found = compiled(jnp.asarray(x), ROW, power_of_two, jnp.float8_e5m2)
    assert found[0].dtype == jnp.float8_e5m2
    assert_quantised(found, x, ROW, power_of_two, E5M2)


@pytest.mark.parametrize("magnitudes", [E4M3, E5M2], ids=["E4M3", "E5M2"])
def test_every_value_every_midpoint_and_their_neighbours(magnitudes):
    """The largest value in each tile makes the scale 1."""
    grid = magnitudes.astype(np.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    near = [np.nextafter(y, np.float32(to)) for y in (grid, middle) for to in (-np.inf, np.inf)]
    points = np.concatenate([grid, middle, *near])
    points = points[np.abs(points) <= grid[-1]]
    points = np.resize(np.concatenate([points, -points]), (-(-2 * len(points) // 127), 127))
    x = np.concatenate([np.full((len(points), 1), grid[-1]), points], axis=1)
    dtype = jnp.float8_e4m3fn if magnitudes is E4M3 else jnp.float8_e5m2
    values, scale = compiled(jnp.asarray(x), ROW, True, dtype)
    np.testing.assert_array_equal(scale, 1)
    assert_same(values, nearest(x, magnitudes))


@pytest.mark.parametrize("largest", [448.0, 57344.0])
def test_scales_are_amax_over_the_largest_value(largest):
    """But for the last place, as they are a product with the inverse. Powers of two are those of
    the quotient, on both sides of where it is one itself."""
    dtype = jnp.float8_e4m3fn if largest == 448 else jnp.float8_e5m2
    rows = np.exp2(np.float32([-100, -3, 0, 60])) * np.float32(largest)
    edges = [np.nextafter(rows, np.float32(to)) for to in (0, np.inf)]
    x = np.concatenate([rows, *edges, np.abs(normal((500,)))])[:, None]
    _, scale = compiled(jnp.asarray(x), ROW, dtype=dtype)
    np.testing.assert_array_max_ulp(np.asarray(scale), x / np.float32(largest), 1)
    _, scale = compiled(jnp.asarray(x), ROW, True, dtype)
    np.testing.assert_array_equal(scale, np.exp2(np.ceil(np.log2(x / np.float64(largest)))))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_not_compiled_the_same(power_of_two):
    for x in (np.concatenate([normal((50, 200)), SPECIAL_ROWS]), normal((1, 128))):
        found = quantize(jnp.asarray(x), power_of_two=power_of_two)
        assert_quantised(found, x, ROW, power_of_two)
        with jax.disable_jit():
            found = quantize(jnp.asarray(x), power_of_two=power_of_two, implementation="reference")
        assert_quantised(found, x, ROW, power_of_two)


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize(
    ("shape", "power_of_two"),
    [((130, 200), False), ((130, 200), True), ((2, 3, 150, 20), True)],
)
def test_transposed_in_columns(shape, power_of_two, implementation):
    x = normal(shape)
    options = dict(power_of_two=power_of_two, implementation=implementation)
    found = jax.jit(functools.partial(quantize_transposed, **options))(jnp.asarray(x))
    assert_quantised(found, np.swapaxes(x, -1, -2), ROW, power_of_two)


@pytest.mark.parametrize("tile", [ROW, BLOCK])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_default_is_the_reference_on_cpu(tile, dtype):
    x = jnp.asarray(normal((9, 200)) * np.float32(2.0**-15), dtype)
    assert_quantised(jax.jit(quantize, static_argnums=1)(x, tile), x, tile, power_of_two=False)


def test_an_unknown_implementation_is_named():
    x = jnp.ones((1, 128))
    for function in (quantize, quantize_transposed):
        with pytest.raises(ValueError, match="implementation is 'triton', expected one of ref"):
            function(x, implementation="triton")


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1e-45,
    -1e-39,
    float(TINY),
    448,
    3.4e38,
    float(LARGEST),
]


@st.composite
def two_rows(draw) -> np.ndarray:
    elements = st.one_of(st.sampled_from(SPECIAL), st.floats(-1000, 1000, width=32))
    x = draw(arrays(np.float32, (2, 200), elements=elements, fill=st.floats(-4, 4, width=32)))
    with np.errstate(over="ignore"):
        x = x * np.float32(2.0 ** draw(st.integers(-125, 110)))
    return x.astype(ml_dtypes.bfloat16).astype(np.float32) if draw(st.booleans()) else x


@settings(max_examples=60)
@given(two_rows(), st.booleans())
@example(SPECIAL_ROWS[:2], True)
def test_any_rows_bit_by_bit(x, power_of_two):
    assert_quantised(compiled(jnp.asarray(x), ROW, power_of_two), x, ROW, power_of_two)


@functools.partial(jax.jit, static_argnums=(1, 2))
def twice(x: jax.Array, tile: tuple[int, int], dtype) -> tuple[jax.Array, ...]:
    """What is dequantised in `dtype`, and that once more, with both scales."""
    values, scale = compiled(x, tile, True)
    once = dequantize(values, scale, tile, dtype)
    values, second = compiled(jax.lax.optimization_barrier(once), tile, True)
    return once, dequantize(values, second, tile, dtype), scale, second


@settings(max_examples=40)
@given(two_rows(), st.sampled_from([ROW, (2, 128)]), st.sampled_from(["float32", "bfloat16"]))
def test_powers_of_two_add_nothing_the_second_time(x, tile, dtype):
    once, again, _, _ = twice(jnp.asarray(x), tile, dtype)
    assert once.dtype == dtype
    assert_same(again, np.asarray(once).astype(np.float64))


def test_a_scale_may_be_halved_the_second_time():
    """225 is rounded to 224, for which half the scale is enough; 3 * 2^-9 is still 3 * 2^-9."""
    x = jnp.zeros((2, 128)).at[:, :2].set(jnp.array([[225.0, 3 * 2.0**-9], [240.0, 1.0]]))
    once, again, first, second = twice(x, ROW, "bfloat16")
    np.testing.assert_array_equal(first[:, 0], [1, 1])
    np.testing.assert_array_equal(second[:, 0], [0.5, 1])
    np.testing.assert_array_equal(once[:, :2], np.float32([[224, 3 * 2.0**-9], [240, 1]]))
    assert_same(again, np.asarray(once).astype(np.float64))


def test_a_flip_from_rows_to_columns_rounds_but_for_powers_of_two():
    """All values are far from the smallest of their columns' scales."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.5, 4, (128, 256)) * rng.choice([-1, 1], (128, 256)), jnp.float32)

    @functools.partial(jax.jit, static_argnums=1)
    def flip(x, power_of_two):
        rows = dequantize(*compiled(x, ROW, power_of_two))
        columns = dequantize(*compiled(rows.T, ROW, power_of_two))
        return rows, columns.T

    rounds = [np.mean(np.not_equal(*flip(x, power_of_two))) for power_of_two in (False, True)]
    assert rounds[0] > 0.5 and rounds[1] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "tile"), CASES[:6])
def test_dequantised_in_float32_then_cast(shape, tile, dtype):
    values, scale = quantised_by_hand(normal(shape), tile, E4M3, power_of_two=False)
    stored = jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn))
    found = dequantised(stored, jnp.asarray(scale), tile, dtype)
    expected = dequantised_by_hand(values, scale, tile).astype(found.dtype)
    assert found.dtype == dtype
    assert_same(found, expected.astype(np.float64))


@pytest.mark.parametrize(
    ("power_of_two", "dtype"),
    [
        (False, "float32"),
        (False, "bfloat16"),
        (True, "float32"),
        (True, "bfloat16"),
    ],
)
def test_what_overflowed_is_dequantised_to_something_finite(power_of_two, dtype):
    x = jnp.zeros((1, 128)).at[0, :2].set(jnp.array([jnp.inf, -jnp.inf]))
    found = dequantised(*compiled(x, ROW, power_of_two), ROW, dtype)
    assert np.all(np.isfinite(np.asarray(found, np.float32)))


def test_within_half_a_step_and_with_swapped_scales_not():
    """A step of E4M3 is at most 1/8 of the value, or 2^-9 of the scale near zero."""
    x = normal((200, 300))
    values, scale = (np.asarray(part) for part in compiled(jnp.asarray(x)))

    def is_close(scale: np.ndarray) -> bool:
        error = np.abs(dequantised_by_hand(values, scale, ROW) - x)
        near_zero = spread(scale, x.shape, ROW) * 2**-10
        return bool(np.all(error <= np.maximum(np.abs(x) / 16, near_zero) * 1.00001))

    assert is_close(scale)
    assert not is_close(scale[[0, 1, 2, 4, 3, *range(5, 200)]])


def test_the_assertion_sees_swapped_scales_other_tiles_and_other_rounding():
    x = normal((4, 256))
    values, scale = compiled(jnp.asarray(x))
    assert_quantised((values, scale), x, ROW, power_of_two=False)
    to_zero = np.where(np.asarray(values).view(np.uint8)[0] & 127 > 0, 1, 0).astype(np.uint8)
    one_lower = (np.asarray(values).view(np.uint8)[:1] - to_zero).view(ml_dtypes.float8_e4m3fn)
    wrong = [
        (values, scale[::-1]),
        compiled(jnp.asarray(x), ROW, True),
        compiled(jnp.asarray(x), (2, 128)),
        (jnp.concatenate([one_lower, values[1:]]), scale),
    ]
    for found in wrong:
        with pytest.raises(AssertionError):
            assert_quantised(found, x, ROW, power_of_two=False)
