"""A model on a mesh gives what it gives on one device: logits, answers, served requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORST = 1e-5
"""Of the largest logit; 3e-7 where it was looked at."""
WORST_FP8 = 0.05
"""BF16 sums in another order tip values of FP8."""


def found(*names: str) -> dict:
    """What `mesh_program` finds, in a process of its own, which sees 8 devices."""
    command = [sys.executable, "-m", "tests.serve.mesh_program", *names]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_logits_and_moved_experts():
    of = found("logits", "slots")
    assert len(of["logits"]) == 2 and max(of["logits"].values()) < WORST, of
    assert len(of["slots"]) == 3 and all(of["slots"].values())


@pytest.mark.slow
def test_loaded_models_fp8_and_generated_answers():
    of = found("more logits", "fp8", "generate")
    assert len(of["more logits"]) == 4 and max(of["more logits"].values()) < WORST, of
    assert of["fp8"]["fp8"] < WORST_FP8
    assert len(of["generate"]) == 4 and all(of["generate"].values()), of


@pytest.mark.slow
def test_an_engine_on_a_mesh_answers_as_generate_does():
    placed = "engine, two hops", "engine, stacked"
    names = *placed, "engine, experts in place"
    of = found(*names)
    for name in names:
        report = of[name]
        assert report["right"], (name, report)
        assert report["compiled meanwhile"] == report["left"] == 0
        assert report["devices that served"] * 2 == report["slots"]
        assert report["preemptions"] and report["prefixes found"]
        assert bool(report["right guesses"]) == (name != "engine, stacked")
    assert of["engine, experts in place"]["placements"] == 0
    for name in placed:
        assert of[name]["placements"] >= 2  # the first begins before any load
        assert [sum(layer) for layer in of[name]["replicas"]] == [12]
    (replicas,) = of["engine, two hops"]["replicas"]
    assert replicas != [2, 2, 2, 2, 1, 1, 1, 1]  # as first placed
