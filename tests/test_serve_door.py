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
    for setting in ("parallel.gpu=4", "model.hidden_size=64"):
        door = call("serve.py", "runs/demo", "--set", "serve.slots=2", "--set", setting)
        expected = f"dsv3 serve: --set is '{setting}', expected serve.field=value\n"
        assert (door.returncode, door.stderr) == (2, expected)
