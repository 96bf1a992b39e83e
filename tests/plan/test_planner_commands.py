"""`dsv3 plan`: each command's output, one JSON object, one line for what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax import cli
from dsv3_jax.plan.planner_commands import TABLES

CONFIGS = Path(__file__).parents[2] / "configs"
V3 = str(CONFIGS / "v3_671b.py")
FEW = ["--set", "parallel.micro_batches=32", "--set", "train.batch_size=4096"]
ON_H800 = [V3, "--cluster", "h800_2048", *FEW]


@pytest.fixture
def plan(capsys, tmp_path, monkeypatch):
    """Runs `dsv3 plan` in this process, in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = cli.main(["plan", *arguments])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_one_command(plan, name):
    code, output, errors = plan("table", name)
    assert (code, errors) == (0, "")
    code, printed, errors = plan("table", name, "--json")
    rows = json.loads(printed)["rows"]
    assert len(rows) >= 3 and errors == ""
    assert len(output.splitlines()) >= len(rows) + 3


def test_published_figures_stand_beside_ours(plan):
    rows = json.loads(plan("table", "kv", "--json")[1])["rows"]
    assert [row["published bytes"] for row in rows] == [row["ours"] for row in rows]
    networks = json.loads(plan("table", "network", "--json")[1])["rows"]
    assert all(row["as published"] for row in networks)
    checks = json.loads(plan("table", "checks", "--json")[1])["rows"]
    assert all(row["apart"].endswith("%") for row in checks)


def test_clusters(plan):
    code, output, _ = plan("cluster")
    assert code == 0 and "gb200_nvl72" in output
    code, output, _ = plan("cluster", "h800_2048")
    assert code == 0 and "'Insights' §4.3" in output


def test_limits(plan):
    assert "14.76" in plan("limits", "decode")[1]
    assert "15.11" in plan("limits", "decode", "--hidden", "7168")[1]
    local = json.loads(plan("limits", "local", "deepseek-v3", "--bandwidth", "1000", "--json")[1])
    assert local["rows"][1]["value"] == pytest.approx(36.625618432 * 4.5 / 8)
    output = plan("limits", "unit", *ON_H800, "--gpus", "144")[1]
    assert "routed experts a GPU" in output and "tokens in the cache a GPU" in output


def test_train_writes_what_is_asked_for(plan, tmp_path):
    code, output, errors = plan("train", *ON_H800, "--json", "--html", "plan.html")
    assert code == 0 and errors == "dsv3 plan: wrote plan.html\n"
    assert json.loads(output)["gpus"] == 2048
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg") == 3 and "src=" not in page
    small = [str(CONFIGS / "demo.py"), "--cluster", "h800_node", "--tokens", "1e6"]
    code, output, errors = plan("train", *small, "--png", "plan.png")
    assert code == 0 and "tokens/s a GPU" in output
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_serve_and_sweep(plan):
    load = ["--input", "4000", "--output", "1000", "--slo-tpot", "50"]
    served = json.loads(plan("serve", *ON_H800, *load, "--json")[1])
    assert served["tpot_seconds"] <= 0.05
    code, output, _ = plan("sweep", *ON_H800, "--vary", "precision.recipe=fp8,bf16")
    assert code == 0 and "bf16" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: WHAT"),
        (["table", "seven"], "argument NAME: invalid choice: 'seven'".replace("NAME", "name")),
        (["train", V3], "the following arguments are required: --cluster"),
        (["train", V3, "--cluster", "mars"], "--cluster is 'mars', expected one of"),
        (["train", "none.py", "--cluster", "h800_node"], "CONFIG is 'none.py', expected"),
        (["train", *ON_H800, "--speed", "1"], "unrecognized arguments: --speed"),
        (["train", *ON_H800, "--set", "parallel.pipe=5"], "expected an even number"),
        (["serve", *ON_H800, "--input", "9", "--output", "0"], "output_tokens is 0"),
        (["sweep", *ON_H800, "--vary", "pipe"], "--vary is 'pipe', expected"),
        (["limits", "local", "gpt-9", "--bandwidth", "1"], "MODEL is 'gpt-9'"),
        (["limits", "decode", "--layers", "0"], "limits.layers is 0"),
    ],
)
def test_one_line_and_exit_code_2(plan, arguments, message):
    code, output, errors = plan(*arguments)
    assert (code, output) == (2, "")
    assert errors.count("\n") == 1 and message in errors
    assert errors.startswith("dsv3 plan")


def test_planning_needs_no_jax():
    """Its modules load JAX nowhere, so it answers at once."""
    script = (
        "import sys; from dsv3_jax.cli import main;"
        "main(['plan', 'table', 'checks']); assert 'jax' not in sys.modules, 'jax'"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
