"""The notebooks run from top to bottom, and what is committed of them is what they print."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import dsv3_jax

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
TOUR = ROOT / "notebooks" / "01_model_tour.ipynb"
SIZING = ROOT / "notebooks" / "02_size_a_run.ipynb"
MAX_BYTES = 200_000


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook) -> int:
    outputs = (output for cell in code_cells(notebook) for output in cell.outputs)
    return sum("image/png" in output.get("data", {}) for output in outputs)


def assert_tells_its_story(notebook):
    """The figures that hold on every machine, and the outcome of the comparison of routers."""
    text = printed(notebook)
    for figure in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "70,272", "250.5 GFLOP"):
        assert figure in text
    counted, arrays = re.findall(r"(?:= |arrays: +)([\d,]+)$", text, re.MULTILINE)[:2]
    assert counted == arrays
    final = text.rsplit("bias, γ = 0.01 ", 1)[1]
    balanced, unbalanced, softmax = map(float, re.findall(r"busiest expert ([\d.]+) times", final))
    assert 1 <= balanced < min(unbalanced, softmax)
    for before, after in re.findall(r"loss ([\d.]+) -> ([\d.]+)", text):
        assert float(after) < 0.7 * float(before)
    assert pictures(notebook) == 2


def assert_stays_in_the_budget(notebook):
    """Published figures stand beside predictions, and the layout that is found can be paid."""
    text = printed(notebook)
    for figure in ("1,297", "14,800", "129.0", "h800_2048", "86.9B parameters, 10.0B active"):
        assert figure in text
    (share,) = re.findall(r"(\d+)% of the budget", text)
    assert 50 < int(share) <= 100
    best = re.search(r"^1  (PP\d+ EP\d+ DP\d+ \w+)", text, re.MULTILINE)
    assert best is not None and f"{best[1]}: {share}% of the budget" in text
    (each,) = re.findall(r"each token +([\d.]+) ms", text)
    assert float(each) <= 40
    assert pictures(notebook) == 1


STORIES = {TOUR: assert_tells_its_story, SIZING: assert_stays_in_the_budget}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_executed(path):
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert "error" not in kinds
    assert "/home/" not in printed(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_story_as_committed(path):
    STORIES[path](nbformat.read(path, as_version=4))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(dsv3_jax.__file__).parents[1]))
    notebook = nbformat.read(path, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}  # nothing of the repository is in reach
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    errors = [
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stderr"
    ]
    assert errors == []
    STORIES[path](notebook)
