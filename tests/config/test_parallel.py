"""The parallel section: which meshes there can be."""

import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[(axis, 0, "a number of at least 1") for axis in ("pipe", "data", "node", "gpu")],
        ("pipe", 2, "1 (this release has no pipeline)"),
        ("micro_batches", 0, "a number of at least 1"),
        ("schedule", "dualpipe", "none (this release has no pipeline)"),
        ("simulated_devices", 8, "0 (real devices) or pipe x data x node x gpu = 1"),
        ("simulated_devices", -1, "a number of at least 0"),
        ("zero", 2, "1 or 3"),
        ("dispatcher", "ring", "one of two_hop, flat"),
        ("capacity_factor", 0.0, "a number above 0, at most 64"),
    ],
)
def test_refuses(assert_refused, name, value, rule):
    assert_refused(lambda: ParallelConfig(**{name: value}), f"parallel.{name}", value, rule)


def test_counts_devices():
    config = ParallelConfig(data=2, node=3, gpu=4, simulated_devices=24)
    assert (config.mesh_shape, config.num_devices) == ((1, 2, 3, 4), 24)
    assert config.token_shards == 24


@pytest.mark.parametrize(
    ("parallel", "train", "rule"),
    [
        (dict(node=3), dict(batch_size=6), "parallel.node x gpu is 3, expected a divisor of"),
        (dict(gpu=4), dict(batch_size=6), "accumulation is 6, expected a multiple of parallel"),
        (dict(data=4), dict(batch_size=8, accumulation=4), "accumulation is 2, expected a multi"),
    ],
)
def test_experts_and_sequences_have_to_divide(parallel, train, rule):
    with pytest.raises(ValueError, match=rule):
        RunConfig(parallel=ParallelConfig(**parallel), train=TrainConfig(**train))
    dense = ModelConfig(first_k_dense_replace=61, num_nextn_predict_layers=0)
    sizes = ParallelConfig(node=3)
    assert RunConfig(model=dense, parallel=sizes, train=TrainConfig(batch_size=6))
