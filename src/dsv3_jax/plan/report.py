"""What compiling a step ahead says of it, as text to read and as one JSON object. Imports no JAX.

Bytes and FLOPs are the compiler's, of one GPU; times are predicted by roofline.py.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.hlo import parse_module
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.program import (
    BRANCH_RULES,
    Block,
    TripRule,
    list_unknowns,
    read_program,
    run_once,
)
from dsv3_jax.plan.roofline import (
    BranchRule,
    Prediction,
    Timing,
    Transfer,
    mean_branch,
    predict,
    ranked_transfers,
    slowest_branch,
)

RESERVED_BYTES = 2 * 2**30
"""Of the card, not for the program: CUDA's context (half a GiB) and NCCL's buffers."""
TABLE_ROWS = 12
"""Transfers in the text; JSON has all."""


@dataclass(frozen=True, kw_only=True)
class CollectiveSum:
    """All transfers of one kind in a step, from one GPU's view."""

    kind: str
    count: Number
    nvlink_bytes: Number
    network_bytes: Number
    predicted_seconds: float
    predicted_exposed_seconds: float


@dataclass(frozen=True, kw_only=True)
class TransferRow:
    """One transfer of the schedule and what covers it, each time it runs."""

    name: str
    kind: str
    op_name: str
    block: str
    times: Number
    asynchronous: bool
    group_size: int
    payload_bytes: int
    nvlink_bytes: Number
    network_bytes: Number
    predicted_seconds: float
    predicted_exposed_seconds: float
    covering_flops: Number
    covering_seconds: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """A compiled step. The fields are the JSON object's keys."""

    gpu: str
    devices: int
    peak_bytes_per_gpu: int
    memory_bytes_per_gpu: int
    usable_bytes_per_gpu: int
    fits: bool
    bytes_by_kind: dict[str, int]
    """Adds up to the peak: stored weights and optimizer, what is held over the step of gathered
    weights and of gradients, activations and buffers, other arguments, results, code."""
    compiled_flops_per_gpu: Number
    fp8_flops_per_gpu: Number
    """Of them."""
    model_flops_per_gpu: Number | None
    hbm_bytes_per_gpu: Number
    nvlink_bytes_per_gpu: Number
    network_bytes_per_gpu: Number
    collectives: list[CollectiveSum]
    transfers: list[TransferRow]
    hidden_fraction: float
    pair_hidden_fraction: float | None
    """The same of the all-to-alls in a pipeline's overlapped pairs; None without a pipeline."""
    pair_transfers: int | None
    """All-to-alls in the programs of overlapped pairs."""
    pair_transfers_without_compute: int | None
    """Of these, those with no kernel between their start and their done."""
    predicted_step_seconds: float
    predicted_exposed_seconds: float
    compile_seconds: float
    compile_host_bytes: int
    assumptions: list[str]
    """What the compiled program does not say, and what was taken for it."""

    @property
    def flops_over_model(self) -> float | None:
        if not self.model_flops_per_gpu:
            return None
        return self.compiled_flops_per_gpu / self.model_flops_per_gpu


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes of one GPU, by `compile_ahead.CompiledStep` (which this file cannot import: JAX)."""

    argument_bytes: int
    new_output_bytes: int
    temp_bytes: int
    code_bytes: int
    arguments: dict[str, int]
    """By path; `kinds_of_arguments` sorts them."""
    kinds: dict[str, int] | None = None
    """Of the arguments, where they are not a training step's: weights, latent cache."""


WEIGHTS, OPTIMIZER, CACHE, OTHER = "weights", "optimizer", "latent cache", "other arguments"


def kinds_of_arguments(arguments: dict[str, int]) -> dict[str, int]:
    """Bytes of weights, optimizer state and the rest, by the names in a TrainState's paths."""
    sums = {WEIGHTS: 0, OPTIMIZER: 0, OTHER: 0}
    for path, nbytes in arguments.items():
        kind = OPTIMIZER if ".moments" in path else WEIGHTS if ".params" in path else OTHER
        sums[kind] += nbytes
    return sums


@dataclass(frozen=True, kw_only=True)
class HeldBytes:
    """What a device holds all through a step beside its stored state, if the caller knows it."""

    weights: int = 0
    """Gathered, in the dtype that is computed in."""
    gradients: int = 0
    kept: int = 0
    """Buffers in which micro-batches under way wait for their backward."""


