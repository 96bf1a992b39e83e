"""Tables as text, JSON and HTML."""

import pytest

from dsv3_jax.plan.table import Table, percent, shown

TABLE = Table(
    title="Two",
    columns=("name", "number"),
    rows=(("a<b", 1234), ("longer", None)),
    notes=("One remark.",),
)


def test_text_stands_in_columns():
    assert TABLE.as_text().splitlines() == [
        "Two",
        "",
        "name    number",
        "a<b      1,234",
        "longer       -",
        "",
        "One remark.",
    ]


def test_json_and_html():
    assert TABLE.as_json()["rows"][0] == {"name": "a<b", "number": 1234}
    html = TABLE.as_html()
    assert "<td>a&lt;b</td><td class=number>1,234</td>" in html
    assert html.count("<tr>") == 3


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (0.0, "0"),
        (1234.567, "1,235"),
        (12.3456, "12.35"),
        (0.123456, "0.1235"),
        (3.7e-6, "3.7e-06"),
        (3, "3"),
        (True, "yes"),
        (None, "-"),
    ],
)
def test_cells(cell, text):
    assert shown(cell) == text


def test_percent():
    assert (percent(11, 10), percent(9.0, 10)) == ("+10.0%", "-10.0%")
