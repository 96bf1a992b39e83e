"""The report as one HTML page that needs nothing else: a memory bar and a timeline. Imports no JAX.

The timeline is of one run of the block in which most transfer time passes: of a pipeline, an
overlapped pair of chunks, or the layer in it.
"""

from collections.abc import Iterator
from html import escape

from dsv3_jax.plan.links import Number
from dsv3_jax.plan.report import Analysis, StepReport, as_text, bytes_text, seconds_text
from dsv3_jax.plan.roofline import COMPUTE, NETWORK, NVLINK, Interval

WIDTH = 1160
"""Of both drawings, in pixels."""
LEFT = 80
"""Room for the lanes' names."""
LANE_HEIGHT, LANE_GAP = 34, 12
CHARACTER = 6.2
"""Width of a character at 11 pixels, a little more than the mean of a sans-serif font."""

MEMORY_COLOURS = {
    "weights": "#1f6f8b",
    "optimizer": "#56a3a6",
    "latent cache": "#8ecae6",
    "gathered weights": "#84a98c",
    "gradients": "#c08497",
    "kept for backward": "#bc6c25",
    "activations and buffers": "#e09f3e",
    "other arguments": "#7d8597",
    "results": "#9a8c98",
    "code": "#495057",
}
KIND_COLOURS = {
    "matrix": "#1f6f8b",
    "memory": "#8ecae6",
    "wait": "#d1495b",
    "loop": "#adb5bd",
    "choice": "#ced4da",
    "all-to-all": "#e09f3e",
    "ragged-all-to-all": "#e09f3e",
    "all-gather": "#7fb069",
    "reduce-scatter": "#588157",
    "all-reduce": "#344e41",
    "collective-permute": "#9d6b9e",
    "collective-broadcast": "#7fb069",
}
DARK = {"#1f6f8b", "#d1495b", "#588157", "#344e41", "#9d6b9e", "#495057", "#7d8597"}
"""Colours that white letters stand on."""


def as_html(analysis: Analysis) -> str:
    """The whole page."""
    report = analysis.report
    block = analysis.prediction.busiest_block
    timing = analysis.prediction.blocks[block]
    title = f"dsv3 compile: {report.devices:,} x {report.gpu}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>
