"""Pictures of a pipeline schedule: its table as text, its run with real durations as PNG."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from dsv3_jax.parallel.pipeline.orders import Action, Kind, Layout
from dsv3_jax.parallel.pipeline.schedule import Schedule
from dsv3_jax.parallel.pipeline.simulate import Timeline

LETTERS = {
    Kind.FORWARD: "f",
    Kind.BACKWARD: "b",
    Kind.BACKWARD_INPUT: "i",
    Kind.BACKWARD_WEIGHT: "w",
}
_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "full backward",
    Kind.BACKWARD_INPUT: "input backward",
    Kind.BACKWARD_WEIGHT: "weight backward",
}
_COLOURS = {  # (chunk 0, chunk 1), light enough for black numbers
    Kind.FORWARD: ("#f2b04d", "#f9d8a4"),
    Kind.BACKWARD: ("#5fae6b", "#b0d9b5"),
    Kind.BACKWARD_INPUT: ("#58b5b9", "#b3dfe0"),
    Kind.BACKWARD_WEIGHT: ("#7da3dc", "#c6d7f1"),
}
_INK, _IDLE = "#2b2f36", "#eef0f3"
DPI = 150
_ROW_INCHES, _MARGIN_INCHES = 0.3, 1.25
_BAR = 0.9
"""Height of a bar, of a row's 1."""
_SMALLEST_FONT = 5.0
_WIDTHS_INCHES = (10.0, 30.0)
_INCHES_A_CELL = 0.2
"""What a forward, the shortest cell with a number, is given while the widest picture allows it."""


