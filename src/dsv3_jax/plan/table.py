"""A table of results: as text to read, as JSON, as HTML. Imports no JAX."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

Cell = str | float | int | bool | None
"""None is shown as a dash."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns, and remarks below them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        assert all(len(row) == len(self.columns) for row in self.rows), self.title

    def as_json(self) -> dict[str, Any]:
        """The rows as objects."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}

    def as_text(self) -> str:
        """Columns that stand below each other, numbers to the right."""
        cells = [self.columns, *[tuple(map(shown, row)) for row in self.rows]]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [all(not isinstance(row[i], str) for row in self.rows) for i in range(len(widths))]
        lines = [self.title, ""]
        for row in cells:
            parts = [
                f"{cell:>{width}}" if to_right else f"{cell:<{width}}"
                for cell, width, to_right in zip(row, widths, right, strict=True)
            ]
            lines.append("  ".join(parts).rstrip())
        return "\n".join([*lines, *[""] * bool(self.notes), *self.notes])

    def as_html(self) -> str:
        """A `<table>`, the remarks below it."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = "\n".join(f"<tr>{_html_cells(row)}</tr>" for row in self.rows)
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table>{notes}"


def _html_cells(row: Sequence[Cell]) -> str:
    return "".join(
        f"<td{'' if isinstance(cell, str) else ' class=number'}>{escape(shown(cell))}</td>"
        for cell in row
    )


def shown(cell: Cell) -> str:
    """A cell as text: four digits of a fraction, thousands apart."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, str):
        return cell
    if cell == 0 or not math.isfinite(cell):
        return f"{cell:g}"
    if abs(cell) < 1e-3:
        return f"{cell:.4g}"
    digits = max(0, 3 - math.floor(math.log10(abs(cell))))
    return f"{cell:,.{digits}f}"


def percent(predicted: float | int, published: float | int) -> str:
    """How far the first is from the second."""
    return f"{predicted / published - 1:+.1%}"
