"""Memory by closed forms: against counts, by-hand sums, and what the compiler read."""

from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, read_config
from dsv3_jax.model.accounting import count_parameters
from dsv3_jax.plan.machine import fanout
from dsv3_jax.plan.pipeline_times import run_orders, run_stages
from dsv3_jax.plan.state_sizes import (
    copies,
    every_rank,
    late_bytes,
    layer_tensors,
    padded_parameters,
    state_sizes,
)

CONFIGS = Path(__file__).parents[2] / "configs"
COMPILED = {  # GB a GPU by `dsv3 compile` (docs/LOG.md), without what CUDA keeps
    "v3_671b": 73.29,
    "v3_671b_h100_1024": 80.26,
    "v2_lite_16b": 49.7,
}


def sizes_of(config):
    spread = fanout(config.model, config.parallel.node * config.parallel.gpu, 8)
    return state_sizes(config, run_orders(config), run_stages(config), spread)


@pytest.mark.parametrize("name", COMPILED)
def test_near_what_the_compiler_read(name):
    sizes = sizes_of(read_config(CONFIGS / f"{name}.py"))
    assert (sizes.total - sizes.reserved) / 1e9 == pytest.approx(COMPILED[name], rel=0.10)


def test_ranks_hold_the_model_once():
    model = ModelConfig()
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(pipe=16, node=8, gpu=8, schedule="1f1b", micro_batches=16),
        train=TrainConfig(batch_size=1024),
    )
    stages = run_stages(config)
    held = every_rank(config, stages)
    counted = count_parameters(model)
    whole = 64 * sum(p.experts for p in held) + sum(p.dense + p.embedding for p in held)
    assert whole == counted.total + counted.mtp - model.hidden_size  # but for the final norm
    parallel = replace(config.parallel, schedule="dualpipe", micro_batches=32)
    two = replace(config, parallel=parallel, train=TrainConfig(batch_size=2048))
    twice = every_rank(two, run_stages(two))
    assert sum(p.total for p in twice) == pytest.approx(2 * sum(p.total for p in held))
    assert copies(two) == (2, 128)
    padded = padded_parameters(config, stages)
    assert padded.total > max(p.total - p.embedding for p in held)


def test_kept_tensors_by_hand():
    config = read_config(CONFIGS / "v3_671b.py")
    spread = fanout(config.model, 64, 8)
    moe = layer_tensors(config, spread, dense=False)
    assert moe["q_latent"] == 2 * 1536
    assert moe["kv_latent"] == 2 * 576
    assert moe["keys_values"] == 2 * 128 * 256
    assert moe["attention_output"] == 1.5 * 128 * 128 + 4 * 128  # E5M6, and log-sum-exp
    # SwiGLU's inputs in FP8, with a scale of four bytes for 128; 36,896 slots for 32,768 rows.
    assert moe["expert_up"] == pytest.approx(8 * 4096 * (1 + 4 / 128) * 36896 / 32768, rel=1e-3)
    assert moe["node_rows"] == pytest.approx(3.63 * 7168 * (1 + 4 / 128), rel=1e-3)
    dense = layer_tensors(config, spread, dense=True)
    assert dense["mlp_up"] == 18432 * (1 + 4 / 128)


def test_memory_follows_the_settings():
    config = read_config(CONFIGS / "v3_671b.py")
    base = sizes_of(config)

    def changed(**fields):
        return sizes_of(replace(config, **fields))

    waiting = replace(config, parallel=replace(config.parallel, late_weight_gradients=True))
    assert sizes_of(waiting).kept > base.kept
    # configs/v3_671b.py: they keep 6 GB for each micro-batch.
    assert max(late_bytes(waiting, run_stages(waiting))) == pytest.approx(6e9, rel=0.1)
    assert max(late_bytes(config, run_stages(config))) == 0
    nothing = changed(train=replace(config.train, keep=()))
    assert nothing.kept < base.kept / 4
    moments = changed(optimizer=replace(config.optimizer, moment_dtype="float32"))
    assert moments.optimizer == pytest.approx(1.5 * base.optimizer)  # 12 bytes for 8
    bf16 = changed(precision=replace(config.precision, recipe="bf16"))
    assert bf16.weights > 1.9 * base.weights
    assert bf16.kept > 1.3 * base.kept
    assert base.gradients == bf16.gradients
