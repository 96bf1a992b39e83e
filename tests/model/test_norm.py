"""RMSNorm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.norm import RMSNorm, rms_norm
from tests.tolerances import FLOAT32_OP, assert_close


def formula(x, weight, eps):
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def draw(shape, dtype=jnp.float32):
    random = np.random.default_rng(0)
    x, weight = random.standard_normal(shape), 1 + 0.1 * random.standard_normal(shape[-1])
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_float32(eps):
    x, weight = draw((3, 5, 64))
    assert_close(rms_norm(x, weight, eps), formula(x, weight, eps), FLOAT32_OP)


def test_eps_keeps_small_and_zero_rows_in_bounds():
    x = jnp.asarray([[1e-3] * 4, [0.0] * 4])
    normed = RMSNorm(4, eps=1e-6, dtype=jnp.float32)(x)
    assert_close(normed, [[0.5**0.5] * 4, [0.0] * 4], FLOAT32_OP)
    gradient = jax.grad(lambda x: jnp.sum(rms_norm(x, jnp.ones(4), 1e-6)))(x)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_rounds_only_the_result(weight_dtype):
    """Steps rounded to bfloat16 on the way would move every third value."""
    x, weight = draw((50, 64), jnp.bfloat16)
    weight = weight.astype(weight_dtype)
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == jnp.bfloat16
    expected = jnp.asarray(formula(x, weight, 1e-6), jnp.float32).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.995
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + jnp.bfloat16(1e-6))
    rounded_on_the_way = x * inverse * weight.astype(jnp.bfloat16)
    assert np.mean(np.asarray(rounded_on_the_way) == np.asarray(expected)) < 0.9
