"""The paper's bounds to the digit, and how each factor moves them."""

from dataclasses import replace

import pytest

from dsv3_jax.plan.limits import DecodeLimit, local_limit
from dsv3_jax.plan.model_shape import find_model

INFINIBAND = DecodeLimit()
NVL72 = DecodeLimit(bytes_per_second=900e9)


def test_the_published_bounds():
    assert INFINIBAND.exchange_seconds == pytest.approx(120.96e-6, rel=1e-12)
    assert INFINIBAND.layer_seconds == pytest.approx(241.92e-6, rel=1e-12)
    assert round(1e3 * INFINIBAND.token_seconds, 2) == 14.76
    assert int(INFINIBAND.tokens_per_second) == 67
    assert NVL72.exchange_seconds == pytest.approx(6.72e-6, rel=1e-12)
    assert round(1e3 * NVL72.token_seconds, 2) == 0.82
    assert round(NVL72.tokens_per_second, -2) == 1200


def test_the_model_s_own_hidden_size():
    assert round(1e3 * replace(INFINIBAND, hidden_size=7168).token_seconds, 2) == 15.11
    assert round(1e3 * replace(NVL72, hidden_size=7168).token_seconds, 3) == 0.840


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"tokens": 64.0}, 2),
        ({"sends": 18}, 2),
        ({"micro_batches": 1}, 0.5),
        ({"combine_bytes": 1.0}, 2 / 3),
        ({"dispatch_bytes": 0.5, "combine_bytes": 1.0}, 0.5),
        ({"layers": 122}, 2),
        ({"latency_seconds": 60.48e-6}, 2),
    ],
)
def test_every_factor_counts(changes, factor):
    changed = replace(INFINIBAND, **changes)
    assert changed.token_seconds == pytest.approx(factor * INFINIBAND.token_seconds)


@pytest.mark.parametrize("field", ["hidden_size", "tokens", "bytes_per_second", "micro_batches"])
def test_what_cannot_be_is_named(field):
    with pytest.raises(ValueError, match=rf"limits.{field} is 0, expected a positive number"):
        replace(INFINIBAND, **{field: 0})


def test_local_inference_by_hand():
    """36.6B weights of 4 bits and 4,096 tokens of 70,272 bytes, at 1 TB/s and half of it."""
    shape = find_model("deepseek-v3")
    limit = local_limit(shape, bytes_per_second=1e12, bits=4, efficiency=0.5)
    read = 36_625_618_432 / 2 + 4096 * 70_272
    assert limit.token_seconds == pytest.approx(read / 0.5e12)
    assert limit.held_bytes == pytest.approx(671_026_419_200 / 2 + 4096 * 70_272)
    drafted = local_limit(shape, bytes_per_second=1e12, bits=4, efficiency=0.5, accepted=0.8)
    assert drafted.tokens_per_second == pytest.approx(1.8 * limit.tokens_per_second)


def test_local_figures_of_the_paper():
    """V3 reaches about 20 tokens/s on a server of 1 TB/s: below the bound, not by three times."""
    v3 = local_limit(find_model("deepseek-v3"), bytes_per_second=1e12)
    assert 20 < v3.tokens_per_second < 60
    with pytest.raises(ValueError, match=r"efficiency is 2, expected above 0, at most 1"):
        local_limit(find_model("deepseek-v3"), bytes_per_second=1e12, efficiency=2)
