"""Layers and pairs: against the published profile, FLOP ratios, and pairs woven by hand."""

import itertools
from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind
from dsv3_jax.plan.calibration import training_fit
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.layer_times import Job, LayerTimes, chunk_times, layer_times, weave
from dsv3_jax.plan.machine import Exchange, Machine
from dsv3_jax.plan.profile_check import part_errors, predict_profile

H800 = find_cluster("h800_2048")
JOB = Job(model=ModelConfig(), seq=4096, tokens=4096.0, expert_gpus=64)
ONE = Machine(cluster=H800, recipe="fp8", sms=132)


def test_the_published_pair_is_met():
    assert predict_profile() == pytest.approx(training_fit().pair_seconds, rel=0.05)
    assert all(abs(error) < 0.05 for error in part_errors().values()), part_errors()


def layer(**sends):
    zero = {"dispatch": 0.0, "combine": 0.0, "gradient_dispatch": 0.0, "gradient_combine": 0.0}
    return LayerTimes(
        attention=3.0,
        mlp=2.0,
        mlp_dx=4.0,
        mlp_dw=1.0,
        attention_dx=5.0,
        attention_dw=2.0,
        sends=Exchange(**zero | sends),
    )


def test_a_pair_without_transfers_computes_all_the_time():
    woven = weave([layer()] * 2, [layer()] * 2)
    assert woven.seconds == woven.compute_seconds == 2 * 17
    assert (woven.exposed_seconds, woven.link_seconds) == (0, 0)


def test_a_pair_by_hand():
    """gradient dispatch 0-6; attention 0-3, dispatch 6-8; mlp_dx 6-10, gradient combine 10-13,
    mlp_dw 10-11, mlp 11-13, attention_dx 13-18, attention_dw 18-20; combine 13-14."""
    sends = {"dispatch": 2.0, "combine": 1.0, "gradient_dispatch": 6.0, "gradient_combine": 3.0}
    woven = weave([layer(**sends)], [layer(**sends)])
    spans = {i.name: (i.start, i.end) for i in woven.intervals}
    assert spans["mlp dx"] == (6, 10)
    assert spans["gradient combine"] == (10, 13)
    assert spans["mlp"] == (11, 13)
    assert spans["attention dx"] == (13, 18)
    assert spans["combine"] == (13, 14)
    assert (woven.seconds, woven.exposed_seconds, woven.link_seconds) == (20, 3, 12)


def test_lanes_never_hold_two_at_a_time():
    sends = {"dispatch": 2.5, "combine": 7.0, "gradient_dispatch": 1.0, "gradient_combine": 3.0}
    woven = weave([layer(**sends)] * 3, [layer(**sends)] * 3)
    for lane in ("compute", "links"):
        spans = sorted((i.start, i.end) for i in woven.intervals if i.lane == lane)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert woven.seconds >= max(woven.compute_seconds, woven.link_seconds)


def test_backward_is_about_twice_forward():
    for kind in (UnitKind.DENSE, UnitKind.MOE):
        times = layer_times(ONE, JOB, kind)
        forward = times.attention + times.mlp
        back = times.mlp_dx + times.mlp_dw + times.attention_dx + times.attention_dw
        assert 2 < back / forward < 3


def test_what_is_computed_again_costs():
    def back(remat, *kept):
        job = replace(JOB, remat=remat, kept=frozenset(kept))
        times = layer_times(ONE, job, UnitKind.MOE)
        return times.mlp_dx + times.attention_dx

    assert back("none") < back("selective") < back("full")
    every = ("q_latent", "attention_output", "attention_residual", "expert_up", "mlp_gate")
    assert back("full", *every) == pytest.approx(back("selective"))
    assert back("full", *every, "queries") == pytest.approx(back("none"))
    assert back("full", "attention_output") < back("full")


def test_kinds_of_units():
    moe, mtp, head = (layer_times(ONE, JOB, k) for k in (UnitKind.MOE, UnitKind.MTP, UnitKind.NORM))
    assert layer_times(ONE, JOB, UnitKind.EMPTY) == LayerTimes()
    # The MTP module is a MoE layer with a projection before and the head after it.
    assert mtp.mlp == pytest.approx(moe.mlp + head.mlp)
    assert mtp.attention > moe.attention
    # 4,096 x 129,280 x 7,168 products at 0.7 of 989 TFLOP/s, and the logits' passes.
    product = 2 * 4096 * 129280 * 7168 / (0.7 * 989.4e12)
    assert head.mlp_dw == pytest.approx(product)
    assert head.mlp > product


def test_tensor_parallelism_halves_the_heads_work():
    whole = layer_times(ONE, JOB, UnitKind.DENSE)
    half = layer_times(ONE, replace(JOB, tensor=2), UnitKind.DENSE)
    assert 0.45 < half.attention / whole.attention < 0.65
    assert 0.45 < half.mlp_dw / whole.mlp_dw < 0.6


def test_chunks_alone_and_together():
    times = chunk_times(H800, PrecisionConfig(recipe="fp8"), JOB)
    layers = [Unit(UnitKind.MOE, index) for index in range(4)]
    forward, (inputs, weights) = times.forward(layers), times.backward(layers)
    assert forward == pytest.approx(4 * times.forward(layers[:1]))
    pair = times.overlapped(layers, layers)
    assert pair.seconds < forward + inputs + weights  # what overlapping is for
    busy = replace(JOB, imbalance=1.5)
    slower = chunk_times(H800, PrecisionConfig(recipe="fp8"), busy)
    assert slower.forward(layers) > 1.1 * forward