def bytes_by_kind(memory: MemoryUse, held: HeldBytes) -> dict[str, int]:
    """The peak in parts, in the order to draw them.

    `held` is told apart from the other temporaries. What XLA counts of the arguments beyond their
    sizes (padding) is with the other arguments.
    """
    sums = memory.kinds or kinds_of_arguments(memory.arguments)
    known = sum(size for kind, size in sums.items() if kind != OTHER)
    weights = min(held.weights, memory.temp_bytes)
    gradients = min(held.gradients, memory.temp_bytes - weights)
    kept = min(held.kept, memory.temp_bytes - weights - gradients)
    return {
        WEIGHTS: sums[WEIGHTS],
        OPTIMIZER: sums.get(OPTIMIZER, 0),
        CACHE: sums.get(CACHE, 0),
        "gathered weights": weights,
        "gradients": gradients,
        "kept for backward": kept,
        "activations and buffers": memory.temp_bytes - weights - gradients - kept,
        OTHER: memory.argument_bytes - known,
        "results": memory.new_output_bytes,
        "code": memory.code_bytes,
    }


@dataclass(frozen=True)
class Analysis:
    """A report and what it is drawn from."""

    report: StepReport
    program: Block
    prediction: Prediction


PairRule = Callable[[Block], frozenset[str]]
"""The names of the blocks of a program in which one micro-batch's forward and another's backward
stand together."""


def analyse(
    hlo_text: str,
    memory: MemoryUse,
    gpu: Gpu,
    *,
    compile_seconds: float,
    compile_host_bytes: int,
    model_flops_per_gpu: Number | None = None,
    held: HeldBytes | None = None,
    branches: BranchRule | str = "max",
    timed_branches: BranchRule | None = None,
    trips: TripRule = run_once,
    pairs: PairRule | None = None,
) -> Analysis:
    """Everything about one compiled program.

    `branches`: "max" takes the slowest branch of every conditional, "mean" all equally often, for
    time, FLOPs and bytes alike, a rule its own shares; `timed_branches` is another rule for time
    alone. `trips` guesses how often loops run that end by their data. `pairs` tells the blocks of a
    pipeline's overlapped pairs.
    """
    module = parse_module(hlo_text)
    program = read_program(module, gpu.gpus_per_node, trips)
    rule = _RULES.get(branches) if isinstance(branches, str) else branches
    if rule is None:
        raise ValueError(f"branches is {branches!r}, expected one of {', '.join(BRANCH_RULES)}")
    prediction = predict(program, gpu, rule)
    timed = prediction if timed_branches is None else predict(program, gpu, timed_branches)
    parts = bytes_by_kind(memory, held or HeldBytes())
    peak = sum(parts.values())
    step = prediction.step
    in_pairs = None if pairs is None else _pair_transfers(step, pairs(program))
    report = StepReport(
        gpu=gpu.name,
        devices=module.partitions,
        peak_bytes_per_gpu=peak,
        memory_bytes_per_gpu=gpu.memory_bytes,
        usable_bytes_per_gpu=gpu.memory_bytes - RESERVED_BYTES,
        fits=peak <= gpu.memory_bytes - RESERVED_BYTES,
        bytes_by_kind=parts,
        compiled_flops_per_gpu=step.cost.flops,
        fp8_flops_per_gpu=step.cost.fp8_flops,
        model_flops_per_gpu=model_flops_per_gpu,
        hbm_bytes_per_gpu=step.cost.hbm_bytes,
        nvlink_bytes_per_gpu=step.traffic.nvlink_bytes,
        network_bytes_per_gpu=step.traffic.network_bytes,
        collectives=_sums(step),
        transfers=_rows(step),
        hidden_fraction=step.hidden_fraction,
        pair_hidden_fraction=None if in_pairs is None else _hidden_share(in_pairs),
        pair_transfers=None if in_pairs is None else len(in_pairs),
        pair_transfers_without_compute=None
        if in_pairs is None
        else sum(t.covering_seconds == 0 for t in in_pairs),
        predicted_step_seconds=timed.step.seconds,
        predicted_exposed_seconds=timed.step.exposed_seconds,
        compile_seconds=compile_seconds,
        compile_host_bytes=compile_host_bytes,
        assumptions=_assumptions(program, branches),
    )
    return Analysis(report, program, prediction)


