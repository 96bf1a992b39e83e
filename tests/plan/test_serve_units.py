"""Serving units: weights against counts, passes against published ones and bounds."""

from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.model.accounting import count_parameters
from dsv3_jax.plan.calibration import published
from dsv3_jax.plan.cluster import changed, find_cluster
from dsv3_jax.plan.serve_units import (
    Unit,
    decode_step,
    low_latency_seconds,
    prefill_pass,
    serving_overhead,
)

H800 = find_cluster("h800_2048")
FP8 = PrecisionConfig(recipe="fp8")


def unit(gpus, **fields):
    return Unit(cluster=H800, model=ModelConfig(), precision=FP8, gpus=gpus, **fields)


def test_the_production_units():
    """DeepSeek, day 6: prefill on 32 GPUs with 9 routed experts each, decode on 144 with 2."""
    assert (unit(32).routed_per_gpu, unit(144).routed_per_gpu) == (9, 2)
    assert unit(144).cache_tokens > 128 * 4989  # the batch of its profile fits
    with pytest.raises(ValueError, match="gpus is 100, expected a divisor of the 288"):
        unit(100)
    dense = ModelConfig(n_routed_experts=0, first_k_dense_replace=61, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match="n_routed_experts is 0, expected experts"):
        Unit(cluster=H800, model=dense, precision=FP8, gpus=8)


def test_weights_are_the_model_s():
    """One GPU holds all 671B parameters: a byte each, and one more for embedding and head."""
    model = ModelConfig()
    total = count_parameters(model).total
    whole = unit(1, redundant=0).weight_bytes
    extra = 2 * model.vocab_size * model.hidden_size + 58 * 256 * 7169
    assert whole == pytest.approx(total + extra, rel=3e-4)  # norms and scales aside
    assert unit(144, drafts=True).weight_bytes > unit(144).weight_bytes


def test_low_latency_transfers_are_deepep_s():
    given = published("low_latency")
    for at, gpus in enumerate(given["expert_gpus"]):
        expected = given["dispatch_seconds"][at] + given["combine_seconds"][at]
        assert low_latency_seconds(unit(gpus, redundant=0), 128) == pytest.approx(expected)
    small = low_latency_seconds(unit(64, redundant=0), 16)
    assert small < low_latency_seconds(unit(64, redundant=0), 128) / 6
    assert low_latency_seconds(unit(1, redundant=0), 128) == 0


def test_the_overhead_makes_sglang_s_passes():
    """SGLang on H100: 22,282 tokens/s a node, 256 requests a GPU; prefill 50,302."""
    h100 = find_cluster("h100_1024")
    on_h100 = [replace(unit(gpus), cluster=h100) for gpus in (72, 32)]
    step = decode_step(on_h100[0], 256, 2000)
    assert 256 * 8 / step.seconds == pytest.approx(22_282)
    first = prefill_pass(on_h100[1], 16384, 4096, 0.0)
    assert 16384 * 8 / first.seconds == pytest.approx(50_302)
    # With experts loaded evenly SGLang reached 59,337: a part of the overhead.
    assert 59_337 / 50_302 < serving_overhead("prefill") < 1.5
    assert 1 < serving_overhead("decode") < 2


def test_deepseek_s_prefill_profile():
    """62,713 tokens/s a node, the experts loaded evenly; not fitted."""
    found = prefill_pass(unit(32), 16384, 4096, 0.0, overhead=False)
    assert 16384 * 8 / found.ideal_seconds == pytest.approx(62_713, rel=0.20)


def test_a_decode_step_is_above_its_bounds():
    step = decode_step(unit(144), 128, 4989, overhead=False)
    model = ModelConfig()
    weights = unit(144).weight_bytes
    cache = 128 * 4989 * 70_272
    assert step.ideal_seconds > (weights + cache) / 3.35e12
    assert step.ideal_seconds >= max(step.compute_seconds, step.exchange_seconds) * 0.99
    flops = 2 * 128 * (37.5e9 - model.vocab_size * model.hidden_size)
    assert step.ideal_seconds > flops / 1979e12


def test_passes_move_as_they_must():
    base = decode_step(unit(144), 96, 4989).seconds
    assert decode_step(unit(144), 96, 9000).seconds > base
    assert decode_step(unit(144), 192, 4989).seconds > base
    assert decode_step(unit(144, drafts=True), 96, 4989).seconds > base
    assert decode_step(unit(144, cache="fp8"), 96, 4989).seconds <= base
    faster = replace(unit(144), cluster=changed(H800, "gpu.memory_bytes_per_second", "6.7e12"))
    assert decode_step(faster, 96, 4989).seconds < base
    first = prefill_pass(unit(32), 16384, 4096, 0.0).seconds
    assert prefill_pass(unit(32), 8192, 4096, 0.0).seconds == pytest.approx(first / 2, rel=0.1)
    assert prefill_pass(unit(32), 16384, 4096, 0.5).seconds > first  # the same, with more to see
    assert prefill_pass(unit(32, imbalance=1.5), 16384, 4096, 0.0).seconds > first
