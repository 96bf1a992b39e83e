"""Kernels in processes of their own: compiled for sm_90a, and in Mosaic's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "kernels" / "README.md"
SHARED_MEMORY_BYTES = 227 * 1024


def compiled_cases(op: str) -> list[dict[str, Any]]:
    """Of each case, what `dsv3 bench kernels --static --json` says, in a process of its own: this
    one has JAX's CPU devices, and no other plugin, to keep. Nothing is spilled, shared memory
    suffices, and kernels/README.md has the same figures."""
    command = [sys.executable, "-m", "dsv3_jax.cli", "bench", "kernels", "--static", "--json"]
    run = subprocess.run(
        [*command, "--op", op], env=os.environ, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)["kernels"]
    rows = [line.split(" | ") for line in README.read_text().splitlines() if line[:1] == "|"]
    in_readme = [cells[1:3] for cells in rows if cells[0] == f"| {op}" and len(cells) > 3]
    assert in_readme == [[report["case"], f"{report['share']:.1%}"] for report in reports]
    for report in reports:
        for kernel in report["compiled"]:
            assert kernel["spilled_bytes"] == 0, report["case"]
            assert not {"STL", "LDL"} & set(kernel["instructions"]), report["case"]
            assert kernel["shared_memory_bytes"] <= SHARED_MEMORY_BYTES, report["case"]
    return reports


def results(program: str, cases: list, **environment: str) -> list:
    """What `program` prints, lines of JSON, for lines of JSON that it reads."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        input="\n".join(json.dumps(case) for case in cases),
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