def _pair_transfers(step: Timing, blocks: frozenset[str]) -> list[Transfer]:
    """Those that a step runs of the all-to-alls that stand in `blocks`."""
    return [
        t
        for t in step.transfers
        if t.block in blocks and t.times and t.collective.kind == "all-to-all"
    ]


def _hidden_share(transfers: list[Transfer]) -> float:
    """1 if nothing is sent."""
    total = sum(t.seconds * t.times for t in transfers)
    exposed = sum(t.exposed_seconds * t.times for t in transfers)
    return max(0.0, 1 - exposed / total) if total else 1.0


_RULES: dict[str, BranchRule] = {"max": slowest_branch, "mean": mean_branch}


def as_json(report: StepReport) -> dict[str, Any]:
    """The fields, and `flops_over_model`."""
    return dataclasses.asdict(report) | {"flops_over_model": report.flops_over_model}


def as_text(report: StepReport) -> str:
    """A page to read; every time in it is predicted."""
    r = report
    share = r.peak_bytes_per_gpu / r.memory_bytes_per_gpu
    lines = [
        f"{r.devices:,} x {r.gpu}: compiled in {r.compile_seconds:.1f} s,"
        f" {bytes_text(r.compile_host_bytes)} of host memory",
        "",
        f"memory per GPU   {bytes_text(r.peak_bytes_per_gpu)} of"
        f" {bytes_text(r.memory_bytes_per_gpu)} ({share:.0%}): {_verdict(r)}",
    ]
    lines += [
        f"  {name:24}{bytes_text(size):>10}" for name, size in r.bytes_by_kind.items() if size
    ]
    lines += ["", f"FLOPs per GPU    {r.compiled_flops_per_gpu:.4g} compiled{_over_model(r)}"]
    lines += [f"HBM per GPU      {bytes_text(r.hbm_bytes_per_gpu)} moved", ""]
    lines += [
        f"step             {seconds_text(r.predicted_step_seconds)} predicted, of which"
        f" {seconds_text(r.predicted_exposed_seconds)} wait for transfers",
        f"transfers        {r.hidden_fraction:.1%} of their predicted time is under computation",
        *_pair_lines(r),
        "",
        f"  {'collective':22}{'a step':>8}{'NVLink':>11}{'network':>11}{'time':>11}{'exposed':>11}",
    ]
    lines += [
        f"  {c.kind:22}{c.count:>8,.4g}{bytes_text(c.nvlink_bytes):>11}"
        f"{bytes_text(c.network_bytes):>11}{seconds_text(c.predicted_seconds):>11}{seconds_text(c.predicted_exposed_seconds):>11}"
        for c in r.collectives
    ]
    lines += ["", *_transfer_lines(r)]
    lines += ["", *(f"assumed: {text}" for text in r.assumptions)]
    return "\n".join(lines).rstrip() + "\n"


def what_would_help(report: StepReport) -> str:
    """Of a step that does not fit: by how much, and the settings that make it smaller."""
    over = report.peak_bytes_per_gpu - report.usable_bytes_per_gpu
    kinds = report.bytes_by_kind
    state = sum(kinds[k] for k in (WEIGHTS, OPTIMIZER, "gathered weights", "gradients"))
    advice = ["more stages (parallel.pipe)"]
    if kinds.get(CACHE):
        advice = ["fewer or shorter requests (serve.slots, serve.max_seq_len, serve.pages)"]
        advice += ["serve.cache_dtype=fp8", "experts on more GPUs"]
    elif state > report.peak_bytes_per_gpu / 2:
        has_pipeline = report.pair_hidden_fraction is not None  # which excludes zero=3
        fields = "parallel.data" if has_pipeline else "parallel.zero=3, parallel.data"
        advice += [f"state sharded further ({fields})"]
    else:
        advice += ["a smaller micro-batch (train.batch_size)", "more recompute (train.remat)"]
    return f"does not fit by {bytes_text(over)}; smaller with {', '.join(advice)}"