def draw_text(schedule: Schedule) -> str:
    """The table: a row for each rank, a column for each tick, then a legend.

    f, b, i, w are forward, full, input and weight backward, with the micro-batch; f4+b1 is an
    overlapped pair, a dot an idle tick, ' marks DualPipeV's way back (in DualPipe the number tells:
    the second half of the micro-batches enters at the last rank).
    """
    layout = schedule.layout
    rows = [[_cell(layout, a) for a in column] for column in zip(*schedule.table, strict=True)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    names = [f"rank {rank}" for rank in range(schedule.ranks)]
    lines = [
        f"{name:<{len(names[-1])}}  "
        + " ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join([*lines, "", *_legend(schedule)])


def _legend(schedule: Schedule) -> Iterator[str]:
    layout = schedule.layout
    kinds = {action.kind for row in schedule.table for action in row}
    parts = [f"{LETTERS[kind]} {_NAMES[kind]}" for kind in LETTERS if kind in kinds]
    if Kind.OVERLAPPED in kinds:
        parts.append("f+b overlapped pair")
    yield ", ".join([*parts, ". idle"]) + "; a number is a micro-batch, a column a tick"
    if layout.is_bidirectional:
        half = layout.micro_batches // 2
        yield f"0-{half - 1} enter at rank 0, {half}-{layout.micro_batches - 1} at the last rank"
    elif layout.chunks == 2:
        yield "' is the way back, from the last rank to rank 0"


def _cell(layout: Layout, action: Action) -> str:
    backward = Kind.BACKWARD if action.kind == Kind.OVERLAPPED else action.kind
    parts = []
    for kind, work in ((Kind.FORWARD, action.forward), (backward, action.backward)):
        if work is not None:
            mark = "'" * (layout.chunk_of(work) and not layout.is_bidirectional)
            parts.append(f"{LETTERS[kind]}{work.micro_batch}{mark}")
    return "+".join(parts) or "."


def table_cells(schedule: Schedule) -> list[list[str]]:
    """The text of every action, [tick][rank]."""
    return [[_cell(schedule.layout, action) for action in row] for row in schedule.table]


def draw_png(timeline: Timeline, path: Path, title: str = "") -> None:
    """Writes the picture of `make_figure` to `path`."""
    FigureCanvasAgg(make_figure(timeline, title)).print_png(path)


def make_figure(timeline: Timeline, title: str = "") -> Figure:
    """A bar for each action, seconds from left to right, a row for each rank, rank 0 on top.

    Colours are kinds, paler for a rank's second chunk; grey is idle. Numbers are micro-batches,
    left out where the bars are too short for them. The right edge says how long each rank idles.
    """
    layout, total = timeline.layout, timeline.total_seconds
    shortest = min(float((e - s).min()) for s, e in zip(timeline.start, timeline.end, strict=True))
    low, high = _WIDTHS_INCHES
    width = min(max(total / max(shortest, total * 1e-6) * _INCHES_A_CELL, low), high)
    figure = Figure((width, _MARGIN_INCHES + _ROW_INCHES * layout.ranks), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    axes = figure.subplots()
    points_a_second = 72 * (width - 1.6) / total
    for rank, actions in enumerate(timeline.actions):
        axes.add_patch(Rectangle((0, rank - _BAR / 2), total, _BAR, facecolor=_IDLE, linewidth=0))
        spans = zip(actions, timeline.start[rank], timeline.end[rank], strict=True)
        for action, start, end in spans:
            _draw_action(axes, layout, action, rank, float(start), float(end), points_a_second)
    _label(axes, timeline, title)
    return figure


def _draw_action(
    axes: Axes,
    layout: Layout,
    action: Action,
    rank: int,
    start: float,
    end: float,
    points_a_second: float,
) -> None:
    """One bar; an overlapped pair is two in one frame, of which the forward takes a third."""
    backward_kind = Kind.BACKWARD if action.kind == Kind.OVERLAPPED else action.kind
    cut = start + (end - start) / 3 if action.kind == Kind.OVERLAPPED else start
    halves = [(Kind.FORWARD, action.forward, start, end if action.backward is None else cut)]
    halves.append((backward_kind, action.backward, cut, end))
    for kind, work, left, right in halves:
        if work is None:
            continue
        colour = _COLOURS[kind][layout.chunk_of(work)]
        bar = Rectangle((left, rank - _BAR / 2), right - left, _BAR, facecolor=colour)
        bar.set(edgecolor="white", linewidth=0.4)
        axes.add_patch(bar)
        number = str(work.micro_batch)
        size = min(8.0, (right - left) * points_a_second / (0.62 * len(number) + 0.2))
        if size >= _SMALLEST_FONT:
            text = axes.text((left + right) / 2, rank, number, fontsize=size, color=_INK)
            text.set(ha="center", va="center_baseline")
    if action.kind == Kind.OVERLAPPED:
        frame = Rectangle((start, rank - _BAR / 2), end - start, _BAR, fill=False, edgecolor=_INK)
        frame.set(linewidth=0.7, zorder=2)
        axes.add_patch(frame)


def _label(axes: Axes, timeline: Timeline, title: str) -> None:
    layout, total = timeline.layout, timeline.total_seconds
    axes.set_xlim(0, total)
    axes.set_ylim(layout.ranks - 0.5, -0.5)
    axes.set_yticks(range(layout.ranks), [f"rank {rank}" for rank in range(layout.ranks)])
    axes.set_xlabel("seconds", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10]))
    axes.tick_params(labelsize=8, length=2)
    axes.tick_params(axis="y", length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title or _title(timeline), fontsize=11, loc="left")
    idle = axes.secondary_yaxis("right")
    shares = [f"{100 * bubble / total:.1f} % idle" for bubble in timeline.bubble_seconds]
    idle.set_yticks(range(layout.ranks), shares)
    idle.tick_params(labelsize=8, length=0)
    idle.spines["right"].set_visible(False)
    _draw_legend(axes, timeline)


def _title(timeline: Timeline) -> str:
    layout = timeline.layout
    counts = f"{layout.ranks} ranks, {layout.stages} stages, {layout.micro_batches} micro-batches"
    return f"{layout.name}: {counts}, {timeline.total_seconds:.3g} s"


def _draw_legend(axes: Axes, timeline: Timeline) -> None:
    layout = timeline.layout
    kinds = {action.kind for actions in timeline.actions for action in actions}
    chunks = ("", ", other direction" if layout.is_bidirectional else ", way back")
    handles = []
    for kind, colours in _COLOURS.items():
        if kind in kinds or (kind == Kind.FORWARD and Kind.OVERLAPPED in kinds):
            handles += [
                Patch(facecolor=colours[chunk], label=_NAMES[kind] + chunks[chunk])
                for chunk in range(layout.chunks)
            ]
    if Kind.OVERLAPPED in kinds:
        handles.append(Patch(facecolor="white", edgecolor=_INK, label="overlapped pair"))
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    axes.figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=(len(handles) + 1) // 2 if layout.chunks == 2 else len(handles),
        fontsize=8,
        frameon=False,
        handlelength=1.4,
        columnspacing=1.6,
    )
