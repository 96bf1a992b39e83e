"""A training plan as text and as one JSON object. Imports no JAX."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsv3_jax.plan.links import Number
from dsv3_jax.plan.report import bytes_text, seconds_text
from dsv3_jax.plan.table import shown
from dsv3_jax.plan.train_plan import TrainPlan

STEP_ERROR = "-2.9 % on DeepSeek's 2,048 H800, -6.2 % on Megatron's 1,024 H100 in tokens/s"
"""Of the two runs with published figures: `dsv3 plan table checks` (tests hold it to that)."""


COLOURS = ("#1f6f8b", "#e09f3e", "#84a98c", "#9d6b9e", "#d1495b", "#7d8597", "#8ecae6", "#bc6c25")
PART_COLOURS = {
    "forward": "#e09f3e",
    "overlapped": "#1f6f8b",
    "backward": "#84a98c",
    "weight": "#8ecae6",
    "bubble": "#ced4da",
    "optimizer": "#9d6b9e",
    "gathers": "#bc6c25",
    "weights": "#1f6f8b",
    "gradients": "#c08497",
    "kept": "#bc6c25",
    "buffers": "#e09f3e",
    "reserved": "#adb5bd",
    "free": "#e9ecef",
}
"""Of the parts of a step and of a GPU's memory; COLOURS are for what has none of its own."""


def as_json(plan: TrainPlan) -> dict[str, Any]:
    """The fields, and what was assumed."""
    found = dataclasses.asdict(plan)
    found["memory"]["total"] = plan.memory.total
    return found | {"assumptions": assumptions(plan)}


def step_seconds(plan: TrainPlan) -> dict[str, Number]:
    """The step of the first rank by what it does; adds up to the step."""
    parts = plan.parts
    named = {
        "forward": parts.forward,
        "overlapped": parts.overlapped,
        "backward": parts.backward,
        "weight": parts.weight,
        "bubble": parts.bubble,
        "optimizer": plan.optimizer_seconds,
        "gathers": plan.exposed_gather_seconds,
    }
    return {name: seconds for name, seconds in named.items() if seconds > 0}


def as_text(plan: TrainPlan) -> str:
    """A page to read; all of it is predicted."""
    remarks = [f"assumed: {text}" for text in assumptions(plan)]
    return "\n".join([figures_text(plan), *remarks])


def figures_text(plan: TrainPlan) -> str:
    """The same without what was assumed."""
    return "\n".join(_lines(plan)) + "\n"


def _lines(plan: TrainPlan) -> Iterator[str]:
    p = plan
    parts = ", ".join(f"{name} {seconds_text(s)}" for name, s in step_seconds(p).items())
    pipeline = f"{p.schedule} over {p.ranks} ranks, {p.micro_batches} micro-batches"
    yield f"{p.gpus:,} GPUs of {p.cluster}, {pipeline}"
    yield ""
    yield f"step        {seconds_text(p.step_seconds)}, of the first rank: {parts}"
    mean = p.mean_parts
    yield (
        f"            over all ranks: bubble {seconds_text(mean.bubble)},"
        f" {mean.bubble / p.step_seconds:.1%} of the step"
    )
    if p.pair_seconds is not None and p.pair_exposed_seconds is not None:
        hidden = 1 - p.pair_exposed_seconds / p.pair_seconds
        yield f"pair        {seconds_text(p.pair_seconds)}, in {hidden:.1%} of which a GPU computes"
    yield (
        f"speed       {p.tokens_per_second_per_gpu:,.0f} tokens/s a GPU,"
        f" {p.tokens_per_day / 1e9:,.1f}B tokens a day"
    )
    yield (
        f"MFU         {p.mfu_causal:.1%} causal ({p.tflops_causal:.0f} TFLOP/s a GPU),"
        f" {p.mfu_noncausal:.1%} not causal ({p.tflops_noncausal:.0f}), of the BF16 peak"
    )
    money = "" if p.dollars is None else f", ${shown(p.dollars)}"
    yield (
        f"run         {shown(p.target_tokens / 1e9)}B tokens: {shown(p.days)} days,"
        f" {shown(p.gpu_hours)} GPU hours{money}"
    )
    sizes = ", ".join(f"{k} {bytes_text(v)}" for k, v in vars(p.memory).items() if v)
    verdict = "fits" if p.fits else "does not fit"
    yield (
        f"memory      {bytes_text(p.peak_bytes_per_gpu)} of {bytes_text(p.memory_bytes_per_gpu)}:"
        f" {verdict} ({sizes})"
    )


def assumptions(plan: TrainPlan) -> list[str]:
    """What the figures rest on, and how far they were from runs that were measured."""
    counted = (
        "FLOPs and experts' rows by closed forms; so is memory, 7 to 9 % below `dsv3 compile`'s"
        if plan.counted_from == "closed forms"
        else "FLOPs, experts' rows and memory's sum as compiled; memory's parts by closed forms"
    )
    found = [
        f"step time as far off as before: {STEP_ERROR}",
        counted,
        "kernels as fast as DeepSeek's on H800, by the peaks of another GPU; experts loaded evenly"
        " unless --imbalance says otherwise",
        "no failures, no restarts, no data that is late",
    ]
    if plan.gpu not in ("h800", "h100"):
        found.append("nothing was fitted to this GPU: its peaks stand for its kernels")
    return found


def part_colours(parts: Mapping[str, Number]) -> list[str]:
    """Of each part: its own colour, or the next of the free ones."""
    rest = iter(COLOURS * (1 + len(parts) // len(COLOURS)))
    return [PART_COLOURS[name] if name in PART_COLOURS else next(rest) for name in parts]
