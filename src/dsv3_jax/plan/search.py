"""Layouts of a run on a cluster, best first, and why the others fall out: `dsv3 plan search`.

Every way to split the cluster's GPUs over pipe, data, node and gpu is tried with every schedule and
two ways of keeping tensors. Imports no JAX.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsv3_jax.config import ParallelConfig, RunConfig
from dsv3_jax.config.checks import require
from dsv3_jax.config.parallel import SCHEDULES, TWO_CHUNKS
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.layer_times import Job, chunk_times
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import fanout
from dsv3_jax.plan.pipeline_times import run_orders, run_stages
from dsv3_jax.plan.report import bytes_text
from dsv3_jax.plan.state_sizes import state_sizes
from dsv3_jax.plan.table import Cell, Table
from dsv3_jax.plan.train_plan import TrainPlan, predict_training

MOST_STAGES = 32
MOST_DATA = 32


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout. `estimate_seconds` is a lower bound of its step, by which the best are chosen."""

    config: RunConfig
    keeps: str
    """Which tensors it keeps: `config` those of the run, `selective` as published."""
    peak_bytes: Number
    estimate_seconds: Number
    nodes_per_token: Number
    """To which its rows go, the own one included."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Plans, the fastest first, and how many layouts fell out for which reason."""

    best: tuple[tuple[Candidate, TrainPlan], ...]
    fitting: int
    fell_out: dict[str, int]
    examples: dict[str, str]
    """One layout of each reason, and by how much."""
    own: str
    """The layout of the run that was asked about."""


def search(
    config: RunConfig, cluster: Cluster, *, top: int = 10, tokens: Number | None = None
) -> Found:
    """The `top` fastest layouts that fit. ValueError where none does."""
    require(top >= 1, "--top", top, "at least 1")
    fell_out: Counter[str] = Counter()
    examples: dict[str, str] = {}
    fitting: list[Candidate] = []
    for fields, keeps in _layouts(config, cluster):
        name = _name(**fields)
        try:
            candidate = _candidate(config, cluster, ParallelConfig(**fields), keeps)
        except ValueError as error:
            reason = str(error).split(" is ")[0] + " is not possible"
            fell_out[reason] += 1
            examples.setdefault(reason, f"{name}: {error}")
            continue
        over = candidate.peak_bytes - cluster.gpu.memory_bytes
        if over > 0:
            reason = f"memory, with tensors kept as {keeps}"
            fell_out[reason] += 1
            examples.setdefault(reason, f"{name}: too much by {bytes_text(over)}")
        else:
            fitting.append(candidate)
    rule = "a layout that fits: more GPUs, or fewer tensors kept (train.remat, train.keep)"
    require(bool(fitting), f"cluster {cluster.name}", dict(fell_out), rule)
    fitting.sort(key=lambda candidate: candidate.estimate_seconds)
    plans: dict[str, tuple[Candidate, TrainPlan]] = {}
    for candidate in fitting:
        # What cannot be faster than the slowest of the best so far need not be timed.
        times = sorted(plan.step_seconds for _, plan in plans.values())
        if len(times) >= top and candidate.estimate_seconds > times[top - 1]:
            break
        plan = predict_training(candidate.config, cluster, tokens=tokens)[0]
        name = layout_name(candidate.config.parallel)
        if name not in plans or _rank(plan) < _rank(plans[name][1]):
            plans[name] = candidate, plan
    best = sorted(plans.values(), key=lambda pair: _rank(pair[1]))
    return Found(
        best=tuple(best[:top]),
        fitting=len(fitting),
        fell_out=dict(fell_out.most_common()),
        examples=examples,
        own=layout_name(config.parallel),
    )


def _rank(plan: TrainPlan) -> tuple[Number, Number]:
    """The faster first, of those as fast the smaller."""
    return plan.step_seconds, plan.peak_bytes_per_gpu


