"""Predictions beside DeepEP's figures: what a comparison is, and how far off it is."""

import numpy as np
import pytest

from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.network.deepep import (
    MEASURED_SECONDS,
    Comparison,
    compare_bandwidths,
    compare_latencies,
    low_latency_seconds,
)

H800 = find_gpu("h800")


def test_the_error_is_relative_to_what_was_measured():
    assert Comparison(what="x", gpus=8, measured=4.0, predicted=5.0).relative_error == 0.25


def test_two_nodes_are_bound_by_nvlink():
    """Both nodes get nearly every token; a GPU's 6.4 copies in its node take longer than the NIC's.

    8 of 256 experts touch 16 (1 - C(240,8)/C(256,8)) = 6.4 of 16 GPUs, 7/8 of them over NVLink, and
    all but 0.7 % of the tokens 2 nodes: 2 / (6.4 · 7/8) of 160 GB/s, up to the busiest GPU.
    """
    dispatch, combine = compare_bandwidths(H800, sizes=(16,))
    assert (dispatch.what, combine.what) == ("dispatch", "combine")
    assert dispatch.predicted == pytest.approx(2 / (6.4 * 7 / 8) * 160e9, rel=0.05)
    assert combine.predicted == pytest.approx(dispatch.predicted, rel=1e-6)


@pytest.mark.slow
def test_bandwidths_over_the_network():
    """With 40 of 50 GB/s, from four nodes on: within 12 % of the measured."""
    for found in compare_bandwidths(H800, sizes=(32, 64, 128)):
        assert abs(found.relative_error) < 0.12


def test_low_latency_kernels():
    """Over the network from 16 GPUs on: the mean error below 6 %, none above 20 %."""
    found = [c for c in compare_latencies(H800) if c.gpus > 8]
    errors = np.array([abs(c.relative_error) for c in found])
    assert len(errors) == 2 * (len(MEASURED_SECONDS) - 1)
    assert errors.mean() < 0.06 and errors.max() < 0.20


def test_low_latency_by_hand():
    """64 GPUs: 896 of 1,024 messages of 7,408 bytes over a NIC at 40 GB/s, after 2.8 µs."""
    seconds = low_latency_seconds(64, 7408.0, H800)
    assert seconds == pytest.approx(896 * 7408 / 40e9 + 2.8e-6, rel=1e-3)


def test_a_proxy_could_not():
    """896 messages at 1.7 million a second take 527 µs, three times what was measured."""
    seconds = low_latency_seconds(64, 7408.0, H800, initiator="proxy")
    assert seconds == pytest.approx(896 / 1.7e6 + 2.8e-6, rel=0.01)
    assert seconds > 3 * MEASURED_SECONDS[64][0]
