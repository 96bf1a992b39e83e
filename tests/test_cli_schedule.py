"""`dsv3 schedule`: the table and its figures, a picture, and one line for what is wrong."""

import json

import matplotlib.image
import pytest

from dsv3_jax import cli
from dsv3_jax.parallel.pipeline.simulate import V3_DURATIONS, formulas

SMALL = ["--stages", "4", "--micro-batches", "8"]


@pytest.fixture
def schedule(capsys, tmp_path, monkeypatch):
    """Runs `dsv3 schedule` in this process, in an empty folder: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            code = cli.main(["schedule", *arguments])
        except SystemExit as left:
            code = left.code
        return code, *capsys.readouterr()

    return run


def test_prints_the_table_and_its_figures(schedule):
    code, output, errors = schedule("dualpipe", *SMALL, "--durations", "1,2.5,2,1")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert [line[:8] for line in lines[:4]] == [f"rank {rank}  " for rank in range(4)]
    assert "dualpipe: 4 ranks, 4 stages, 8 micro-batches" in output
    assert "F 1 s, F&B 2.5 s, B 2 s, W 1 s" in output
    # 24 s of 8 forwards and backwards a stage; 1.5 s idle on every rank.
    assert "step         24 s" in output
    assert "bubble       6.2% of all ranks' time; 1.5 s on the rank that has most" in output
    assert "published 1.5 s" in output
    assert "activations  5 micro-batches in a stage at most; published 5" in output
    assert "parameters   2 stages a rank" in output


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev"])
def test_json_is_one_object(schedule, name):
    code, output, errors = schedule(name, "--stages", "16", "--micro-batches", "32", "--json")
    assert (code, errors) == (0, "")
    report = json.loads(output)
    published = formulas(name, 16, V3_DURATIONS)
    assert report["formula_bubble_seconds"] == pytest.approx(published.bubble_seconds)
    assert report["bubble_seconds"] == pytest.approx(published.bubble_seconds, rel=0.05)
    assert 0 < report["bubble_share"] < report["bubble_seconds"] / report["step_seconds"] + 1e-9
    assert report["step_seconds"] <= report["scan_seconds"]
    assert report["peak_activations"] == report["formula_activations"] == published.activations
    assert report["peak_activations"] == report["residual_slots"]
    assert report["parameter_copies"] == published.parameter_copies
    assert len(report["table"]) == report["ticks"]
    assert {len(row) for row in report["table"]} == {report["ranks"]} == {published.ranks}
    assert report["durations"]["weight"] == pytest.approx(0.032)


def test_draws_a_picture(schedule, tmp_path):
    code, output, errors = schedule("zb1p", *SMALL, "--png", "zb1p.png")
    assert (code, errors) == (0, "")
    assert output.endswith("drawn with these durations: zb1p.png\n")
    assert matplotlib.image.imread(tmp_path / "zb1p.png").ndim == 3


WRONG = [
    (["gpipe", *SMALL], "parallel.schedule is 'gpipe', expected one of 1f1b, zb1p, dualpipe"),
    (["dualpipe", "--stages", "3", "--micro-batches", "8"], "stages is 3, expected an even"),
    (["1f1b", "--stages", "0", "--micro-batches", "8"], "stages is 0, expected at least 1"),
    (
        ["dualpipe", "--stages", "4", "--micro-batches", "6"],
        "parallel.micro_batches is 6, expected at least 8, twice the 4 ranks (dualpipe)",
    ),
    (["1f1b", "--stages", "2"], "the following arguments are required: --micro-batches"),
    (["1f1b", "--stages", "x", "--micro-batches", "2"], "argument --stages: invalid int value"),
    (["1f1b", *SMALL, "--durations", "1,2"], "--durations is '1,2', expected seconds F,FB,B,W"),
    (["1f1b", *SMALL, "--durations", "1,2,a,1"], "--durations is '1,2,a,1', expected seconds"),
    (["1f1b", *SMALL, "--durations", "1,2,1,1"], "durations.weight is 1.0, expected less than"),
    (["1f1b", *SMALL, "--durations=-1,2,2,1"], "durations.forward is -1.0, expected a number"),
    (["1f1b", *SMALL, "--png", "absent/a.png"], "absent/a.png"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_use_ends_in_one_line(schedule, arguments, message):
    code, output, errors = schedule(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("dsv3 schedule: ") and errors.count("\n") == 1
    assert message in errors
