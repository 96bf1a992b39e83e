"""The bench: its figures agree with each other, with accounting and with what it prints."""

import dataclasses
import json

import pytest

from dsv3_jax.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dsv3_jax.model.accounting import count_flops
from dsv3_jax.plan.bench import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    BenchReport,
    bench_decode,
    bench_train,
    matrix_peak_gflops,
    print_report,
)

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=64,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        max_position_embeddings=128,
        eos_token_id=3,
    ),
    data=DataConfig(seq_len=16),
    train=TrainConfig(batch_size=4, accumulation=2),
)
REPORT = BenchReport(
    what="train",
    batch_size=8,
    tokens_per_second=2048.0,
    step_seconds=1.0,
    step_seconds_min=0.9,
    step_seconds_max=1.25,
    compile_seconds=12.5,
    model_flops_per_token=3e7,
    model_gflops=61.44,
    matrix_peak_gflops=128.0,
    share_of_peak=0.48,
    device="cpu",
)


def assert_consistent(report, tokens_a_step):
    """What holds whatever the speed is."""
    assert report.tokens_per_second * report.step_seconds == pytest.approx(tokens_a_step)
    flops_per_second = report.model_flops_per_token * report.tokens_per_second
    assert report.model_gflops == pytest.approx(flops_per_second / 1e9)
    assert report.share_of_peak == pytest.approx(report.model_gflops / report.matrix_peak_gflops)
    assert 0 < report.step_seconds_min <= report.step_seconds <= report.step_seconds_max
    assert report.compile_seconds > 0
    assert report.device == "cpu"


@pytest.mark.slow
def test_train():
    report = bench_train(CONFIG, batch_size=3, repeats=2)
    assert (report.what, report.batch_size) == ("train", 3)
    assert_consistent(report, tokens_a_step=3 * 16)
    assert report.model_flops_per_token == count_flops(CONFIG.model, 16).training


@pytest.mark.slow
def test_decode_never_ends_early():
    """Whatever token ends a text: the figure counts all 64."""
    report = bench_decode(CONFIG, batch_size=3, repeats=2)
    assert (report.what, report.batch_size) == ("decode", 3)
    assert_consistent(report, tokens_a_step=3)
    forward = count_flops(CONFIG.model, PROMPT_TOKENS + NEW_TOKENS).forward
    assert report.model_flops_per_token == forward


@pytest.mark.slow
def test_decode_refuses_a_model_too_short():
    short = dataclasses.replace(CONFIG.model, max_position_embeddings=79)
    with pytest.raises(ValueError, match=r"80, expected at most max_position_embeddings = 79$"):
        bench_decode(dataclasses.replace(CONFIG, model=short), batch_size=None, repeats=1)


def test_matrix_peak_is_that_of_some_machine():
    assert 0.1 < matrix_peak_gflops() < 1e7


def test_json_is_one_object_with_every_field(capsys):
    print_report(REPORT, as_json=True)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert json.loads(printed) == dataclasses.asdict(REPORT)


def test_text_names_the_figures(capsys):
    print_report(REPORT, as_json=False)
    printed = capsys.readouterr().out
    assert "train: 2,048 tokens/s, 1000.00 ms a step [900.00, 1250.00], batch 8, on cpu" in printed
    assert "48.0% of this machine's matrix peak (128 GFLOP/s), first call 12.5 s" in printed
