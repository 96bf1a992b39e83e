"""SwiGLU and quantisation in one against NumPy in float64, and byte by byte from a's own values."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.swiglu_quantize import reference
from dsv3_kernels.swiglu_quantize.op import (
    swiglu_backward,
    swiglu_quantize,
    swiglu_quantize_transposed,
)

LAST_PLACE = {"bfloat16": 2**-8, "float32": 2**-21}
"""Relative: a rounding that tipped in BF16; exponential, quotient and products in FP32."""
TILE = 128


def operands(shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    """h [*shape, 2F] and the weights of its rows."""
    random = np.random.default_rng(sum(shape))
    h = jnp.asarray(4 * random.normal(size=shape), dtype)
    return h, jnp.asarray(random.uniform(-0.1, 1, size=shape[:-1]), jnp.float32)


def activation_by_hand(h, weights=None, filled=None) -> np.ndarray:
    """In float64, not rounded."""
    gate, up = np.split(np.asarray(h, np.float64), 2, axis=-1)
    a = gate / (1 + np.exp(-gate)) * up
    if weights is not None:
        a = a * np.asarray(weights, np.float64)[..., None]
    if filled is not None:
        there = np.arange(h.shape[-2]) < np.asarray(filled)[..., None]
        a = np.where(there[..., None], a, 0)
    return a


def quantised_by_hand(a: np.ndarray, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
    """The bytes and the scales of rows, with ml_dtypes' rounding."""
    a = np.asarray(a, np.float32)
    *batch, columns = a.shape
    padded = np.pad(a, [(0, 0)] * len(batch) + [(0, -columns % TILE)]).reshape(*batch, -1, TILE)
    amax = np.abs(padded).max(axis=-1)
    scale = amax * (np.float32(1) / np.float32(448))
    if power_of_two:
        scale = np.exp2(np.ceil(np.log2(np.where(amax == 0, 1, amax) / 448))).astype(np.float32)
    scale = np.where(amax == 0, np.float32(1), scale)
    values = np.clip(padded * (1 / scale)[..., None], -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return values.view(np.uint8).reshape(*batch, -1)[..., :columns], scale


def assert_same(found: tuple[jax.Array, jax.Array], expected: tuple[np.ndarray, np.ndarray]):
    values, scale = (np.asarray(part) for part in found)
    assert values.dtype == ml_dtypes.float8_e4m3fn and scale.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint8), expected[0])
    np.testing.assert_array_equal(scale, expected[1])


CASES = [
    ((130, 256), "bfloat16", False, None),
    ((2, 70, 72), "float32", True, [0, 50]),
    ((2, 1, 3, 512), "bfloat16", True, [[3], [1]]),
]


@pytest.mark.parametrize(("shape", "dtype", "power_of_two", "filled"), CASES)
def test_values_and_scales_are_those_of_a(shape, dtype, power_of_two, filled):
    """a is float64's to the last place of h's dtype, and the bytes are a's."""
    h, weights = operands(shape, dtype)
    weights = None if filled is None else weights
    filled = None if filled is None else jnp.asarray(filled)
    a = np.asarray(jax.jit(reference.activation)(h, weights, filled))
    assert a.dtype == h.dtype
    expected = activation_by_hand(h, weights, filled)
    np.testing.assert_allclose(a.astype(np.float64), expected, rtol=LAST_PLACE[dtype], atol=1e-30)

    found = swiglu_quantize(h, weights, filled, power_of_two=power_of_two)
    assert_same(found, quantised_by_hand(a, power_of_two))
    found = swiglu_quantize_transposed(h, weights, filled, power_of_two=power_of_two)
    assert_same(found, quantised_by_hand(np.swapaxes(a, -1, -2), power_of_two))


def test_without_silu_or_weights_or_with_swapped_rows_it_would_be_seen():
    h, weights = operands((70, 256))
    found = swiglu_quantize(h, weights)
    a = np.asarray(reference.activation(h, weights, None))
    gate, up = jnp.split(h, 2, axis=-1)
    wrong = [
        np.asarray(gate * up * weights.astype(h.dtype)[:, None]),
        np.asarray(reference.activation(h, None, None)),
        np.asarray(reference.activation(jnp.concatenate([up, gate], axis=-1), weights, None)),
        a[[1, 0, *range(2, 70)]],
    ]
    for other in wrong:
        with pytest.raises(AssertionError):
            assert_same(found, quantised_by_hand(other, power_of_two=False))


