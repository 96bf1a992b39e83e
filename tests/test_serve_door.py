"""serve.py is `dsv3 serve`: the same options, the same errors."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_the_door_takes_the_commands_options():
    door = call("serve.py", "--help")
    command = call("-m", "dsv3_jax.cli", "serve", "--help")
    assert (door.returncode, command.returncode) == (0, 0)
    assert door.stdout == command.stdout
    for option in ("--host", "--port", "--set", "--name", "checkpoint"):
        assert option in door.stdout


def test_what_is_wrong_is_exit_code_2_and_one_line():
    door = call("serve.py", "runs/demo", "--port", "eighty")
    assert (door.returncode, door.stdout) == (2, "")
    [line] = door.stderr.splitlines()
    assert line.startswith("dsv3 serve: argument --port: invalid int value: 'eighty'")


def test_only_the_servers_own_fields_can_be_set():
    """Not those that would be ignored."""
    for setting, message in {
        "model.hidden_size=64": "--set model.hidden_size is 'model', expected one of parallel, ",
        "parallel.pipe=2": "parallel.schedule is 'none', expected one of 1f1b, ",
        "precision.recipe=fp8": "precision.recipe is 'fp8', expected fp32: a server computes in",
        "serve.prefill_mesh=1,1,2": "serve.prefill_mesh is (1, 1, 2), expected None where serve.",
    }.items():
        door = call("serve.py", "runs/demo", "--set", "serve.slots=2", "--set", setting)
        assert door.returncode == 2 and len(door.stderr.splitlines()) == 1
        assert door.stderr.startswith(f"dsv3 serve: {message}"), door.stderr
