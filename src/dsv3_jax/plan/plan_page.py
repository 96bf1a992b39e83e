"""The planner's HTML pages, which need nothing else: bars, a pair's timeline, tables. No JAX."""

from collections.abc import Callable, Mapping, Sequence
from html import escape

from dsv3_jax.plan.layer_times import Woven
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.report import bytes_text, seconds_text
from dsv3_jax.plan.report_page import DARK, WIDTH, timeline
from dsv3_jax.plan.roofline import COMPUTE, NETWORK, NVLINK, Interval
from dsv3_jax.plan.search import Found, layout_name
from dsv3_jax.plan.state_sizes import StateSizes
from dsv3_jax.plan.sweep import Point
from dsv3_jax.plan.table import Table
from dsv3_jax.plan.train_plan import Detail, TrainPlan
from dsv3_jax.plan.train_report import assumptions, figures_text, part_colours, step_seconds

BAR_HEIGHT = 44
STYLE = f"""
body {{ font: 15px/1.45 sans-serif; color: #212529; max-width: {WIDTH}px; margin: 2em auto; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 17px; margin-top: 2em; }}
pre {{ font-size: 12px; overflow-x: auto; background: #f8f9fa; padding: 1em; }}
svg text {{ font: 11px sans-serif; }}
table {{ border-collapse: collapse; font-size: 13px; }}
th {{ text-align: left; border-bottom: 2px solid #adb5bd; padding: 4px 14px 4px 0; }}
td {{ border-bottom: 1px solid #e9ecef; padding: 3px 14px 3px 0; }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of sections: (heading, HTML)."""
    body = "\n".join(f"<h2>{escape(heading)}</h2>\n{html}" for heading, html in sections)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p>{escape(lead)}</p>
{body}
</body></html>
"""


def sweep_page(table: Table, points: Sequence[Point]) -> str:
    """The page of `dsv3 plan sweep`: a step bar for each combination, as wide as it is long."""
    plans = [(", ".join(point.values), point.plan) for point in points if point.plan is not None]
    longest = max(plan.step_seconds for _, plan in plans)
    bars = "".join(
        f"<p>{escape(name)}: {seconds_text(plan.step_seconds)}, MFU {plan.mfu_causal:.1%}</p>"
        + stacked_bar(step_seconds(plan), seconds_text, plan.step_seconds / longest)
        for name, plan in plans
    )
    return _table_page("dsv3 plan sweep", table, ("A step of the first rank", bars))


def search_page(table: Table, found: Found) -> str:
    """The page of `dsv3 plan search`: of the best layouts step and memory."""
    bars = []
    for candidate, plan in found.best[:3]:
        bars.append(f"<p>{escape(layout_name(candidate.config.parallel))}</p>")
        bars.append(stacked_bar(step_seconds(plan), seconds_text))
        bars.append(memory_bar(plan.memory, plan.memory_bytes_per_gpu))
    return _table_page("dsv3 plan search", table, ("Step and memory of the best", "".join(bars)))


def _table_page(title: str, table: Table, drawn: tuple[str, str]) -> str:
    return page(
        title,
        "Predicted by dsv3 plan; nothing here was measured on this cluster.",
        [(table.title, table.as_html()), drawn],
    )


def train_page(plan: TrainPlan, detail: Detail) -> str:
    """The page of `dsv3 plan train`."""
    title = f"dsv3 plan train: {plan.gpus:,} GPUs of {plan.cluster}"
    lead = (
        f"A step would take {seconds_text(plan.step_seconds)}:"
        f" {plan.tokens_per_second_per_gpu:,.0f} tokens/s a GPU, {plan.mfu_causal:.1%} of the BF16"
        " peak. Nothing here was measured on this cluster."
    )
    sections = [
        (f"One step of the first rank, {seconds_text(plan.step_seconds)}", _step_bar(plan)),
        ("Memory of one GPU", memory_bar(plan.memory, plan.memory_bytes_per_gpu)),
    ]
    if detail.pair is not None:
        taken = seconds_text(detail.pair.seconds)
        heading = f"An overlapped pair on a rank in the middle, {taken}"
        sections.append((heading, pair_timeline(detail.pair)))
    figures = f"<pre>{escape(figures_text(plan))}</pre>"
    remarks = "".join(f"<li>{escape(text)}</li>" for text in assumptions(plan))
    sections += [("In figures", figures), ("Assumed", f"<ul>{remarks}</ul>")]
    return page(title, lead, sections)


def _step_bar(plan: TrainPlan) -> str:
    return stacked_bar(step_seconds(plan), seconds_text)


def memory_bar(memory: StateSizes, card: Number) -> str:
    """What a GPU holds, and what is free, or by how much it is too much."""
    parts = {name: size for name, size in vars(memory).items() if size}
    if memory.total <= card:
        parts["free"] = card - memory.total
    bar = stacked_bar(parts, bytes_text)
    over = memory.total - card
    return bar if over <= 0 else bar + f"<p>Too much by {bytes_text(over)}.</p>"


def stacked_bar(
    parts: Mapping[str, Number], text: Callable[[Number], str], share: Number = 1.0
) -> str:
    """An SVG: the parts side by side, as wide as they are large, all together `share` of the page's
    width; and a legend with each one's `text`."""
    total = sum(parts.values()) / share or 1.0
    shapes, x = [], 0.0
    for (name, value), colour in zip(parts.items(), part_colours(parts), strict=True):
        width = WIDTH * value / total
        label = f"{name} {text(value)}"
        ink = "#ffffff" if colour in DARK else "#212529"
        shown = ""
        if len(label) * 6.2 + 8 <= width:
            shown = f'<text x="{x + 4:.1f}" y="27" fill="{ink}">{escape(label)}</text>'
        shapes.append(
            f"<g><title>{escape(label)}</title>"
            f'<rect x="{x:.2f}" y="0" width="{max(width, 0.4):.2f}" height="{BAR_HEIGHT}"'
            f' fill="{colour}" stroke="#ffffff" stroke-width="0.5"/>{shown}</g>'
        )
        x += width
    x, y = 0.0, BAR_HEIGHT + 14.0
    for (name, value), colour in zip(parts.items(), part_colours(parts), strict=True):
        label = f"{name} {text(value)}"
        width = 34 + 6.2 * len(label)
        if x + width > WIDTH:
            x, y = 0.0, y + 18
        shapes.append(
            f'<rect x="{x:.1f}" y="{y}" width="11" height="11" fill="{colour}"/>'
            f'<text x="{x + 16:.1f}" y="{y + 10}">{escape(label)}</text>'
        )
        x += width
    height = y + 18
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}"'
        f' width="{WIDTH}" height="{height:.0f}" role="img">\n' + "\n".join(shapes) + "\n</svg>"
    )


def pair_timeline(pair: Woven) -> str:
    """The drawing of report_page.py; rows go over the network and NVLink at the same time."""
    lanes = {
        "compute": [(COMPUTE, "matrix")],
        "links": [(NVLINK, "all-to-all"), (NETWORK, "all-to-all")],
    }
    intervals = tuple(
        Interval(lane, i.start, i.end, i.name, kind)
        for i in pair.intervals
        for lane, kind in lanes[i.lane]
    )
    return timeline(intervals, pair.seconds)
