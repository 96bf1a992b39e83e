"""The page is whole, self-contained, and nothing in its drawings overlaps or leaves them."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from dsv3_jax.plan.links import KINDS
from dsv3_jax.plan.report_page import (
    CHARACTER,
    KIND_COLOURS,
    LEFT,
    MEMORY_COLOURS,
    WIDTH,
    as_html,
    memory_bar,
    timeline,
)
from tests.plan.test_report import analysis

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg: str) -> list[tuple[float, float, float, float, str]]:
    """(x, y, width, height, label) of every bar, from its drawing."""
    found = []
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        sizes = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        found.append((*sizes, "" if text is None else text.text))
    return found


def assert_apart(bars):
    """No bar of a row covers another, none leaves the drawing, every label fits its bar."""
    for _, row in itertools.groupby(sorted(bars, key=lambda b: b[1]), key=lambda b: b[1]):
        ends = 0.0
        for x, _, width, _, label in sorted(row):
            assert x >= ends - 0.5
            assert x + width <= WIDTH + 0.5
            assert not label or len(label) * CHARACTER <= width
            ends = x + width


@pytest.mark.parametrize("temp_gb", [40, 300])
def test_memory_bar(temp_gb):
    report = analysis(temp_gb).report
    svg = memory_bar(report)
    assert_apart(boxes(svg))
    bars = boxes(svg)
    scale = WIDTH / max(report.peak_bytes_per_gpu, report.memory_bytes_per_gpu)
    used = [bar[2] for bar in bars[: len([s for s in report.bytes_by_kind.values() if s])]]
    assert sum(used) == pytest.approx(report.peak_bytes_per_gpu * scale, abs=2)
    assert ("free" in svg) == report.fits
    assert "the card ends: 84.94 GB" in svg


def test_timeline_of_the_busiest_block():
    prediction = analysis().prediction
    assert prediction.busiest_block == "body"
    timing = prediction.blocks["body"]
    svg = timeline(timing.intervals, timing.seconds)
    lanes = [(LEFT, WIDTH - LEFT)] * 3
    bars = [bar for bar in boxes(svg) if (bar[0], bar[2]) not in lanes]
    assert len(bars) == len(timing.intervals)
    assert_apart(bars)
    assert all(bar[0] >= LEFT for bar in bars)
    ends = max(bar[0] + bar[2] for bar in bars)
    assert ends == pytest.approx(WIDTH, abs=1)


def test_texts_stay_inside():
    """The rightmost letter of every text that starts where it is put."""
    for svg in (memory_bar(analysis().report), timeline((), 1.0)):
        width, height = map(float, ET.fromstring(svg).get("viewBox").split()[2:])
        for text in ET.fromstring(svg).iter(f"{SVG}text"):
            length = len(text.text) * CHARACTER
            before = {"end": length, "middle": length / 2}.get(text.get("text-anchor"), 0.0)
            left = float(text.get("x")) - before
            assert -0.5 <= left <= left + length <= width + 8
            assert 8 <= float(text.get("y")) <= height


def test_page_needs_nothing_else():
    page = as_html(analysis())
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "Nothing here was\nmeasured on a GPU" in page
    assert not re.search(r"(?:src|href)=|@import|url\(", page)


def test_everything_has_a_colour():
    assert set(KINDS) <= set(KIND_COLOURS)
    assert set(analysis().report.bytes_by_kind) == set(MEMORY_COLOURS)