def _layouts(config: RunConfig, cluster: Cluster) -> Iterator[tuple[dict[str, Any], str]]:
    """Every split of the cluster's GPUs, whether it can be or not: fields of ParallelConfig."""
    gpus, model = cluster.num_gpus, config.model
    own = ("config",) if config.train.remat == "selective" else ("config", "selective")
    for pipe, data, node, gpu in _splits(gpus, cluster.gpus_per_node):
        if pipe > min(MOST_STAGES, model.num_hidden_layers + 1):
            continue
        if data > MOST_DATA and node * gpu < model.n_routed_experts:
            continue  # more copies of the experts than a run needs
        shards = data * node * gpu
        parts = max(1, config.train.batch_size // shards)
        schedules = SCHEDULES if pipe > 1 else ("none",)
        for schedule, keeps in itertools.product(schedules, own):
            split = {"pipe": pipe, "data": data, "node": node, "gpu": gpu}
            yield split | _schedule(schedule, pipe, parts, config.parallel), keeps


def _schedule(name: str, pipe: int, parts: int, own: ParallelConfig) -> dict[str, Any]:
    late = own.late_weight_gradients
    if name in TWO_CHUNKS:
        parts = max(parts, 2 * pipe) + (parts % 2 if name == "dualpipe" else 0)
    return {
        "schedule": name,
        "micro_batches": parts if pipe > 1 else 1,
        "late_weight_gradients": late,
        "zero": 3 if pipe == 1 else 1,
        "dispatcher": own.dispatcher,
        "capacity_factor": own.capacity_factor,
    }


def _splits(gpus: int, per_node: int) -> Iterator[tuple[int, int, int, int]]:
    """(pipe, data, node, gpu) whose product is `gpus`; experts over whole nodes or within one."""
    for pipe in _divisors(gpus):
        for data in _divisors(gpus // pipe):
            experts = gpus // pipe // data
            gpu = min(experts, per_node)
            if experts % gpu == 0:
                yield pipe, data, experts // gpu, gpu


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _candidate(
    config: RunConfig, cluster: Cluster, parallel: ParallelConfig, keeps: str
) -> Candidate:
    train = config.train
    if keeps == "selective":
        train = dataclasses.replace(train, remat="selective", keep=())
    if parallel.pipe == 1:
        shards = parallel.token_shards
        train = dataclasses.replace(train, accumulation=max(1, train.batch_size // shards), keep=())
    else:
        train = dataclasses.replace(train, accumulation=1)
    own = dataclasses.replace(config, parallel=parallel, train=train)
    stages, orders = run_stages(own), run_orders(own)
    spread = fanout(own.model, parallel.node * parallel.gpu, cluster.gpus_per_node)
    sizes = state_sizes(own, orders, stages, spread)
    return Candidate(
        config=own,
        keeps=keeps,
        peak_bytes=sizes.total,
        estimate_seconds=_lower_bound(own, cluster),
        nodes_per_token=spread.nodes,
    )


def _lower_bound(config: RunConfig, cluster: Cluster) -> Number:
    """What the mean rank does, without bubbles: nothing exposed where the schedule overlaps."""
    job = Job.of(config)
    times = chunk_times(cluster, config.precision, job)
    units = [unit for stage in run_stages(config) for unit in stage]
    inputs, weights = times.backward(units)
    alone = times.forward(units) + inputs + weights
    if config.parallel.schedule in TWO_CHUNKS:
        woven = times.overlapped(units, units)
        alone = min(alone, max(woven.compute_seconds, woven.link_seconds))
    return alone * config.parts / config.parallel.pipe


def layout_name(parallel: ParallelConfig) -> str:
    """`PP16 EP64 DP2 dualpipe`."""
    return _name(**vars(parallel))


def _name(*, pipe: int, data: int, node: int, gpu: int, schedule: str, **_: Any) -> str:
    return f"PP{pipe} EP{node * gpu} DP{data} {schedule}"


def _own_note(found: Found) -> str:
    """Where the run's own layout stands."""
    names = [layout_name(candidate.config.parallel) for candidate, _ in found.best]
    if found.own not in names:
        return f"The run's own layout, {found.own}, is not among these."
    place = names.index(found.own)
    slower = found.best[place][1].step_seconds / found.best[0][1].step_seconds - 1
    return f"The run's own layout, {found.own}, is number {place + 1}, {slower:.1%} slower."


def search_table(found: Found) -> Table:
    """The best layouts, then why the others fell out."""
    rows: list[tuple[Cell, ...]] = []
    for place, (candidate, plan) in enumerate(found.best, start=1):
        parallel = candidate.config.parallel
        rows.append(
            (
                place,
                layout_name(parallel),
                parallel.micro_batches,
                f"ZeRO-{parallel.zero}",
                candidate.keeps,
                candidate.nodes_per_token,
                plan.step_seconds,
                plan.mean_parts.bubble / plan.step_seconds,
                plan.tokens_per_second_per_gpu,
                plan.mfu_causal,
                plan.peak_bytes_per_gpu / 1e9,
            )
        )
    notes = [_own_note(found), f"{found.fitting} layouts fit; the others:"]
    notes += [
        f"  {number:5} {reason}; {found.examples[reason]}"
        for reason, number in found.fell_out.items()
    ]
    columns = (
        "",
        "layout",
        "micro-batches",
        "state",
        "keeps",
        "nodes a token",
        "step (s)",
        "bubble",
    )
    return Table(
        title="Layouts that fit, the fastest first (predicted)",
        columns=(*columns, "tokens/s a GPU", "MFU", "GB a GPU"),
        rows=tuple(rows),
        notes=tuple(notes),
    )
