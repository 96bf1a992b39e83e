"""Rotary positions against complex numbers, the oracle and the published figures."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import YarnConfig
from dsv3_jax.model.rope import (
    inverse_frequencies,
    magnitude_scale,
    rotary,
    rotate,
    softmax_scale,
)
from tests.model.weights import model_config
from tests.oracle import rope as oracle
from tests.oracle.cases import V2_CHANGES, V3_671B, YARN, tiny_config
from tests.tolerances import FLOAT32_OP, assert_close

MSCALE = {"qk_rope_head_dim": 8, "rope_theta": 1000.0}
CASES = {
    "plain": tiny_config(),
    "671B": V3_671B,
    "v2": tiny_config(**V2_CHANGES),
    "unequal mscales": tiny_config(
        **MSCALE,
        rope_scaling=YARN
        | dict(
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=2.0,
            beta_slow=0.05,
            mscale_all_dim=0.707,
        ),
    ),
    "factor 1": tiny_config(rope_scaling=YARN | {"factor": 1.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_and_softmax_scale_equal_the_oracle(name):
    config = model_config(CASES[name])
    assert_close(inverse_frequencies(config), oracle.frequencies(CASES[name]), FLOAT32_OP)
    assert softmax_scale(config) == pytest.approx(oracle.softmax_scale(CASES[name]), rel=1e-12)


def test_published_figures():
    """Facts §1.1: m = 1.368888, m^2 = 1.873854, scale 0.135234."""
    assert magnitude_scale(40.0, 1.0) == pytest.approx(1.368888, abs=5e-7)
    assert magnitude_scale(40.0, 1.0) ** 2 == pytest.approx(1.873854, abs=5e-7)
    assert magnitude_scale(1.0, 1.0) == 1.0
    assert softmax_scale(model_config(V3_671B)) == pytest.approx(0.135234, abs=5e-7)
    plain = model_config(V3_671B | {"rope_scaling": None})
    assert softmax_scale(plain) == pytest.approx(192**-0.5)


def test_yarn_keeps_fast_pairs_divides_slow_ones_and_blends_between():
    """671B: pairs 0 to 10 turn 32 times in 4,096 positions, pairs 23 to 31 not even once."""
    plain = 10000.0 ** (-np.arange(0, 64, 2) / 64)
    turns = 4096 * plain / (2 * math.pi)
    found = np.asarray(inverse_frequencies(model_config(V3_671B)), np.float64)
    np.testing.assert_allclose(found[turns > 32], plain[turns > 32], rtol=1e-6)
    np.testing.assert_allclose(found[turns < 1], plain[turns < 1] / 40, rtol=1e-6)
    between = (turns < 32) & (turns > 1)
    assert between.sum() == 12
    ratio = plain[between] / found[between]
    assert np.all((ratio > 1) & (ratio < 40)) and np.all(np.diff(ratio) > 0)


@pytest.mark.parametrize("name", CASES)
def test_rotation_equals_the_oracle(name):
    """With heads (queries) and without (the shared key), from position 0 and in between."""
    config, random = CASES[name], np.random.default_rng(0)
    for shape, start in (((2, 7), 0), ((2, 7, 3), 5)):
        x = random.standard_normal((*shape, config["qk_rope_head_dim"])).astype(np.float32)
        positions = jnp.arange(start, start + 7)[None]
        found = rotate(jnp.asarray(x), rotary(model_config(config), positions))
        assert_close(found, oracle.rotate(config, x, start).value, FLOAT32_OP)


def test_neighbouring_channels_turn_as_one_complex_number():
    config = tiny_config(rope_theta=100.0, qk_rope_head_dim=6)
    x = np.random.default_rng(1).standard_normal((2, 5, 6)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [9, 2, 2, 40, 0]])
    found = np.asarray(rotate(jnp.asarray(x), rotary(model_config(config), jnp.asarray(positions))))
    angles = positions[..., None] * 100.0 ** (-np.arange(3) / 3)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)
    assert_close(found[..., 0::2], turned.real, FLOAT32_OP)
    assert_close(found[..., 1::2], turned.imag, FLOAT32_OP)


def test_products_depend_on_the_distance_alone():
    config = model_config(tiny_config(rope_scaling=YARN))
    random = np.random.default_rng(2)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 6)), jnp.float32) for _ in range(2))

    def product(query_position, key_position):
        turned = [
            rotate(x, rotary(config, jnp.asarray([[position]])))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(7, 3) == pytest.approx(product(4, 0), rel=1e-5)
    assert abs(product(7, 3) - product(7, 4)) > 1e-2


def test_bfloat16_is_rotated_in_float32():
    """The right bfloat16 value nearly everywhere, and cos and sin stay float32."""
    config = tiny_config()
    x = jnp.asarray(np.random.default_rng(3).standard_normal((4, 30, 6)), jnp.bfloat16)
    angles = rotary(model_config(config), jnp.arange(30)[None])
    assert angles.cos.dtype == angles.sin.dtype == jnp.float32
    found = rotate(x, angles)
    assert found.dtype == jnp.bfloat16
    expected = oracle.rotate(config, np.asarray(x, np.float64)).value
    expected = jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16)
    assert np.mean(np.asarray(found) == np.asarray(expected)) > 0.995


def test_yarn_without_mscales_scales_the_vectors_not_the_softmax():
    """As transformers does where config.json names neither: both factors are get_mscale(factor)."""
    yarn = YarnConfig(factor=40.0, mscale=0.0, mscale_all_dim=0.0)
    config = model_config(tiny_config(), rope_scaling=yarn)
    assert softmax_scale(config) == pytest.approx(10**-0.5)
    norm = jnp.linalg.norm(rotate(jnp.ones((1, 1, 6)), rotary(config, jnp.asarray([[3]]))))
    assert float(norm) == pytest.approx(1.368888 * 6**0.5, rel=1e-5)
