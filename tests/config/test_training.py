"""The sections data, train, optimizer, loss and precision: what they refuse."""

import math

import pytest

from dsv3_jax.config import (
    DataConfig,
    DataSource,
    LossConfig,
    OptimizerConfig,
    PrecisionConfig,
    TrainConfig,
)

AT_LEAST_ONE = "a number of at least 1"
AT_LEAST_ZERO = "a number of at least 0"
SHARE = "a number from 0 to below 1"
POSITIVE = "a positive number"
FOLDER = "a folder name without '/' and not starting with '.'"
TEXT = DataSource(source="text", paths=("a.txt",))
TOKENS = DataSource(source="tokens", paths=("a.npy",))

REFUSED = [
    (DataConfig, "data.source", "csv", "one of python_stdlib, text, jsonl, parquet, tokens"),
    (DataConfig, "data.seq_len", 1, "a number of at least 2"),
    *[(DataConfig, "data.fim_rate", v, "a number from 0 to 1") for v in (-0.1, 1.1, math.nan)],
    *[(DataConfig, "data.eval_fraction", v, SHARE) for v in (-0.1, 1.0, math.nan)],
    (TrainConfig, "train.steps", 0, AT_LEAST_ONE),
    (TrainConfig, "train.batch_size", 0, AT_LEAST_ONE),
    (TrainConfig, "train.accumulation", 0, AT_LEAST_ONE),
    (TrainConfig, "train.accumulation", 3, "a divisor of train.batch_size = 8"),
    (TrainConfig, "train.eval_batches", 0, AT_LEAST_ONE),
    (TrainConfig, "train.keep_checkpoints", 0, AT_LEAST_ONE),
    (TrainConfig, "train.seed", -1, AT_LEAST_ZERO),
    (TrainConfig, "train.seed", 2**32, "a number below 2**32"),  # would begin as 0 does
    (TrainConfig, "train.eval_every", -1, AT_LEAST_ZERO),
    (TrainConfig, "train.checkpoint_every", -1, AT_LEAST_ZERO),
    *[(TrainConfig, "train.name", v, FOLDER) for v in ("", "a/b", "..", ".hidden")],
    (TrainConfig, "train.remat", "some", "one of none, selective, full"),
    (OptimizerConfig, "optimizer.schedule", "cosine", "one of published, constant"),
    (OptimizerConfig, "optimizer.moment_dtype", "float16", "one of float32, bfloat16"),
    (OptimizerConfig, "optimizer.warmup_steps", -1, AT_LEAST_ZERO),
    *[(OptimizerConfig, "optimizer.weight_decay", v, AT_LEAST_ZERO) for v in (-0.1, math.nan)],
    *[
        (OptimizerConfig, "optimizer.peak_learning_rate", v, AT_LEAST_ZERO)
        for v in (-1e-3, math.inf)
    ],
    *[
        (OptimizerConfig, f"optimizer.{name}", value, SHARE)
        for name in ("beta1", "beta2")
        for value in (-0.1, 1.0, math.nan)
    ],
    *[
        (OptimizerConfig, f"optimizer.{name}", value, POSITIVE)
        for name in ("eps", "clip_norm")
        for value in (0.0, -1.0, math.nan, math.inf)
    ],
    *[
        (LossConfig, f"loss.{name}", v, AT_LEAST_ZERO)
        for name in ("mtp_weight", "balance_weight", "bias_update_rate")
        for v in (-0.1, math.nan, math.inf)
    ],
    (PrecisionConfig, "precision.recipe", "fp16", "one of fp32, bf16, fp8"),
    (PrecisionConfig, "precision.dispatch", "fp4", "one of bf16, fp8"),
    (PrecisionConfig, "precision.combine", "logfmt9", "one of bf16, logfmt10, logfmt8"),
    (PrecisionConfig, "precision.rules", "block_gradients", "published where precision.recipe"),
]


@pytest.mark.parametrize(("section", "field", "value", "rule"), REFUSED)
def test_refuses(assert_refused, section, field, value, rule):
    name = field.split(".")[1]
    assert_refused(lambda: section(**{name: value}), field, value, rule)


@pytest.mark.parametrize("source", ["text", "jsonl", "parquet", "tokens"])
def test_source_needs_paths(assert_refused, source):
    one_or_more = "at least one path or glob"
    assert_refused(
        lambda: DataConfig(source=source), f"data.source {source!r}: paths", (), one_or_more
    )
    assert_refused(
        lambda: DataSource(source=source), f"data.mixture.source {source!r}: paths", (), one_or_more
    )


def test_mixture_refuses_what_does_not_mix(assert_refused):
    assert_refused(
        lambda: DataConfig(mixture=(TEXT, TOKENS)),
        "data.mixture",
        ["text", "tokens"],
        "token arrays alone or text sources alone",
    )
    assert_refused(
        lambda: DataSource(source="python_stdlib", weight=0.0),
        "data.mixture.weight",
        0.0,
        POSITIVE,
    )
    assert_refused(
        lambda: DataSource(source="csv"), "data.mixture.source", "csv", "one of python_stdlib"
    )


def test_sources_whichever_way_they_are_given():
    one = DataConfig(source="text", paths=("a.txt",))
    assert one.sources == (TEXT,)
    several = DataConfig(source="not looked at", mixture=(TEXT, TEXT))
    assert several.sources == (TEXT, TEXT)
    assert one.has_text
    assert not DataConfig(mixture=(TOKENS, TOKENS)).has_text


def test_accepts_the_edges():
    assert DataConfig(seq_len=2, fim_rate=1.0, eval_fraction=0.0).fim_rate == 1.0
    assert TrainConfig(batch_size=8, accumulation=8).accumulation == 8
    assert OptimizerConfig(warmup_steps=0, beta1=0.0, weight_decay=0.0).beta1 == 0.0
    assert LossConfig(mtp_weight=0.0, bias_update_rate=None).bias_update_rate is None


def test_attention_s_output_is_kept_with_its_log_sum_exp():
    config = TrainConfig(remat="full", keep=("q_latent", "attention_output"))
    assert config.kept == {"q_latent", "attention_output", "attention_lse"}
    assert TrainConfig(keep=("q_latent",)).kept == {"q_latent"}
