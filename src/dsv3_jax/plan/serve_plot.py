"""The picture of `dsv3 bench serve`: both latencies' distributions, and their course."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3_jax.plan.bench_serve import Seen, ServeReport

_FIRST, _EACH, _REFUSED = "#1f5fa8", "#d9822b", "#c0392b"


def draw(seen: Sequence[Seen], report: ServeReport, path: Path) -> None:
    """Writes a PNG of 1,800 x 600 pixels. Raises ValueError where nothing was answered."""
    FigureCanvasAgg(make_figure(seen, report)).print_png(path)


def make_figure(seen: Sequence[Seen], report: ServeReport) -> Figure:
    """The figure that `draw` writes."""
    answered = [each for each in seen if each.is_answered]
    if not answered:
        raise ValueError(f"{len(seen)} requests have no answer, expected one to draw")
    figure = Figure(figsize=(12, 4), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    shares, course = figure.subplots(1, 2)
    _draw_shares(shares, [each.ttft for each in answered], "to first token", _FIRST)
    _draw_shares(shares, [each.tpot for each in answered], "per token", _EACH)
    shares.set(xscale="log", xlabel="milliseconds", ylabel="share of requests", ylim=(0, 1.02))
    shares.axhline(0.95, color="#8a8f98", linewidth=0.8, linestyle=":")
    shares.legend(frameon=False)
    shares.set_title(
        f"{report.answered} of {report.requests} answered,"
        f" {report.tokens_per_second:,.0f} tokens/s",
        loc="left",
        fontsize=10,
    )
    course.plot(*_course(answered, "ttft"), ".", color=_FIRST, label="to first token")
    course.plot(*_course(answered, "tpot"), ".", color=_EACH, label="per token")
    refused = [each.sent_at for each in seen if not each.is_answered]
    if refused:
        bottom = [course.get_ylim()[0]] * len(refused)
        course.plot(refused, bottom, "|", color=_REFUSED, label="refused or failed")
    course.set(yscale="log", xlabel="seconds since the beginning", ylabel="milliseconds")
    course.legend(frameon=False)
    for axes in (shares, course):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_shares(axes: Axes, values: Sequence[float | None], name: str, colour: str) -> None:
    there = sorted(value * 1e3 for value in values if value is not None)
    if there:
        shares = [(place + 1) / len(there) for place in range(len(there))]
        axes.step(there, shares, where="post", color=colour, label=name)


def _course(answered: Sequence[Seen], name: str) -> tuple[list[float], list[float]]:
    there = [(each.sent_at, getattr(each, name)) for each in answered]
    return (
        [at for at, value in there if value is not None],
        [value * 1e3 for _, value in there if value is not None],
    )
