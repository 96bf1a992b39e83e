"""Operations scale as they must, routing is counted as by brute force, transfers as published."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.plan.calibration import gemm_fit, rounds, training_fit
from dsv3_jax.plan.cluster import changed, find_cluster
from dsv3_jax.plan.machine import CODEC_FACTOR, Machine, exchange, fanout

H800 = find_cluster("h800_2048")
FP8 = PrecisionConfig(recipe="fp8")


def machine(cluster=H800, recipe="fp8", sms=132, training=True):
    return Machine(cluster=cluster, recipe=recipe, sms=sms, training=training)


def test_a_large_gemm_takes_the_fit_s_rounds():
    fit, slow = gemm_fit(), training_fit().gemm_slowdown
    expected = rounds(4096, 7168, 112) * (fit.fill_seconds + 4096 * fit.per_k_seconds)
    assert machine(sms=112, training=False).gemm(4096, 7168, 4096) == pytest.approx(expected)
    assert machine(sms=112).gemm(4096, 7168, 4096) == pytest.approx(slow * expected)


def test_gemms_are_ordered_by_precision_and_peak():
    fp8, bf16, fp32 = (machine(recipe=r).gemm(4096, 7168, 4096) for r in ("fp8", "bf16", "fp32"))
    assert fp8 < bf16 < fp32
    faster = changed(H800, "gpu.fp8_flops_per_second", "3.9578e15")
    assert 0.5 < machine(faster).gemm(4096, 7168, 4096) / fp8 < 0.6  # filling stays
    assert machine().gemm(4096, 7168, 4096, weight=True) > fp8
    assert machine().gemm(0, 7168, 4096) == 0


def test_a_small_gemm_reads_its_weights():
    """64 rows: DeepGEMM reached 1,688 to 2,668 GB/s."""
    for n, k in ((7168, 16384), (24576, 1536), (4096, 7168)):
        seconds = machine(training=False).gemm(64, n, k)
        moved = 64 * k + n * k + 2 * 64 * n
        assert 0.5 * 1688e9 < moved / seconds < 2668e9


def test_attention_scales_with_tokens_and_length():
    m, one = ModelConfig(), machine(sms=112)
    base = one.attention(m, 4096, 4096, backward=False)
    assert base == pytest.approx(training_fit().attention_forward_seconds)
    assert one.attention(m, 8192, 8192, backward=False) == pytest.approx(4 * base)
    half = replace(m, num_attention_heads=64)
    assert one.attention(half, 4096, 4096, backward=False) == pytest.approx(base / 2)
    assert machine(sms=56).attention(m, 4096, 4096, backward=False) == pytest.approx(2 * base)


def drawn(model, parts, tokens=2000):
    """Parts touched a token, drawing groups and experts evenly."""
    rng = np.random.default_rng(0)
    size = model.n_routed_experts // model.n_group
    touched = 0
    for _ in range(tokens):
        groups = rng.choice(model.n_group, model.topk_group, replace=False)
        pool = (groups[:, None] * size + np.arange(size)).ravel()
        experts = rng.choice(pool, model.num_experts_per_tok, replace=False)
        touched += len(set(experts * parts // model.n_routed_experts))
    return touched / tokens


@pytest.mark.parametrize("gpus", [16, 32, 64, 128])
def test_fanout_is_as_drawn(gpus):
    model, spread = ModelConfig(), fanout(ModelConfig(), gpus, 8)
    assert spread.nodes == pytest.approx(drawn(model, gpus // 8), rel=0.03)
    assert spread.gpus == pytest.approx(drawn(model, gpus), rel=0.03)


def test_fanout_of_a_small_model_by_every_choice():
    model = replace(
        ModelConfig(), n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2
    )
    touched = []
    for groups in itertools.combinations(range(4), 2):
        pool = [2 * g + i for g in groups for i in (0, 1)]
        touched += [len({e // 4 for e in pair}) for pair in itertools.combinations(pool, 2)]
    assert fanout(model, 2, 1).nodes == pytest.approx(sum(touched) / len(touched))


def test_the_published_fanout():
    spread = fanout(ModelConfig(), 64, 8)
    assert spread.nodes == pytest.approx(3.63, abs=0.005)  # facts: four groups of 32 experts
    assert spread.remote_nodes == pytest.approx(3.63 * 7 / 8, abs=0.005)
    free = replace(ModelConfig(), n_group=1, topk_group=1)
    assert fanout(free, 64, 8).nodes == pytest.approx(5.29, abs=0.005)  # "Insights" §4.3
    alone = fanout(ModelConfig(), 8, 8)
    assert (alone.nodes, alone.remote_nodes) == (1, 0)


def test_transfers_alone_are_deepep_s():
    """Of 4,096 tokens over 64 GPUs: 51 and 50 GB/s of what goes to all nodes."""
    model, spread = ModelConfig(), fanout(ModelConfig(), 64, 8)
    found = exchange(H800, model, FP8, 4096, spread, beside=False)
    row = 4096 * spread.nodes * 7168
    assert row * (1 + 4 / 128) / found.dispatch == pytest.approx(51e9, rel=0.02)
    assert row * 2 / found.combine == pytest.approx(50e9, rel=0.02)
    within = exchange(H800, model, FP8, 4096, fanout(model, 8, 8), beside=False)
    received = 4096 * fanout(model, 8, 8).remote_gpus * 7168
    assert received * (1 + 4 / 128) / within.dispatch == pytest.approx(153e9, rel=0.03)
    assert received * 2 / within.combine == pytest.approx(158e9, rel=0.03)


def test_transfers_by_format_and_network():
    model, spread = ModelConfig(), fanout(ModelConfig(), 64, 8)

    def combine(cluster, fmt):
        precision = PrecisionConfig(recipe="fp8", combine=fmt)
        return exchange(cluster, model, precision, 4096, spread, beside=False).combine

    codec = replace(H800, in_network="codec")
    plain, packed = combine(H800, "bf16"), combine(codec, "logfmt10")
    assert packed / plain == pytest.approx(1.28125 / 2, rel=0.01)
    assert combine(H800, "logfmt10") == pytest.approx(CODEC_FACTOR * packed)
    faster = changed(H800, "gpu.network_achieved_bytes_per_second", "60e9")
    assert combine(faster, "bf16") == pytest.approx(plain / 1.5, rel=0.01)
    fastest = changed(H800, "gpu.network_achieved_bytes_per_second", "400e9")
    assert combine(fastest, "bf16") > plain / 2  # NVLink's hop is left
    one = fanout(model, 1, 8)
    assert exchange(H800, model, FP8, 4096, one, beside=False).dispatch == 0