body {{ font: 15px/1.45 sans-serif; color: #212529; max-width: {WIDTH}px; margin: 2em auto; }}
h1 {{ font-size: 22px; }} h2 {{ font-size: 17px; margin-top: 2em; }}
pre {{ font-size: 12px; overflow-x: auto; background: #f8f9fa; padding: 1em; }}
svg text {{ font: 11px sans-serif; }}
</style></head><body>
<h1>{escape(title)}</h1>
<p>Predicted step time {seconds_text(report.predicted_step_seconds)};
{report.hidden_fraction:.1%} of the transfers' predicted time is under computation. Nothing here was
measured on a GPU: bytes and FLOPs are the compiler's, times a roofline's.</p>
<h2>Memory of one GPU</h2>
{memory_bar(report)}
<h2>Timeline of one run of <code>{escape(block)}</code>, predicted
{seconds_text(timing.seconds)}</h2>
{timeline(timing.intervals, timing.seconds)}
<h2>In figures</h2>
<pre>{escape(as_text(report))}</pre>
</body></html>
"""


def memory_bar(report: StepReport) -> str:
    """An SVG: the parts of the peak, what is free or too much, and where the card ends."""
    peak, card = report.peak_bytes_per_gpu, report.memory_bytes_per_gpu
    scale = WIDTH / max(peak, card)
    parts = [(name, size) for name, size in report.bytes_by_kind.items() if size]
    shapes, legend, x = [], [], 0.0
    for name, size in parts:
        colour = MEMORY_COLOURS[name]
        label = f"{name} {bytes_text(size)}"
        shapes.append(_box(x, 6, size * scale, 44, colour, label))
        legend.append((colour, label))
        x += size * scale
    if peak < card:
        label = f"free {bytes_text(card - peak)}"
        shapes.append(_box(x, 6, (card - peak) * scale, 44, "#e9ecef", label))
        legend.append(("#e9ecef", label))
    end = card * scale
    shapes.append(
        f'<path d="M{end - 1:.1f} 0V56" stroke="#d1495b" stroke-width="2"/>'
        f'<text x="{end - 4:.1f}" y="70" text-anchor="end">'
        f"the card ends: {bytes_text(card)}</text>"
    )
    rows, height = _legend(legend, 82)
    return _svg(height, [*shapes, *rows])


def timeline(intervals: tuple[Interval, ...], seconds: float) -> str:
    """An SVG: a lane each for compute, NVLink and network, a bar for every interval."""
    span = max([seconds, *(interval.end for interval in intervals)]) or 1.0
    scale = (WIDTH - LEFT) / span
    shapes = []
    lanes = (COMPUTE, NVLINK, NETWORK)
    for row, lane in enumerate(lanes):
        y = row * (LANE_HEIGHT + LANE_GAP)
        shapes.append(f'<text x="0" y="{y + LANE_HEIGHT / 2 + 4:.1f}">{lane}</text>')
        shapes.append(_box(LEFT, y, WIDTH - LEFT, LANE_HEIGHT, "#f8f9fa", ""))
        for i in (interval for interval in intervals if interval.lane == lane):
            title = f"{i.name} ({i.kind}) {seconds_text(i.end - i.start)}"
            name = "wait" if i.kind == "wait" else i.name
            x = LEFT + i.start * scale
            width = (i.end - i.start) * scale
            shapes.append(_box(x, y, width, LANE_HEIGHT, KIND_COLOURS[i.kind], name, title))
    y = len(lanes) * (LANE_HEIGHT + LANE_GAP) + 4
    shapes += list(_axis(span, y))
    used = dict.fromkeys(interval.kind for interval in intervals)
    rows, height = _legend([(KIND_COLOURS[kind], kind) for kind in used], y + 34)
    return _svg(height, [*shapes, *rows])


def _axis(span: float, y: Number) -> Iterator[str]:
    yield f'<path d="M{LEFT} {y}H{WIDTH}" stroke="#adb5bd"/>'
    for tick in range(6):
        x = LEFT + (WIDTH - LEFT) * tick / 5
        anchor = "end" if tick == 5 else "middle"
        yield f'<path d="M{x:.1f} {y}v5" stroke="#adb5bd"/>'
        text = seconds_text(span * tick / 5) if tick else "0"
        yield f'<text x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">{text}</text>'


def _box(
    x: Number, y: Number, width: Number, height: Number, colour: str, label: str, title: str = ""
) -> str:
    """A rectangle with its label inside, if that fits, and always as a tooltip."""
    room = int((width - 8) / CHARACTER)
    text = label if len(label) <= room else label[: room - 1] + "…" if room >= 6 else ""
    shown = ""
    if text:
        ink = "#ffffff" if colour in DARK else "#212529"
        shown = (
            f'<text x="{x + 4:.1f}" y="{y + height / 2 + 4:.1f}" fill="{ink}">{escape(text)}</text>'
        )
    tip = f"<title>{escape(title or label)}</title>" if title or label else ""
    return (
        f'<g>{tip}<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.4):.2f}" height="{height}"'
        f' fill="{colour}" stroke="#ffffff" stroke-width="0.3"/>{shown}</g>'
    )


def _legend(entries: list[tuple[str, str]], y: Number) -> tuple[list[str], Number]:
    """Coloured squares with their names, in rows from `y` on; and where they end."""
    shapes, x = [], 0.0
    for colour, label in entries:
        width = 16 + CHARACTER * len(label) + 18
        if x + width > WIDTH:
            x, y = 0.0, y + 18
        shapes.append(
            f'<rect x="{x:.1f}" y="{y}" width="11" height="11" fill="{colour}"/>'
            f'<text x="{x + 16:.1f}" y="{y + 10}">{escape(label)}</text>'
        )
        x += width
    return shapes, y + 18


def _svg(height: Number, shapes: list[str]) -> str:
    inside = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}"'
        f' width="{WIDTH}" height="{height:.0f}" role="img">\n{inside}\n</svg>'
    )
