"""Pipelines with stages of their own: as `simulate` where all are equal, by hand where not."""

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig, TrainConfig
from dsv3_jax.parallel.pipeline.orders import Kind
from dsv3_jax.parallel.pipeline.schedule import make_schedule
from dsv3_jax.parallel.pipeline.simulate import Durations, simulate
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.layer_times import Job, chunk_times
from dsv3_jax.plan.pipeline_times import (
    StageSeconds,
    run_orders,
    run_schedule,
    run_stages,
    split_parts,
)

DURATIONS = Durations(forward=1.0, overlapped=2.6, backward=2.2, weight=0.9, transfer=0.25)


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_equal_stages_are_as_simulated(name):
    schedule = make_schedule(name, 4, 10)
    of_kinds = DURATIONS.of_kinds()
    ours = run_schedule(schedule, lambda action: of_kinds[action.kind], DURATIONS.transfer)
    theirs = simulate(schedule, DURATIONS)
    for rank in range(schedule.ranks):
        np.testing.assert_allclose(ours.start[rank], theirs.start[rank])
        np.testing.assert_allclose(ours.end[rank], theirs.end[rank])


def test_one_slow_stage_by_hand():
    """1F1B, two stages of 1 and 3 seconds forward, 2 and 6 backward, two micro-batches: stage 1
    works from 1 to 1 + 2 x 9 = 19, and stage 0 ends its last backward 2 later."""
    schedule = make_schedule("1f1b", 2, 2)

    def seconds(action):
        work = action.forward or action.backward
        return (1, 2)[action.backward is not None] * (1.0, 3.0)[work.stage]

    timeline = run_schedule(schedule, seconds)
    assert timeline.total_seconds == 21
    parts = split_parts(timeline, 1)
    assert (parts.forward, parts.backward, parts.bubble, parts.total) == (6, 12, 3, 21)
    mean = split_parts(timeline)
    assert (mean.forward, mean.backward, mean.total) == (4, 8, 21)


def run(late=True):
    return RunConfig(
        model=ModelConfig(num_hidden_layers=8),
        parallel=ParallelConfig(
            pipe=4,
            node=8,
            gpu=8,
            schedule="dualpipe",
            micro_batches=8,
            late_weight_gradients=late,
        ),
        train=TrainConfig(batch_size=512),
        precision=PrecisionConfig(recipe="fp8"),
    )


def test_stages_take_what_their_layers_do():
    config = run()
    job, stages = Job.of(config), run_stages(config)
    times = chunk_times(find_cluster("h800_2048"), config.precision, job)
    seconds = StageSeconds(times, stages, late_weights=True)
    for order in run_orders(config).orders:
        for action in order:
            if action.kind == Kind.FORWARD:
                expected = times.forward(stages[action.forward.stage])
            elif action.kind == Kind.OVERLAPPED:
                pair = stages[action.forward.stage], stages[action.backward.stage]
                expected = times.overlapped(*pair).seconds
            else:
                inputs, weights = times.backward(stages[action.backward.stage])
                expected = {
                    Kind.BACKWARD: inputs + weights,
                    Kind.BACKWARD_INPUT: inputs,
                    Kind.BACKWARD_WEIGHT: weights,
                }[action.kind]
            assert seconds(action) == expected


def test_weight_gradients_in_bubbles_shorten_the_step():
    steps = {}
    for late in (True, False):
        config = run(late)
        times = chunk_times(find_cluster("h800_2048"), config.precision, Job.of(config))
        seconds = StageSeconds(times, run_stages(config), late_weights=late)
        steps[late] = run_schedule(run_orders(config), seconds)
        work = split_parts(steps[late])
        assert (work.weight > 0) == late
    assert steps[True].total_seconds < steps[False].total_seconds


def test_orders_are_the_schedule_s():
    config = run()
    assert run_orders(config).orders == make_schedule("dualpipe", 4, 8).orders
    alone = RunConfig(train=TrainConfig(batch_size=6, accumulation=3))
    (order,) = run_orders(alone).orders
    assert [action.kind for action in order] == [Kind.FORWARD, Kind.BACKWARD] * 3
