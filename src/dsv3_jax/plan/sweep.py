"""What a run takes when one or two things are others: `dsv3 plan sweep`. Imports no JAX."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from dsv3_jax.config import RunConfig, apply_overrides
from dsv3_jax.config.checks import require
from dsv3_jax.plan.cluster import Cluster, changed
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.table import Cell, Table
from dsv3_jax.plan.train_plan import TrainPlan, predict_training
from dsv3_jax.plan.train_report import part_colours, step_seconds

OF_CLUSTER = ("cluster", "gpu")


@dataclass(frozen=True, kw_only=True)
class Vary:
    """A field and the values it takes, as text."""

    field: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Vary":
        """`FIELD=A,B,C`."""
        field, equals, values = text.partition("=")
        found = tuple(part.strip() for part in values.split(",") if part.strip())
        holds = bool(field.strip()) and equals == "=" and bool(found) and "." in field
        require(holds, "--vary", text, "SECTION.FIELD=A,B,C")
        return cls(field=field.strip(), values=found)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination: its plan, or why there is none."""

    values: tuple[str, ...]
    plan: TrainPlan | None
    reason: str = ""


def sweep(
    config: RunConfig,
    cluster: Cluster,
    varied: list[Vary],
    *,
    tokens: Number | None = None,
) -> list[Point]:
    """Every combination of the values, in their order.

    A combination that the config or the cluster refuses has no plan; a field that neither has
    raises ValueError, as does a sweep of which nothing is possible.
    """
    points = []
    for values in itertools.product(*(vary.values for vary in varied)):
        assigned = list(zip([vary.field for vary in varied], values, strict=True))
        try:
            plan = _predict(config, cluster, assigned, tokens)
            points.append(Point(values=values, plan=plan))
        except ValueError as error:
            points.append(Point(values=values, plan=None, reason=str(error)))
    reasons = [point.reason for point in points]
    require(not all(reasons), "--vary", [v.field for v in varied], f"a possible one: {reasons[0]}")
    return points


def _predict(
    config: RunConfig, cluster: Cluster, assigned: list[tuple[str, str]], tokens: Number | None
) -> TrainPlan:
    overrides = []
    for field, value in assigned:
        if field.partition(".")[0] in OF_CLUSTER:
            cluster = changed(cluster, field, value)
        else:
            overrides.append(f"{field}={value}")
    return predict_training(apply_overrides(config, overrides), cluster, tokens=tokens)[0]


def sweep_table(points: list[Point], varied: list[Vary]) -> Table:
    """A row for each combination."""
    rows: list[tuple[Cell, ...]] = []
    for point in points:
        p = point.plan
        if p is None:
            rows.append((*point.values, *[None] * 8, point.reason))
            continue
        rows.append(
            (
                *point.values,
                p.gpus,
                p.step_seconds,
                p.mean_parts.bubble / p.step_seconds,
                p.tokens_per_second_per_gpu,
                p.mfu_causal,
                p.gpu_hours,
                p.dollars,
                p.peak_bytes_per_gpu / 1e9,
                "fits" if p.fits else "does not fit",
            )
        )
    columns = ("GPUs", "step (s)", "bubble", "tokens/s a GPU", "MFU", "GPU hours", "$", "GB a GPU")
    return Table(
        title="What if",
        columns=(*(vary.field for vary in varied), *columns, "memory"),
        rows=tuple(rows),
        notes=("Predicted. Bubble: share of the step, mean over the ranks; MFU causal, of BF16.",),
    )


def draw_sweep(points: list[Point], varied: list[Vary], path: Path) -> None:
    """A PNG: a bar for each combination, its step by parts; hatched where memory does not do."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [point for point in points if point.plan is not None]
    figure = Figure((8.0, 1.6 + 0.42 * len(shown)), dpi=150)
    figure.set_layout_engine("constrained")
    axes = figure.subplots()
    used: dict[str, str] = {}
    for row, point in enumerate(shown):
        assert point.plan is not None
        parts, left = step_seconds(point.plan), 0.0
        for (name, seconds), colour in zip(parts.items(), part_colours(parts), strict=True):
            hatch = None if point.plan.fits else "//"
            label = None if name in used else name
            used.setdefault(name, colour)
            axes.barh(row, seconds, 0.7, left, color=colour, label=label, hatch=hatch)
            left += seconds
        speed = f"{point.plan.step_seconds:.3g} s, {point.plan.mfu_causal:.1%}"
        axes.text(left, row, f" {speed}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [", ".join(point.values) for point in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    longest = max(point.plan.step_seconds for point in shown if point.plan is not None)
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel("seconds a step of the first rank, and MFU (hatched: memory does not suffice)")
    axes.set_title(", ".join(vary.field for vary in varied), fontsize=10, loc="left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(used), fontsize=8, frameon=False)
    FigureCanvasAgg(figure).print_png(path)
