"""Step predictions beside published runs, which they were not fitted to, and how they add up."""

import json
from dataclasses import replace

import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dsv3_jax.plan import train_report
from dsv3_jax.plan.cluster import changed, find_cluster
from dsv3_jax.plan.megatron import predict_megatron
from dsv3_jax.plan.published_tables import STEP_TABLE, published_run, step_figures
from dsv3_jax.plan.train_plan import predict_training

H800 = find_cluster("h800_2048")


@pytest.fixture(scope="module")
def published():
    return predict_training(published_run(), H800, tokens=14.8e12)


def test_deepseek_s_step(published):
    plan, _ = published
    assert plan.step_seconds == pytest.approx(19.926, rel=0.10)
    found = step_figures(plan)
    close = ("1B (s)", "1W (s)", "1F1B (s)", "optimizer (s)", "MFU, causal", "MFU, not causal")
    for name in close:
        assert found[name] == pytest.approx(STEP_TABLE[name], rel=0.10), name
    # The paper's lone forwards and its bubble hold waiting that no schedule has.
    assert 0.8 < found["1F (s)"] / STEP_TABLE["1F (s)"] < 1
    assert 0.5 < found["bubble (s)"] / STEP_TABLE["bubble (s)"] < 1


def test_megatron_s_run():
    plan = predict_megatron()
    assert plan.tokens_per_second_per_gpu == pytest.approx(1297, rel=0.15)
    assert plan.error == plan.tokens_per_second_per_gpu / 1297 - 1
    # What overlapping saves: a third of its step waits for experts' rows.
    assert 0.25 < plan.exchange_seconds / plan.step_seconds < 0.4


def test_the_errors_that_are_printed_are_so(published):
    step = published[0].step_seconds / 19.926 - 1
    assert f"{100 * step:.1f} % on DeepSeek's" in train_report.STEP_ERROR
    assert f"{100 * predict_megatron().error:.1f} % on Megatron's" in train_report.STEP_ERROR


def test_everything_adds_up(published):
    plan, detail = published
    for parts in (plan.parts, plan.mean_parts):
        assert parts.total + plan.optimizer_seconds == pytest.approx(plan.step_seconds)
    assert sum(train_report.step_seconds(plan).values()) == pytest.approx(plan.step_seconds)
    assert plan.tokens_per_step == 15360 * 4096
    per_second = plan.tokens_per_step / plan.step_seconds
    assert plan.tokens_per_day == pytest.approx(86400 * per_second)
    # 250.46 GFLOP a token (Table 2) over 989.4 TFLOP/s.
    assert plan.mfu_causal == pytest.approx(250.456e9 * per_second / 2048 / 989.4e12, rel=1e-4)
    assert plan.gpu_hours == pytest.approx(14.8e12 / per_second * 2048 / 3600)
    assert plan.dollars == pytest.approx(2 * plan.gpu_hours)
    assert plan.days == pytest.approx(plan.gpu_hours / 2048 / 24)
    assert detail.timeline.total_seconds == pytest.approx(plan.parts.total)


def few_micro_batches():
    config = published_run()
    return replace(
        config,
        parallel=replace(config.parallel, micro_batches=32),
        train=replace(config.train, batch_size=4096),
    )


def test_hardware_moves_it_as_it_must():
    base = predict_training(few_micro_batches(), H800)[0].step_seconds

    def step(field, value):
        cluster = changed(H800, field, value)
        return predict_training(few_micro_batches(), cluster)[0].step_seconds

    assert step("gpu.memory_bytes_per_second", "6.7e12") < base
    assert step("gpu.network_achieved_bytes_per_second", "20e9") > 1.2 * base
    assert step("cluster.communication_sms", "0") < base
    assert step("gpu.fp8_flops_per_second", "4e15") < 0.9 * base


def test_imbalance_and_prices():
    free = replace(H800, gpu_dollars_per_hour=None)
    even, _ = predict_training(few_micro_batches(), free)
    busy, _ = predict_training(few_micro_batches(), H800, imbalance=1.3)
    assert busy.step_seconds > 1.05 * even.step_seconds
    assert even.dollars is None and busy.dollars is not None


def test_one_gpu_has_no_pipeline_nor_transfers():
    config = RunConfig(train=TrainConfig(batch_size=4, accumulation=2))
    plan, detail = predict_training(config, find_cluster("h800_node"))
    assert (plan.ranks, plan.gpus, plan.pair_seconds) == (1, 1, None)
    assert plan.parts.bubble == plan.parts.overlapped == 0
    assert detail.pair is None
    assert not plan.fits  # 671B parameters


def test_a_dense_model_has_no_rows_to_send():
    model = ModelConfig(
        num_hidden_layers=4,
        first_k_dense_replace=4,
        n_routed_experts=0,
        num_nextn_predict_layers=0,
    )
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(pipe=2, gpu=4, schedule="1f1b", micro_batches=4),
        train=TrainConfig(batch_size=16),
    )
    plan, detail = predict_training(config, find_cluster("h800_node"))
    assert plan.fits and plan.step_seconds > 0
    assert detail.times.spread.gpus == 1


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match=r"2048, expected at most the 8 of cluster h800_node"):
        predict_training(published_run(), find_cluster("h800_node"))
    with pytest.raises(ValueError, match=r"imbalance is 0.5, expected at least 1"):
        predict_training(published_run(), H800, imbalance=0.5)
    with pytest.raises(ValueError, match=r"tokens is 0.0, expected a positive number"):
        predict_training(published_run(), H800, tokens=0.0)


def test_report(published):
    plan, _ = published
    values = json.loads(json.dumps(train_report.as_json(plan)))
    assert values["step_seconds"] == plan.step_seconds
    assert values["memory"]["total"] == plan.memory.total
    text = train_report.as_text(plan)
    assert f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU" in text
    assert "14,800B tokens" in text
    assert "does not fit" in train_report.as_text(replace(plan, fits=False))
    assert all(f"assumed: {remark}" in text for remark in train_report.assumptions(plan))
    other = replace(plan, gpu="b200")
    assert len(train_report.assumptions(other)) == len(train_report.assumptions(plan)) + 1
