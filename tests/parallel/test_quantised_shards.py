"""A matrix quantised where it lies, in parts, is the matrix quantised whole."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_parts_have_the_values_and_scales_of_the_whole():
    command = [sys.executable, "-m", "tests.parallel.quantised_program"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == []
