"""Rotary positions and YaRN against complex numbers and published constants."""

import numpy as np
import pytest

from . import rope
from .cases import V3_671B, YARN, tiny_config


def test_interleaved_pairs_turn_as_complex_numbers():
    config = tiny_config(qk_rope_head_dim=6)
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 6))
    turned = rope.rotate(config, x, start=7).value
    for position in range(5):
        for pair in range(3):
            angle = (7 + position) * 100.0 ** (-2 * pair / 6)
            number = x[:, position, :, 2 * pair] + 1j * x[:, position, :, 2 * pair + 1]
            number = number * np.exp(1j * angle)
            np.testing.assert_allclose(turned[:, position, :, 2 * pair], number.real, atol=1e-14)
            np.testing.assert_allclose(
                turned[:, position, :, 2 * pair + 1], number.imag, atol=1e-14
            )


def test_scores_depend_on_the_distance_only():
    config = tiny_config()
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 6))
    near = rope.rotate(config, query, 9).value @ rope.rotate(config, key, 4).value[0].T
    far = rope.rotate(config, query, 1009).value @ rope.rotate(config, key, 1004).value[0].T
    np.testing.assert_allclose(near, far, atol=1e-12)


def test_published_magnitude_and_softmax_scale():
    """m = 1.368888, m^2 = 1.873854, scale 0.135234 for the 671B model (reference facts, 1.1)."""
    assert rope.magnitude_scale(40, 1.0) == pytest.approx(1.368888, abs=5e-7)
    assert rope.magnitude_scale(40, 1.0) ** 2 == pytest.approx(1.873854, abs=5e-7)
    assert rope.magnitude_scale(1.0, 1.0) == 1.0
    assert rope.softmax_scale(V3_671B) == pytest.approx(0.135234, abs=5e-7)
    assert rope.softmax_scale(V3_671B | {"rope_scaling": None}) == 192**-0.5


def test_yarn_leaves_fast_pairs_and_divides_slow_ones():
    """671B: dim 64, so pairs 10 to 23 are blended (32 turns at 10.5, one turn at 22.5)."""
    plain = rope.frequencies(V3_671B | {"rope_scaling": None})
    yarn = rope.frequencies(V3_671B)
    np.testing.assert_array_equal(yarn[:11], plain[:11])
    np.testing.assert_allclose(yarn[23:], plain[23:] / 40, rtol=1e-15)
    middle = (11 - 10) / (23 - 10)
    assert yarn[11] == pytest.approx(plain[11] * (1 - middle) + plain[11] / 40 * middle)
    assert np.all(np.diff(yarn) < 0)


def test_yarn_with_an_empty_ramp_does_not_divide_by_zero():
    scaling = YARN | {"original_max_position_embeddings": 6}
    config = tiny_config(qk_rope_head_dim=4, rope_scaling=scaling)
    np.testing.assert_allclose(rope.frequencies(config), [1.0, 0.1 / 40])


def test_yarn_ramp_ends_at_dim_minus_one_at_most():
    """Not at the last pair, dim / 2 - 1: here pair 1 lies a third of the way from 0 to 3.

    The fast end is pair -1 (4 ln(4096 / 2000 pi) / 2 ln 10 = -0.4) and counts as 0, the slow end
    is pair 6 (4 ln(4096 / 2 pi) / 2 ln 10 = 5.6) and counts as 3.
    """
    scaling = YARN | {"beta_fast": 1000}
    config = tiny_config(qk_rope_head_dim=4, rope_theta=10.0, rope_scaling=scaling)
    expected = [1.0, 10**-0.5 * (2 / 3 + 1 / 3 / 40)]
    np.testing.assert_allclose(rope.frequencies(config), expected, rtol=1e-14)


def test_softmax_scale_takes_mscale_all_dim_and_not_mscale():
    config = V3_671B | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 2.0}}
    expected = (0.2 * np.log(40) + 1) ** 2 / 192**0.5
    assert rope.softmax_scale(config) == pytest.approx(expected, rel=1e-14)
    del config["rope_scaling"]["mscale_all_dim"]
    assert rope.softmax_scale(config) == 192**-0.5


def test_cos_and_sin_carry_the_ratio_of_magnitudes():
    scaling = YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}
    x = np.random.default_rng(0).standard_normal((1, 4, 6))
    plain = rope.rotate(tiny_config(rope_scaling=YARN), x).value
    scaled = rope.rotate(tiny_config(rope_scaling=scaling), x).value
    np.testing.assert_allclose(scaled, plain * (0.2 * np.log(40) + 1) / (0.1 * np.log(40) + 1))
