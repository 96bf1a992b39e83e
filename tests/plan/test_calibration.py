"""What the planner is fitted to is what was published, and the fits are as close as they say."""

import math

import pytest

from dsv3_jax.plan.calibration import (
    H800,
    gemm_fit,
    profile,
    published,
    rounds,
    training_fit,
)


def test_deepgemm_s_figures_are_those_of_the_kernels():
    from dsv3_kernels.published import DENSE, ROWS

    given = published("fp8_gemm")
    assert given["rows"] == ROWS
    assert {(i["n"], i["k"]): i["speed"] for i in given["flops_per_second"]} == DENSE


def test_rounds_by_brute_force():
    for rows, n, sms, groups in [(4096, 2112, 132, 1), (100, 130, 3, 2), (8192, 4096, 112, 4)]:
        tiles = [
            (g, i, j) for g in range(groups) for i in range(0, rows, 128) for j in range(0, n, 128)
        ]
        assert rounds(rows, n, sms, groups) == math.ceil(len(tiles) / sms)


def test_the_gemm_s_fit_is_close_and_physical():
    fit = gemm_fit()
    assert max(abs(error) for error in fit.errors) < 0.041
    assert 0.7 < fit.share_of_peak < 1  # of the FP8 peak, in an endless product
    assert 1e-7 < fit.fill_seconds < 3e-6  # a few memory latencies
    shape = next(i for i in published("fp8_gemm")["flops_per_second"] if i["k"] == 16384)
    by_hand = rounds(4096, shape["n"], 132) * (fit.fill_seconds + 16384 * fit.per_k_seconds)
    speed = 2 * 4096 * shape["n"] * 16384 / by_hand
    assert speed == pytest.approx(shape["speed"], rel=0.041)


def test_the_profile_is_whole():
    found = profile()
    assert found["pair_seconds"] == pytest.approx(129.0e-3, abs=5e-5)  # as others read it
    assert (found["tokens"], found["expert_gpus"], found["layers"]) == (4096, 64, 4)
    computed = ("attn(F)", "attn(B)", "attn(W)", "mlp(F)", "mlp(B)", "mlp(W)")
    parts = found["parts"]
    # The multiprocessors are busy for most of the pair, and so are the links.
    assert 0.9 < 4 * sum(parts[name]["wall"] for name in computed) / found["pair_seconds"] < 1
    sent = ("combine(F)", "combine(B)", "dispatch(F)", "dispatch(B)")
    assert 0.8 < 4 * sum(parts[name]["wall"] for name in sent) / found["pair_seconds"] < 1
    gemms = [name for name in parts["attn(B)"] if name.startswith("gemm ")]
    assert len(gemms) == 7  # five gradients of inputs, two up-projections computed again


def test_slowdowns_are_between_the_kernels_of_their_kind():
    fit = training_fit()
    assert 1.1 < fit.gemm_slowdown < 1.3
    assert 1.6 < fit.weight_gemm_slowdown < 2.0
    # Attention of 4,096 tokens, 128 heads, causal: below the peak of 112 multiprocessors.
    flops = 2 * 128 * 320 * 4096**2 / 2
    share = flops / fit.attention_forward_seconds / H800.bf16_flops_per_second * 132 / 112
    assert 0.5 < share < 0.8
    assert 3 < fit.attention_backward_seconds / fit.attention_forward_seconds < 4
