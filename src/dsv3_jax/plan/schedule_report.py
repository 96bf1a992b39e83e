"""What a pipeline schedule costs: `dsv3 schedule`."""

import dataclasses
import json
from pathlib import Path

from dsv3_jax.parallel.pipeline.arrays import lower_schedule
from dsv3_jax.parallel.pipeline.schedule import Schedule, make_schedule
from dsv3_jax.parallel.pipeline.simulate import (
    V3_DURATIONS,
    Durations,
    formulas,
    simulate,
    simulate_ticks,
)
from dsv3_jax.plan.draw_schedule import draw_png, draw_text, table_cells


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleReport:
    """Figures of one schedule; times in seconds, without the optimizer's."""

    schedule: str
    stages: int
    ranks: int
    micro_batches: int
    ticks: int
    durations: dict[str, float]
    step_seconds: float
    """With every rank running ahead as far as its inputs allow, as the papers count."""
    scan_seconds: float
    """With neighbours in step, tick by tick: one scan over the table."""
    bubble_seconds: float
    """Idle time of the rank that has most."""
    bubble_share: float
    """Idle time of all ranks over all their time."""
    formula_bubble_seconds: float
    """As published."""
    peak_activations: int
    """Most forwards that a rank holds."""
    formula_activations: int
    parameter_copies: int
    """Stages whose parameters a rank holds."""
    activation_slots: int
    """Received activations that wait at a time, on the rank that has most; the next three too."""
    gradient_slots: int
    residual_slots: int
    weight_slots: int


def report_schedule(schedule: Schedule, durations: Durations = V3_DURATIONS) -> ScheduleReport:
    """Simulates `schedule`, and puts the published formulas beside it."""
    layout, arrays = schedule.layout, lower_schedule(schedule)
    timeline = simulate(schedule, durations)
    published = formulas(layout.name, layout.stages, durations)
    return ScheduleReport(
        schedule=layout.name,
        stages=layout.stages,
        ranks=layout.ranks,
        micro_batches=layout.micro_batches,
        ticks=schedule.ticks,
        durations=dataclasses.asdict(durations),
        step_seconds=timeline.total_seconds,
        scan_seconds=simulate_ticks(schedule, durations).total_seconds,
        bubble_seconds=float(timeline.bubble_seconds.max()),
        bubble_share=timeline.bubble_share,
        formula_bubble_seconds=published.bubble_seconds,
        peak_activations=int(timeline.peak_activations.max()),
        formula_activations=published.activations,
        parameter_copies=layout.chunks,
        activation_slots=int(arrays.activation_slots.max()),
        gradient_slots=int(arrays.gradient_slots.max()),
        residual_slots=int(arrays.residual_slots.max()),
        weight_slots=int(arrays.weight_slots.max()),
    )


def parse_durations(text: str | None) -> Durations:
    """`F,FB,B,W` in seconds; None is DeepSeek-V3's. Raises ValueError for anything else."""
    if text is None:
        return V3_DURATIONS
    try:
        forward, overlapped, backward, weight = map(float, text.split(","))
    except ValueError:
        rule = "seconds F,FB,B,W, e.g. 0.049,0.144,0.107,0.032"
        raise ValueError(f"--durations is {text!r}, expected {rule}") from None
    return Durations(forward=forward, overlapped=overlapped, backward=backward, weight=weight)


def print_schedule(
    name: str,
    stages: int,
    micro_batches: int,
    durations: Durations,
    *,
    png: Path | None = None,
    as_json: bool = False,
) -> None:
    """Prints the table and its figures, or one JSON object; draws `png` where one is named."""
    schedule = make_schedule(name, stages, micro_batches)
    report = report_schedule(schedule, durations)
    if png is not None:
        draw_png(simulate(schedule, durations), png)
    if as_json:
        print(json.dumps(dataclasses.asdict(report) | {"table": table_cells(schedule)}))
        return
    print(draw_text(schedule))
    print()
    print(report_text(report))
    if png is not None:
        print(f"drawn with these durations: {png}")


def report_text(report: ScheduleReport) -> str:
    """A few lines for a person."""
    r, d = report, report.durations
    names = {"F": "forward", "F&B": "overlapped", "B": "backward", "W": "weight"}
    durations = ", ".join(f"{letter} {d[name]:.4g} s" for letter, name in names.items())
    # See `simulate.released_bubble_seconds`.
    note = ", of which the released order saves up to F" if r.parameter_copies == 2 else ""
    return (
        f"{r.schedule}: {r.ranks} ranks, {r.stages} stages, {r.micro_batches} micro-batches,"
        f" {r.ticks} ticks\n"
        f"durations    {durations}\n"
        f"step         {r.step_seconds:.4g} s; {r.scan_seconds:.4g} s with the ranks in step,"
        " tick by tick\n"
        f"bubble       {r.bubble_share:.1%} of all ranks' time; {r.bubble_seconds:.4g} s on the"
        f" rank that has most; published {r.formula_bubble_seconds:.4g} s{note}\n"
        f"activations  {r.peak_activations} micro-batches in a stage at most; published"
        f" {r.formula_activations}\n"
        f"parameters   {r.parameter_copies} stage{'s' * (r.parameter_copies > 1)} a rank\n"
        f"buffers      {r.residual_slots} residuals, {r.weight_slots} queued weight gradients,"
        f" {r.activation_slots} received activations, {r.gradient_slots} gradients"
    )
