"""Several processes as one run: how they find each other, the same losses, a lost one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import find_damage
from dsv3_jax.train.processes import any_process, process_group

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # sbatch's own shell, not srun's
        ({"SLURM_STEP_NUM_TASKS": "16"}, {"cluster_detection_method": "slurm"}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {"cluster_detection_method": "ompi"}),
    ],
)
def test_found_in_the_environment(environment, expected):
    assert process_group(None, None, None, environment) == expected


def test_given_explicitly():
    slurm = {"SLURM_STEP_NUM_TASKS": "16"}
    assert process_group("head:1234", 4, 3, slurm) == {
        "coordinator_address": "head:1234",
        "num_processes": 4,
        "process_id": 3,
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("head:1", 2, None), "--process is missing, expected all of --coordinator, --processes"),
        ((None, None, 0), "--coordinator is missing"),
        (("head", 2, 0), "--coordinator is 'head', expected HOST:PORT"),
        (("head:x", 2, 0), "--coordinator is 'head:x', expected HOST:PORT"),
        (("head:1", 0, 0), "--processes is 0, expected at least 1"),
        (("head:1", 2, 2), "--process is 2, expected 0 to 1"),
    ],
)
def test_what_does_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        process_group(*given, {})


def test_one_process_answers_for_itself():
    assert any_process(True) is True and any_process(False) is False


CONFIG = """
from dsv3_jax.config import *

def config():
    return RunConfig(
        model=ModelConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8,
            num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=8,
            kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
            n_routed_experts=8, num_experts_per_tok=2, n_group=4, topk_group=2,
            max_position_embeddings=32,
        ),
        data=DataConfig(source="tokens", paths=("rows.npy",), eval_paths=("held.npy",), seq_len=16),
        train=TrainConfig(name="run", steps=20, batch_size=8, eval_every=10, checkpoint_every=5),
        optimizer=OptimizerConfig(schedule="constant", peak_learning_rate=1e-2, warmup_steps=2),
        parallel=ParallelConfig(node=2, gpu=4),
    )
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    random = np.random.default_rng(0)
    for name, count in (("rows", 200), ("held", 16)):
        np.save(tmp_path / f"{name}.npy", random.integers(0, 64, (count, 17)).astype(np.int32))
    return tmp_path


def start(folder: Path, devices: int, *flags: str) -> subprocess.Popen:
    """`python train.py config.py` in a process that sees `devices` CPU devices."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, str(ROOT / "train.py"), "config.py", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def start_two(folder: Path, *flags: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    group = ("--coordinator", address, "--processes", "2")
    return [start(folder, 4, *flags, *group, "--process", str(i)) for i in range(2)]


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folder):
    """Two of 4 devices and one of 8; both evaluate, save, and only the first writes."""
    alone = start(folder, 8, "--set", "train.name=alone")
    _, errors = alone.communicate(timeout=300)
    assert alone.returncode == 0, errors
    processes = start_two(folder, "--set", "train.name=two")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found, expected = losses(folder, "two"), losses(folder, "alone")
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert "step 20/20" in outputs[0][0] and "step" not in outputs[1][0]
    assert find_damage(folder / "runs" / "two" / "checkpoints" / "20") is None


def wait_for_lines(folder: Path, name: str, count: int) -> None:
    path = folder / "runs" / name / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_and_says_so(folder, lost):
    """By our line, or by JAX's own watch where that is quicker: heartbeats, and it aborts."""
    processes = start_two(folder, "--set", "train.steps=100000")
    wait_for_lines(folder, "run", 7)
    processes[lost].kill()
    left = processes[1 - lost]
    _, errors = left.communicate(timeout=90)
    processes[lost].communicate()
    ours = f"dsv3 train: process {1 - lost} of 2 ends, work with the others failed"
    if left.returncode == -signal.SIGABRT:
        assert "this most likely indicates that another task died" in errors.lower()
    else:
        assert left.returncode == 1, errors
        assert errors.splitlines()[-1].startswith(ours)


@pytest.mark.slow
def test_one_is_told_to_stop_and_all_save(folder):
    processes = start_two(folder, "--set", "train.steps=100000")
    wait_for_lines(folder, "run", 3)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 143, errors
        assert "SIGTERM after step" in errors.splitlines()[-1]
    step = len(losses(folder, "run"))
    assert find_damage(folder / "runs" / "run" / "checkpoints" / str(step)) is None
