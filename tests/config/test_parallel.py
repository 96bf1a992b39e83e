"""The parallel section: which meshes there can be."""

import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from dsv3_jax.parallel.pipeline.stages import split_units


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[(axis, 0, "a number of at least 1") for axis in ("pipe", "data", "node", "gpu")],
        ("micro_batches", 0, "a number of at least 1"),
        ("simulated_devices", 8, "0 (real devices) or pipe x data x node x gpu = 1"),
        ("simulated_devices", -1, "a number of at least 0"),
        ("zero", 2, "1 or 3"),
        ("dispatcher", "ring", "one of two_hop, flat"),
        ("capacity_factor", 0.0, "a number above 0, at most 64"),
    ],
)
def test_refuses(assert_refused, name, value, rule):
    assert_refused(lambda: ParallelConfig(**{name: value}), f"parallel.{name}", value, rule)


BOTH_WAYS = {"schedule": "dualpipe", "pipe": 4, "micro_batches": 8}
IN_A_V = {"schedule": "dualpipev", "pipe": 3, "micro_batches": 6}
ONE_WAY = {"schedule": "1f1b", "pipe": 4, "micro_batches": 8}


@pytest.mark.parametrize(
    ("fields", "name", "value", "rule"),
    [
        ({"schedule": "gpipe"}, "schedule", "gpipe", "one of none, 1f1b, zb1p, dualpipe, dualpip"),
        ({"schedule": "zb1p"}, "schedule", "zb1p", "none, or parallel.pipe above 1"),
        ({"micro_batches": 2}, "micro_batches", 2, "1, or parallel.pipe above 1 (train.accumula"),
        ({"pipe": 2}, "schedule", "none", "1f1b, zb1p, dualpipe, dualpipev where parallel.pipe is"),
        (ONE_WAY | {"zero": 3}, "zero", 3, "1 where parallel.pipe is above 1 (every micro-batch w"),
        (
            BOTH_WAYS | {"micro_batches": 6},
            "micro_batches",
            6,
            "at least 8, twice parallel.pipe (d",
        ),
        (BOTH_WAYS | {"micro_batches": 9}, "micro_batches", 9, "an even number (dualpipe)"),
        (BOTH_WAYS | {"pipe": 3}, "pipe", 3, "an even number (dualpipe)"),
        (IN_A_V | {"micro_batches": 5}, "micro_batches", 5, "at least 6, twice parallel.pipe (dua"),
        (ONE_WAY | {"gpu": 2, "simulated_devices": 4}, "simulated_devices", 4, "x gpu = 8"),
    ],
)
def test_refuses_pipelines(assert_refused, fields, name, value, rule):
    assert_refused(lambda: ParallelConfig(**fields), f"parallel.{name}", value, rule)


@pytest.mark.parametrize(
    ("fields", "stages"),
    [
        ({}, 1),
        (ONE_WAY, 4),
        (ONE_WAY | {"schedule": "zb1p", "pipe": 5, "micro_batches": 1}, 5),
        (BOTH_WAYS, 4),
        (IN_A_V, 6),
        (IN_A_V | {"micro_batches": 7}, 6),
    ],
)
def test_counts_stages(fields, stages):
    assert ParallelConfig(**fields).stages == stages


def test_counts_devices():
    config = ParallelConfig(data=2, node=3, gpu=4, simulated_devices=24)
    assert (config.mesh_shape, config.num_devices) == ((1, 2, 3, 4), 24)
    assert config.token_shards == 24
    config = ParallelConfig(**BOTH_WAYS, data=2, gpu=4, simulated_devices=32)
    assert (config.mesh_shape, config.num_devices) == ((4, 2, 1, 4), 32)
    assert config.token_shards == 8


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


SMALL = ModelConfig(num_hidden_layers=5, num_nextn_predict_layers=1)


@pytest.mark.parametrize(
    ("parallel", "train", "name", "value", "rule"),
    [
        (ONE_WAY, {"accumulation": 2}, "train.accumulation", 2, "1 where parallel.pipe is above 1"),
        (ONE_WAY, {"batch_size": 12}, "parallel.micro_batches", 8, "a divisor of train.batch_size"),
        (
            ONE_WAY | {"data": 2, "gpu": 2},
            {"batch_size": 16},
            "train.batch_size / parallel.micro_batches",
            2,
            "a multiple of parallel.data x node x gpu = 4",
        ),
        (
            ONE_WAY | {"pipe": 7},
            {},
            "parallel.pipe = 7: 7 stages",
            7,
            "at most 6, the model's layers and MTP modules",
        ),
        (IN_A_V | {"pipe": 4, "micro_batches": 8}, {}, "parallel.pipe = 4: 8 stages", 8, "at most"),
    ],
)
def test_refuses_batches_and_models_for_a_pipeline(
    assert_refused, parallel, train, name, value, rule
):
    def run():
        return RunConfig(
            model=SMALL,
            parallel=ParallelConfig(**parallel),
            train=TrainConfig(**{"batch_size": 8} | train),
        )

    assert_refused(run, name, value, rule)


def test_parts_of_a_batch():
    """A pipeline's micro-batches, otherwise those of an accumulation."""
    assert RunConfig(train=TrainConfig(batch_size=6, accumulation=3)).parts == 3
    pipeline = ParallelConfig(**IN_A_V)
    assert RunConfig(parallel=pipeline, model=SMALL, train=TrainConfig(batch_size=12)).parts == 6


@pytest.mark.parametrize("stages", range(2, 7))
@pytest.mark.parametrize(("layers", "modules"), [(1, 2), (2, 2), (2, 3), (3, 1), (4, 0)])
def test_a_run_that_is_accepted_can_be_split(layers, modules, stages):
    """All MTP modules are in one stage: they count as one layer where there are many stages."""
    model = ModelConfig(
        num_hidden_layers=layers, first_k_dense_replace=1, num_nextn_predict_layers=modules
    )
    parallel = ParallelConfig(pipe=stages, schedule="1f1b")
    fits = stages <= layers + min(modules, 1)
    for accepts in (
        lambda: RunConfig(model=model, parallel=parallel, train=TrainConfig(batch_size=1)),
        lambda: split_units(1, layers - 1, modules, stages),
    ):
        if fits:
            accepts()
        else:
            with pytest.raises(ValueError, match=rf"is {stages}, expected at most"):
                accepts()
