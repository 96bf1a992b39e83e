"""The optimizer's time is that of its bytes, worked out by hand."""

from dataclasses import replace

import pytest

from dsv3_jax.config import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.optimizer_times import gather_seconds, optimizer_seconds
from dsv3_jax.plan.pipeline_times import run_stages
from dsv3_jax.plan.state_sizes import every_rank

H800 = find_cluster("h800_2048")


def test_by_hand():
    """Experts twice, over the network; the rest on 16 GPUs, eight in each of two nodes."""
    config = RunConfig(
        model=ModelConfig(num_hidden_layers=5),
        parallel=ParallelConfig(data=2, gpu=8),
        train=TrainConfig(batch_size=16),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
    )
    stages = run_stages(config)
    (held,) = every_rank(config, stages)
    experts, others = held.experts, held.dense + held.embedding
    sent = 0.0
    for size in (4, 2):  # gradients there, weights back
        sent += size * experts / 2 / 40e9
        sent += size * others * 7 / 8 / 160e9 + size * others / 8 / 2 / 40e9
    share = experts / 2 + others / 16
    touched = share * (4 + 2 * 8 + 2) + 4 * (experts + others)
    expected = sent + touched / (0.85 * 3.35e12)
    assert optimizer_seconds(H800, config, stages) == pytest.approx(expected)


def test_gathers_only_where_state_is_sharded_further():
    config = RunConfig(
        model=ModelConfig(num_hidden_layers=5),
        parallel=ParallelConfig(gpu=8, zero=3),
        train=TrainConfig(batch_size=16, accumulation=2),
    )
    stages = run_stages(config)
    (held,) = every_rank(config, stages)
    # FP32 gradients once, weights in BF16 forward and backward, in both parts; NVLink alone.
    expected = 2 * 8 * (held.dense + held.embedding) * 7 / 8 / 160e9
    assert gather_seconds(H800, config, stages) == pytest.approx(expected)
    once = replace(config, parallel=ParallelConfig(gpu=8))
    assert gather_seconds(H800, once, stages) == 0
    assert optimizer_seconds(H800, config, stages) < optimizer_seconds(H800, once, stages)
