"""Pages are whole and need nothing else; bars fill their width and nothing overlaps."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import apply_overrides, read_config
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.plan_page import memory_bar, search_page, stacked_bar, train_page
from dsv3_jax.plan.report_page import WIDTH
from dsv3_jax.plan.search import Candidate, Found, search_table
from dsv3_jax.plan.train_plan import predict_training
from dsv3_jax.plan.train_report import PART_COLOURS, part_colours

SVG = "{http://www.w3.org/2000/svg}"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def planned():
    few = ["parallel.micro_batches=32", "train.batch_size=4096"]
    config = apply_overrides(read_config(CONFIGS / "v3_671b.py"), few)
    return predict_training(config, find_cluster("h800_2048"))


def test_a_bar_is_its_parts():
    parts = {"forward": 1.0, "bubble": 2.0, "else": 5.0}
    svg = ET.fromstring(stacked_bar(parts, "{:.0f} s".format, 0.5))
    boxes = [group.find(f"{SVG}rect") for group in svg.iter(f"{SVG}g")]
    widths = [float(box.get("width")) for box in boxes]
    assert sum(widths) == pytest.approx(WIDTH / 2, abs=0.1)
    assert [width / sum(widths) for width in widths] == pytest.approx(
        [1 / 8, 2 / 8, 5 / 8], abs=1e-3
    )
    ends = [float(b.get("x")) + w for b, w in zip(boxes, widths, strict=True)]
    starts = [float(box.get("x")) for box in boxes[1:]]
    assert starts == pytest.approx(ends[:-1], abs=0.1)
    assert [t.text for t in svg.iter(f"{SVG}title")] == ["forward 1 s", "bubble 2 s", "else 5 s"]


def test_colours_tell_parts_apart():
    names = dict.fromkeys(PART_COLOURS, 1.0)
    assert part_colours(names) == list(PART_COLOURS.values())
    step = ("forward", "overlapped", "backward", "weight", "bubble", "optimizer", "gathers")
    memory = ("weights", "optimizer", "gradients", "kept", "buffers", "reserved", "free")
    for together in (step, memory):
        assert len({PART_COLOURS[name] for name in together}) == len(together)


def test_memory_says_what_is_too_much(planned):
    memory = planned[0].memory
    assert "free" in memory_bar(memory, 85e9)
    full = memory_bar(replace(memory, kept=60e9), 85e9)
    assert "free" not in full and "Too much by" in full


def test_pages_are_whole(planned):
    html = train_page(*planned)
    assert html.startswith("<!doctype html>") and html.rstrip().endswith("</html>")
    assert not re.search(r"src=|href=|@import|url\(", html)
    for drawing in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ET.fromstring(drawing)
    assert f"{planned[0].tokens_per_second_per_gpu:,.0f} tokens/s a GPU" in html
    config = read_config(CONFIGS / "v3_671b.py")
    best = Candidate(
        config=config, keeps="config", peak_bytes=7e10, estimate_seconds=1.0, nodes_per_token=3.6
    )
    found = Found(
        best=((best, planned[0]),),
        fitting=1,
        fell_out={"memory": 2},
        examples={"memory": "x"},
        own="",
    )
    page = search_page(search_table(found), found)
    assert page.count("<svg") == 2  # step and memory
    assert "memory; x" in page
