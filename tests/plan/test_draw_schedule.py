"""The drawn schedule: the text's cells, and a picture of every action."""

import sys

import matplotlib
import matplotlib.image
import pytest
from matplotlib.patches import Rectangle

from dsv3_jax.parallel.pipeline.schedule import make_schedule
from dsv3_jax.parallel.pipeline.simulate import V3_DURATIONS, simulate
from dsv3_jax.plan.draw_schedule import draw_png, draw_text, make_figure, table_cells

NAMES = ("1f1b", "zb1p", "dualpipe", "dualpipev")


def test_text_of_1f1b():
    assert draw_text(make_schedule("1f1b", 2, 3)) == (
        "rank 0  f0 f1 .  b0 f2 b1 .  b2\n"
        "rank 1  .  f0 b0 f1 b1 f2 b2 .\n"
        "\n"
        "f forward, b full backward, . idle; a number is a micro-batch, a column a tick"
    )


def test_text_of_dualpipe():
    """Both ranks of the smallest one, and what the legend says of the directions."""
    lines = draw_text(make_schedule("dualpipe", 2, 4)).splitlines()
    assert " ".join(lines[0].split()) == "rank 0 f0 f2 f1 b2 f3+b0 b3 i1 w1"
    assert " ".join(lines[1].split()) == "rank 1 f2 f0 f3 b0 f1+b2 b1 i3 w3"
    assert "f+b overlapped pair" in lines[3]
    assert lines[4] == "0-1 enter at rank 0, 2-3 at the last rank"


def test_text_of_dualpipev_marks_the_way_back():
    text = draw_text(make_schedule("dualpipev", 2, 2))
    row = " ".join(text.splitlines()[0].split())
    assert row == "rank 0 f0 f0' f1 b0' f1'+b0 b1' i1 w1"
    assert text.endswith("' is the way back, from the last rank to rank 0")


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_ticks(name):
    schedule = make_schedule(name, 12, 24)
    rows = draw_text(schedule).split("\n\n")[0].splitlines()
    assert len(rows) == schedule.ranks
    cells = [row[8:].split() for row in rows]
    assert [list(row) for row in zip(*cells, strict=True)] == table_cells(schedule)
    starts = {row.index(cell[0], 7) for row, cell in zip(rows, cells, strict=True)}
    assert len(starts) == 1


@pytest.mark.parametrize(("name", "stages", "micro_batches"), [(n, 8, 20) for n in NAMES])
def test_picture_has_a_bar_for_every_half(tmp_path, name, stages, micro_batches):
    timeline = simulate(make_schedule(name, stages, micro_batches), V3_DURATIONS)
    axes = make_figure(timeline).axes[0]
    bars = [p for p in axes.patches if isinstance(p, Rectangle)]
    numbers = [text.get_text() for text in axes.texts]
    halves = [
        work
        for actions in timeline.actions
        for action in actions
        for work in (action.forward, action.backward)
        if work is not None
    ]
    pairs = sum(
        a.forward is not None and a.backward is not None for o in timeline.actions for a in o
    )
    assert len(bars) == len(halves) + pairs + timeline.layout.ranks  # with frames and idle grounds
    assert sorted(numbers) == sorted(str(work.micro_batch) for work in halves)
    assert max(bar.get_x() + bar.get_width() for bar in bars) == pytest.approx(
        timeline.total_seconds
    )
    assert axes.get_xlabel() == "seconds"
    draw_png(timeline, tmp_path / "schedule.png", title="mine")
    height, width, _ = matplotlib.image.imread(tmp_path / "schedule.png").shape
    assert 1500 <= width <= 4500 and height == int(150 * (1.25 + 0.3 * timeline.layout.ranks))


def test_crowded_picture_leaves_numbers_out():
    timeline = simulate(make_schedule("1f1b", 2, 500), V3_DURATIONS)
    figure = make_figure(timeline)
    assert figure.get_figwidth() == 30
    assert not figure.axes[0].texts


def test_nothing_global_changes(tmp_path):
    settings, modules = dict(matplotlib.rcParams), set(sys.modules)
    draw_png(simulate(make_schedule("1f1b", 1, 1), V3_DURATIONS), tmp_path / "schedule.png")
    assert dict(matplotlib.rcParams) == settings
    assert "matplotlib.pyplot" not in set(sys.modules) - modules