def _verdict(report: StepReport) -> str:
    if not report.fits:
        return what_would_help(report)
    free = report.usable_bytes_per_gpu - report.peak_bytes_per_gpu
    return f"fits, {bytes_text(free)} free beside {bytes_text(RESERVED_BYTES)} for CUDA and NCCL"


def _over_model(report: StepReport) -> str:
    ratio = report.flops_over_model
    if ratio is None:
        return ""
    text = f", {ratio:.3f} x the model's {report.model_flops_per_gpu:.4g}"
    if not report.fp8_flops_per_gpu:
        return text
    return f"{text}, {report.fp8_flops_per_gpu / report.compiled_flops_per_gpu:.0%} of them in FP8"


def _pair_lines(report: StepReport) -> list[str]:
    if report.pair_hidden_fraction is None:
        return []
    return [
        f"overlapped pairs {report.pair_hidden_fraction:.1%} of their all-to-alls' time;"
        f" {report.pair_transfers_without_compute} of {report.pair_transfers} all-to-alls have no"
        " computation beside them"
    ]


def _transfer_lines(report: StepReport) -> list[str]:
    shown = report.transfers[:TABLE_ROWS]
    if not shown:
        return ["  nothing is sent"]
    lines = [f"  {'transfer':34}{'a step':>8}{'takes':>11}{'covered by':>12}{'exposed':>11}"]
    for row in shown:
        mark = "" if row.asynchronous else " (sync)"
        name = f"{row.name[: 33 - len(mark)]}{mark}"
        lines.append(
            f"  {name:34}{row.times:>8,.4g}{seconds_text(row.predicted_seconds):>11}"
            f"{seconds_text(row.covering_seconds):>12}{seconds_text(row.predicted_exposed_seconds):>11}"
        )
    rest = len(report.transfers) - len(shown)
    return [*lines, f"  ... and {rest} more (--json has all)"] if rest else lines


def _sums(step: Timing) -> list[CollectiveSum]:
    kinds: dict[str, list[Transfer]] = {}
    for transfer in step.transfers:
        kinds.setdefault(transfer.collective.kind, []).append(transfer)
    sums = [
        CollectiveSum(
            kind=kind,
            count=sum(t.times for t in found),
            nvlink_bytes=sum(t.collective.traffic.nvlink_bytes * t.times for t in found),
            network_bytes=sum(t.collective.traffic.network_bytes * t.times for t in found),
            predicted_seconds=sum(t.seconds * t.times for t in found),
            predicted_exposed_seconds=sum(t.exposed_seconds * t.times for t in found),
        )
        for kind, found in kinds.items()
    ]
    return sorted(sums, key=lambda c: c.predicted_seconds, reverse=True)


def _rows(step: Timing) -> list[TransferRow]:
    return [
        TransferRow(
            name=transfer.collective.name,
            kind=transfer.collective.kind,
            op_name=transfer.collective.op_name,
            block=transfer.block,
            times=transfer.times,
            asynchronous=transfer.collective.asynchronous,
            group_size=transfer.collective.group_size,
            payload_bytes=transfer.collective.payload_bytes,
            nvlink_bytes=transfer.collective.traffic.nvlink_bytes,
            network_bytes=transfer.collective.traffic.network_bytes,
            predicted_seconds=transfer.seconds,
            predicted_exposed_seconds=transfer.exposed_seconds,
            covering_flops=transfer.covering_flops,
            covering_seconds=transfer.covering_seconds,
        )
        for transfer in ranked_transfers(step)
    ]


def _assumptions(program: Block, branches: BranchRule | str) -> list[str]:
    loops, calls = list_unknowns(program)
    texts = []
    if loops:
        more = f" and {len(loops) - 3} more" if len(loops) > 3 else ""
        texts.append(f"loops that end by their data run {', '.join(loops[:3])}{more}")
    if calls:
        texts.append(f"no FLOPs are counted of {', '.join(calls)}")
    if branches == "max":
        texts.append("of a conditional the slowest branch runs each time")
    elif branches == "mean":
        texts.append("of a conditional every branch runs equally often")
    return texts


def bytes_text(count: Number) -> str:
    """`12.30 GB`: decimal units, as of memory on data sheets."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def seconds_text(seconds: float) -> str:
    """`12.30 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds * 1e6:.1f} µs"