def test_rows_that_are_not_there_may_hold_anything():
    h, weights = operands((2, 9, 256))
    h, weights = h.at[:, 5:].set(jnp.nan), weights.at[:, 5:].set(jnp.inf)
    filled, d_a = jnp.array([5, 0]), h[..., :128]
    values, scale = swiglu_quantize(h, weights, filled)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8)[[0, 1, 1], [5, 0, 8]], 0)
    np.testing.assert_array_equal(scale[1], 1)
    np.testing.assert_array_equal(scale[0, 5:], 1)
    values, scale = swiglu_quantize_transposed(h, weights, filled)
    assert not np.any(np.asarray(values).view(np.uint8)[:, :, 5:])
    assert np.all(np.isfinite(scale)) and np.all(np.asarray(scale)[1] == 1)
    d_h, d_weights = swiglu_backward(h, weights, d_a, filled)
    assert not np.any(d_h[0, 5:]) and not np.any(d_h[1]) and np.all(np.isfinite(d_h))
    assert not np.any(d_weights[0, 5:]) and np.any(d_weights[0, :5])


def test_large_gates_have_no_nan():
    """Where exp(-gate) overflows, silu is -0."""
    gate = jnp.array([-3e38, -1000, -89, 0, 89, 1000], jnp.float32)
    h = jnp.concatenate([gate, jnp.ones_like(gate)])[None]
    expected = np.maximum(np.asarray(gate), 0)
    np.testing.assert_allclose(reference.activation(h, None, None)[0], expected, atol=1e-36)
    d_h, _ = swiglu_backward(h, None, jnp.ones((1, 6)))
    np.testing.assert_allclose(d_h[0, :6], [0, 0, 0, 0.5, 1, 1], atol=1e-36)
    np.testing.assert_allclose(d_h[0, 6:], expected, atol=1e-36)


@pytest.mark.parametrize(("shape", "dtype", "_", "filled"), CASES)
def test_gradients_are_float64s_differences(shape, dtype, _, filled):
    """Of sum(a * d_a) in h along a random direction, and in each weight."""
    h, weights = operands(shape, dtype)
    filled = None if filled is None else jnp.asarray(filled)
    random = np.random.default_rng(1)
    d_a = jnp.asarray(random.normal(size=(*shape[:-1], shape[-1] // 2)), dtype)
    d_h, d_weights = swiglu_backward(h, weights, d_a, filled)
    assert (d_h.shape, d_h.dtype, d_weights.dtype) == (h.shape, h.dtype, np.float32)
    by_hand = functools.partial(activation_by_hand, filled=filled)

    direction, step = random.normal(size=shape), 1e-6
    h, d_a, weights = (np.asarray(x, np.float64) for x in (h, d_a, weights))
    ahead, behind = (by_hand(h + sign * step * direction, weights) for sign in (1, -1))
    change = np.sum((ahead - behind) / (2 * step) * d_a, axis=-1)
    found = np.sum(np.asarray(d_h, np.float64) * direction, axis=-1)
    size = np.linalg.norm(change)
    assert size > 0 and np.linalg.norm(found - change) < LAST_PLACE[dtype] * size
    # a is linear in the weights.
    np.testing.assert_allclose(d_weights, np.sum(by_hand(h) * d_a, axis=-1), rtol=1e-4, atol=1e-3)


def test_no_weights_are_weights_of_one():
    h, weights = operands((70, 256))
    d_a, ones = h[:, :128], jnp.ones_like(weights, jnp.bfloat16)
    for function in (swiglu_quantize, swiglu_quantize_transposed):
        values, scale = (np.asarray(part) for part in function(h))
        assert_same(function(h, ones), (values.view(np.uint8), scale))
    d_h, nothing = swiglu_backward(h, None, d_a)
    assert nothing is None
    np.testing.assert_array_equal(d_h, swiglu_backward(h, ones, d_a)[0])


def test_no_rows():
    values, scale = swiglu_quantize(jnp.zeros((2, 0, 256)))
    assert values.shape == (2, 0, 128) and scale.shape == (2, 0, 1)
    d_h, d_weights = swiglu_backward(
        jnp.zeros((2, 0, 256)), jnp.zeros((2, 0)), jnp.zeros((2, 0, 128))
    )
    assert d_h.shape == (2, 0, 256) and d_weights.shape == (2, 0)


def test_what_does_not_fit_is_named():
    h, weights = operands((2, 9, 256))
    filled, d_a = jnp.array([9, 9]), h[..., :128]
    backward = inspect.unwrap(swiglu_backward)  # whose annotations are not checked first
    for function in (
        inspect.unwrap(swiglu_quantize),
        inspect.unwrap(swiglu_quantize_transposed),
        lambda h, weights=None, filled=None, **named: backward(h, weights, d_a, filled, **named),
    ):
        with pytest.raises(ValueError, match="implementation is 'triton', expected one of ref"):
            function(h, implementation="triton")
        with pytest.raises(ValueError, match=r"h is \[2, 9, 255\], expected an even number"):
            function(h[..., :255])
        with pytest.raises(ValueError, match=r"weights are \[2, 8\], expected \[2, 9\]"):
            function(h, weights[:, :8])
        with pytest.raises(ValueError, match=r"filled is \[1\], expected \[2\]"):
            function(h, weights, filled[:1])
    with pytest.raises(ValueError, match=r"d_a is \[2, 9, 64\], expected \[2, 9, 128\]"):
        backward(h, weights, d_a[..., :64], filled)
