"""Quantiles against sorted lists, lines against those they were drawn from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serve.server.latency import Line, RollingCount, RollingQuantile


@given(
    values=st.lists(st.floats(1e-4, 100), min_size=1, max_size=60),
    share=st.sampled_from([0.5, 0.95, 0.99]),
)
def test_a_quantile_is_the_sorted_lists_to_nine_percent(values, share):
    rolling = RollingQuantile()
    for place, value in enumerate(values):
        rolling.add(value, now=place * 0.5)
    expected = np.quantile(values, share, method="inverted_cdf")
    assert rolling.quantile(share, now=29.9) == pytest.approx(expected, rel=0.09)


def test_what_is_older_than_a_minute_is_forgotten():
    rolling = RollingQuantile()
    assert rolling.quantile(0.95, now=0.0) is None
    rolling.add(10.0, now=0.0, count=100)
    rolling.add(0.1, now=30.0, count=100)
    assert rolling.quantile(0.95, now=59.0) == pytest.approx(10, rel=0.09)
    assert rolling.seconds_over(0.95, 1.0, now=50.0) == 10
    assert rolling.quantile(0.95, now=60.0) == pytest.approx(0.1, rel=0.09)
    assert rolling.seconds_over(0.95, 1.0, now=60.0) == 0
    assert rolling.quantile(0.95, now=91.0) is None
    rolling.add(0.1, now=200.0)
    assert len(rolling._rows) == 1  # memory does not grow


def test_counts_a_second():
    count = RollingCount(10)
    assert count.per_second(0.0) == 0
    for second in range(100):
        count.add(5, second + 0.5)
    assert count.per_second(99.9) == pytest.approx(5)
    assert count.per_second(120.0) == 0


def test_a_rate_is_right_from_the_first_seconds_on():
    count = RollingCount(60)
    for second in range(4):
        count.add(2, float(second))
    assert count.per_second(4.0) == pytest.approx(2)


@settings(max_examples=30)
@given(start=st.floats(0, 1), slope=st.floats(0, 1))
def test_a_line_finds_the_line(start, slope):
    line = Line()
    for x in (1, 5, 2, 30, 7):
        line.add(x, start + slope * x)
    assert line.at(100) == pytest.approx(start + slope * 100, rel=1e-4, abs=1e-4)


def test_a_line_of_one_place_is_flat_and_follows_the_newest():
    line = Line()
    assert line.at(5) is None
    line.add(10, 2.0)
    assert line.at(10) == line.at(1000) == pytest.approx(2.0)
    for _ in range(500):
        line.add(10, 4.0)
    assert line.at(10) == pytest.approx(4.0, rel=1e-3)


def test_a_line_never_falls_nor_predicts_less_than_nothing():
    falling, steep = Line(), Line()
    for x in range(1, 20):
        falling.add(x, 100.0 - x)
        steep.add(x, max(x - 10.0, 0.0))
    assert falling.at(50) == pytest.approx(falling.at(0))
    assert steep.at(0) == 0 and steep.at(50) > 0
