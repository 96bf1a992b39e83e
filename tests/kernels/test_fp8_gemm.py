"""The product of quantised matrices against float64 products of what they stand for."""

import functools
import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.fp8_gemm.op import fp8_gemm
from tests.kernels.test_quantize import BLOCK, E4M3, ROW, dequantised_by_hand, quantised_by_hand

ON_CPU = ["reference", "xla"]
LARGEST_ERROR = {"float32": 1e-6, "bfloat16": 3e-3}
"""Relative, in the Frobenius norm: 1e-7 and 1.7e-3 were measured."""


def matrix(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Rows and columns of very different size."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(-4, 4, size) for size in ((*shape[:-1], 1), shape[-1:]))
    return (rng.standard_normal(shape) * np.exp2(rows + columns)).astype(np.float32)


def operand(shape: tuple[int, ...], tile: tuple[int, int], seed: int = 0):
    """E4M3 values and scales, and what they stand for."""
    values, scale = quantised_by_hand(matrix(shape, seed), tile, E4M3, power_of_two=False)
    stored = jnp.asarray(values.astype(ml_dtypes.float8_e4m3fn))
    return stored, jnp.asarray(scale), dequantised_by_hand(values, scale, tile)


def relative_error(found: jax.Array, expected: np.ndarray) -> float:
    difference = np.asarray(found).astype(np.float64) - expected
    assert found.shape == expected.shape
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


@functools.partial(jax.jit, static_argnames="implementation")
def gemm(*operands: jax.Array, implementation: str | None = None) -> tuple[jax.Array, ...]:
    """In FP32 and in BF16."""
    return tuple(
        fp8_gemm(*operands, dtype, implementation=implementation) for dtype in LARGEST_ERROR
    )


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ np.swapaxes(b, -1, -2).astype(np.float64)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("b_tile", [BLOCK, ROW], ids=["blocks", "rows"])
@pytest.mark.parametrize(
    ("batch", "m", "n", "k"),
    [((), 130, 150, 300), ((), 1, 1, 1), ((2, 1), 9, 256, 130)],
)
def test_equals_the_float64_product(batch, m, n, k, b_tile, implementation):
    a, a_scale, a_stands_for = operand((*batch, m, k), ROW)
    b, b_scale, b_stands_for = operand((*batch, n, k), b_tile, seed=1)
    expected = product(a_stands_for, b_stands_for)
    for found in gemm(a, a_scale, b, b_scale, implementation=implementation):
        assert relative_error(found, expected) <= LARGEST_ERROR[found.dtype.name]


def test_the_default_and_not_compiled():
    a, a_scale, a_stands_for = operand((5, 140), ROW)
    b, b_scale, b_stands_for = operand((7, 140), BLOCK, seed=1)
    expected = product(a_stands_for, b_stands_for)
    for implementation in (None, *ON_CPU):
        found = fp8_gemm(a, a_scale, b, b_scale, "float32", implementation=implementation)
        assert found.dtype == jnp.float32
        assert relative_error(found, expected) <= LARGEST_ERROR["float32"]


def test_operands_of_two_dtypes():
    """Gradients in E5M2 times weights in E4M3, as one of the negative recipes has it."""
    a = jnp.asarray(np.float32([[1.25, -57344.0], [2.0**-16, 0.5]]), jnp.float8_e5m2)
    b = jnp.asarray(np.float32([[1.125, 448.0], [0.0, 2.0**-9]]), jnp.float8_e4m3fn)
    ones = jnp.ones((2, 1))
    expected = product(np.asarray(a, np.float64), np.asarray(b, np.float64))
    for implementation in ON_CPU:
        found, _ = gemm(a, ones, b, ones, implementation=implementation)
        assert relative_error(found, expected) <= LARGEST_ERROR["float32"]


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("which", ["a", "b in blocks", "b in rows"])
def test_two_scales_swapped_are_seen(which, implementation):
    a, a_scale, a_stands_for = operand((6, 300), ROW)
    n, b_tile = (20, ROW) if which == "b in rows" else (260, BLOCK)
    b, b_scale, b_stands_for = operand((n, 300), b_tile, seed=1)
    expected = product(a_stands_for, b_stands_for)
    a_scale, b_scale = np.array(a_scale), np.array(b_scale)
    if which == "a":
        a_scale[:2, 0] = a_scale[1::-1, 0]
    else:
        b_scale[0, :2] = b_scale[0, 1::-1]
    scales = jnp.asarray(a_scale), jnp.asarray(b_scale)
    for found in gemm(a, scales[0], b, scales[1], implementation=implementation):
        assert relative_error(found, expected) > LARGEST_ERROR[found.dtype.name]


def test_an_unknown_implementation_is_named():
    a, a_scale, _ = operand((2, 128), ROW)
    with pytest.raises(ValueError, match="implementation is 'triton', expected one of reference"):
        fp8_gemm(a, a_scale, a, a_scale, "float32", implementation="triton")


@pytest.mark.parametrize(
    ("a_scale", "b_scale", "message"),
    [
        ((4, 2), (2, 2), r"scale of a \[4, 300\] is \[4, 2\], expected \[4, 3\]"),
        ((4, 3), (3, 3), r"scale of b \[200, 300\] is \[3, 3\], expected \[200, 3\] or \[2, 3\]"),
        ((4, 3), (1, 3), r"scale of b \[200, 300\] is \[1, 3\]"),
        ((1, 3), (2, 3), r"scale of a \[4, 300\] is \[1, 3\], expected \[4, 3\]"),
        ((4, 3), (2, 4), r"scale of b \[200, 300\] is \[2, 4\]"),
    ],
)
def test_scales_that_do_not_fit_are_named(a_scale, b_scale, message):
    """Without the checks of annotations, which tests alone have."""
    a, b = (jnp.zeros((rows, 300), jnp.float8_e4m3fn) for rows in (4, 200))
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fp8_gemm)(a, jnp.ones(a_scale), b, jnp.ones(b_scale), "float32")
