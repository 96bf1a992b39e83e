"""The selection bias moves against the load, by its rate, and by nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.train.balance import max_over_mean, update_selection_bias
from tests import oracle


def updated(bias, load, rate) -> np.ndarray:
    arrays = (jnp.asarray(a, jnp.float32) for a in (bias, load, rate))
    return np.asarray(update_selection_bias(*arrays))


def test_up_below_the_mean_down_above_it_nothing_at_it():
    found = updated([0.0, 0.5, -0.5, 0.1], [4, 0, 2, 2], 0.001)
    np.testing.assert_array_equal(found, np.float32([-0.001, 0.501, -0.5, 0.1]))


def test_the_step_has_the_same_size_however_far_the_load_is_off():
    found = updated(np.zeros(4), [1000, 999, 1001, 0], 0.25)
    np.testing.assert_array_equal(found, [-0.25, -0.25, -0.25, 0.25])


def test_every_layer_has_its_own_mean():
    load = np.array([[1, 3], [10, 30], [7, 7]])
    found = updated(np.zeros((3, 2)), load, 0.5)
    np.testing.assert_array_equal(found, [[0.5, -0.5], [0.5, -0.5], [0.0, 0.0]])


def test_a_rate_of_zero_leaves_the_bias():
    bias = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    found = updated(bias, np.arange(16).reshape(2, 8), 0.0)
    np.testing.assert_array_equal(found, bias)


def test_equals_the_oracles():
    """At 256 experts and 15,360 x 4,096 tokens, where float32 no longer counts in ones."""
    generator = np.random.default_rng(1)
    tokens = 15360 * 4096 * 8
    load = generator.multinomial(tokens, generator.dirichlet(np.full(256, 50.0)))
    bias = generator.normal(size=256) * 0.01
    found = updated(bias, load, 0.001)
    np.testing.assert_allclose(found, oracle.update_selection_bias(bias, load, 0.001), atol=1e-8)


def test_the_imbalance_is_that_of_the_worst_layer():
    load = jnp.array([[2.0, 2.0, 2.0], [1.0, 4.0, 1.0], [0.0, 1.0, 2.0]])
    assert float(max_over_mean(load)) == pytest.approx(2.0)
    assert float(max_over_mean(load[:1])) == 1.0
