"""The example of the kernels alone, with dsv3_jax out of reach."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "kernels" / "ops_alone.py"
PROGRAM = """
import runpy, sys
sys.modules["dsv3_jax"] = None
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_the_ops_can_be_used_alone():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(EXAMPLE)],
        env={
            name: value for name, value in os.environ.items() if name != "JAX_NUMPY_DTYPE_PROMOTION"
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    error = re.search(r"FP8 experts, relative error: ([\d.]+)\n", run.stdout)
    assert error and 0.01 < float(error[1]) < 0.05  # a product of E4M3's, 0.037 of N(0, 1)
    assert "gradient across documents: 0.0\n" in run.stdout
    assert "mla_prefill: xla, for the program is for cpu\n" in run.stderr
