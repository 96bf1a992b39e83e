"""Several processes as one run: how they find each other, the same losses, a lost one."""

import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.checkpoint import find_damage
from dsv3_jax.train.processes import any_process, process_group
from tests.train.runs import finish, losses, read_metrics, settings_of, start, write_run


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


EIGHT = settings_of(parallel={"node": 2, "gpu": 4})


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path)
    return tmp_path


def start_two(folder: Path, *flags: str) -> list[subprocess.Popen]:
    """Two processes of 4 devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    group = ("--coordinator", address, "--processes", "2")
    return [start(folder, 4, *flags, *group, "--process", str(i)) for i in range(2)]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(folder):
    """Two of 4 devices and one of 8; both evaluate, save, and only the first writes."""
    finish(start(folder, 8, *EIGHT, "--set", "train.name=alone"))
    processes = start_two(folder, *EIGHT, "--set", "train.name=two")
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found, expected = losses(folder, "two"), losses(folder, "alone")
    assert len(found) == 20
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert "step 20/20" in outputs[0][0] and "step" not in outputs[1][0]
    assert find_damage(folder / "runs" / "two" / "checkpoints" / "20") is None


@pytest.mark.slow
def test_each_process_a_pipeline_rank(folder):
    """Processes that differ in pipe alone feed the same rows: one device has the same losses."""
    flags = settings_of(
        model={"num_hidden_layers": 3}, train={"batch_size": 16, "steps": 6, "eval_every": 3}
    )
    finish(start(folder, 1, *flags, "--set", "train.name=alone"))
    pipeline = {"pipe": 2, "node": 2, "gpu": 2, "schedule": "zb1p", "micro_batches": 4}
    flags += settings_of(parallel=pipeline, train={"name": "two"})
    processes = start_two(folder, *flags)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    expected, found = (read_metrics(folder, name) for name in ("alone", "two"))
    assert [metrics["step"] for metrics in found] == list(range(1, 7))
    for name in ("tokens_seen", "loss", "mtp_loss", "grad_norm", "expert_load_max_over_mean"):
        of_steps = [[metrics[name] for metrics in run] for run in (found, expected)]
        np.testing.assert_allclose(*of_steps, rtol=1e-5, err_msg=name)
    for step in (2, 5):
        assert found[step]["eval_loss"] == pytest.approx(expected[step]["eval_loss"], rel=1e-5)
    assert find_damage(folder / "runs" / "two" / "checkpoints" / "6") is None


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
    processes = start_two(folder, *EIGHT, "--set", "train.steps=100000")
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
    processes = start_two(folder, *EIGHT, "--set", "train.steps=100000")
    wait_for_lines(folder, "run", 3)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 143, errors
        assert "SIGTERM after step" in errors.splitlines()[-1]
    step = len(losses(folder, "run"))
    assert find_damage(folder / "runs" / "run" / "checkpoints" / str(step)) is None
