"""config.json of a run: complete, written whole, and what refuses another model's run."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

from dsv3_jax.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    YarnConfig,
    from_dict,
)
from dsv3_jax.train import run_directory
from dsv3_jax.train.run_directory import require_same_model, write_config, write_json

CONFIG = RunConfig(
    model=ModelConfig(rope_scaling=YarnConfig(factor=40.0)),
    data=DataConfig(source="text", paths=("a.txt", "b/*.txt"), seq_len=64),
    train=TrainConfig(name="one", steps=7),
)


def test_runs_lie_under_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory.run_directory(CONFIG).absolute() == tmp_path / "runs" / "one"


def test_config_json_is_the_resolved_config_and_where_it_ran(tmp_path):
    write_config(tmp_path / "runs" / "one", CONFIG)
    written = json.loads((tmp_path / "runs" / "one" / "config.json").read_text())
    environment = written.pop("environment")
    assert from_dict(RunConfig, written) == CONFIG
    assert written["optimizer"]["beta2"] == 0.95  # defaults are spelled out
    assert environment["python"] == platform.python_version()
    for name in ("jax", "jaxlib", "flax", "orbax-checkpoint", "grain", "tokenizers", "numpy"):
        assert environment["versions"][name] == importlib.metadata.version(name)
    assert [p.name for p in (tmp_path / "runs" / "one").iterdir()] == ["config.json"]


def test_the_commit_is_that_of_the_source_not_of_the_current_directory(tmp_path, monkeypatch):
    def commit_of(source: Path) -> str | None:
        monkeypatch.setattr(run_directory, "__file__", str(source / "run_directory.py"))
        write_config(tmp_path, CONFIG)
        return json.loads((tmp_path / "config.json").read_text())["environment"]["git_commit"]

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(checkout)]
    subprocess.run([*run, "init", "-q"], check=True)
    subprocess.run([*run, "commit", "-q", "--allow-empty", "-m", "one"], check=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert re.fullmatch("[0-9a-f]{40}", commit_of(checkout))
    monkeypatch.chdir(checkout)
    outside = tmp_path / "outside"
    outside.mkdir()
    assert commit_of(outside) is None
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) is None  # no git


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("the machine went down")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="went down"):
        write_json(path, {"a": 2, "b": list(range(1000))})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_run_may_go_on_with_other_steps_and_optimizer(tmp_path):
    require_same_model(tmp_path, CONFIG)  # a new run
    write_config(tmp_path, CONFIG)
    require_same_model(tmp_path, CONFIG)
    other = dataclasses.replace(
        CONFIG,
        train=TrainConfig(name="one", steps=9),
        optimizer=OptimizerConfig(peak_learning_rate=1e-5),
    )
    require_same_model(tmp_path, other)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(hidden_size=64), "model.hidden_size = 7168, expected 64"),
        (dict(q_lora_rank=None), "model.q_lora_rank = 1536, expected None"),
        (dict(rope_scaling=None), "model.rope_scaling = {'factor': 40.0"),
        (dict(topk_group=2, n_routed_experts=64), "model.n_routed_experts = 256, expected 64"),
    ],
)
def test_another_model_is_refused_by_field_and_values(tmp_path, changes, named):
    write_config(tmp_path, CONFIG)
    model = dataclasses.replace(CONFIG.model, **changes)
    with pytest.raises(ValueError) as refusal:
        require_same_model(tmp_path, dataclasses.replace(CONFIG, model=model))
    message = str(refusal.value)
    assert named in message and str(tmp_path) in message and "train.name" in message
