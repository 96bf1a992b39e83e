"""A step on a mesh is the step on one device: losses, load, and the gradient of every tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from dsv3_jax.config import ParallelConfig, RunConfig, TrainConfig
from dsv3_jax.train.layout import make_layout

ROOT = Path(__file__).parents[2]
QUICK = ("node 2, gpu 4", "data 2, node 2, gpu 2", "zero 3", "all to one expert, many rounds")
MORE = (
    *("gpu 2", "node 2", "data 2", "gpu 8", "node 8", "data 8", "node 4, gpu 2", "data 4, node 2"),
    *("data 2, gpu 4", "flat", "zero 3, two nodes", "many rounds", "many rounds, flat"),
    *("two parts, documents", "all to one expert"),
)
WORST = 1e-5
"""Of a tensor's relative error; 1 to 3e-6 measured."""


def mesh_errors(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """`mesh_program`'s, in a process of its own, which sees 8 devices."""
    command = [sys.executable, "-m", "tests.train.mesh_program", *names]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def assert_same_step(names: tuple[str, ...]) -> None:
    found = mesh_errors(names)
    assert set(found) == set(names)
    for name, errors in found.items():
        assert len(errors) > 40 and "loss" in errors and "lm_head.weight" in errors
        assert errors["load"] == 0, name
        worst = max(errors, key=lambda key: errors[key])
        assert errors[worst] <= WORST, (name, worst, errors[worst])


def test_meshes_give_the_losses_and_gradients_of_one_device():
    assert_same_step(QUICK)


@pytest.mark.slow
def test_more_meshes_give_the_losses_and_gradients_of_one_device():
    assert_same_step(MORE)


def test_a_mesh_of_another_size_is_refused():
    config = RunConfig(parallel=ParallelConfig(gpu=2), train=TrainConfig(batch_size=2))
    rule = r"1 x 1 x 1 x 2 = 2 devices, expected the 1 that there are"
    with pytest.raises(ValueError, match=rule):
        make_layout(config, jax.devices()[:1])
