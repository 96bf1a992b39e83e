"""A compiled step's own FLOPs and bytes in the place of the planner's closed forms. Imports no JAX.

`dsv3 compile CONFIG --dump DIR` counts what XLA's program does, recomputation and padding
included. The planner's times of computation and of experts' rows are prolonged by how much more
that is than the closed forms say.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.accounting import attention_core_flops
from dsv3_jax.parallel.pipeline.stages import UnitKind
from dsv3_jax.plan.layer_times import ChunkTimes, Job, LayerTimes, layer_times
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import WIRE_BYTES, Exchange, Fanout

FIELDS = ("gpu", "devices", "compiled_flops_per_gpu", "peak_bytes_per_gpu", "collectives")
ALL_TO_ALL = ("all-to-all", "ragged-all-to-all")


@dataclass(frozen=True, kw_only=True)
class CompiledWork:
    """What the planner takes of a report."""

    gpu: str
    devices: int
    flops_per_gpu: Number
    network_bytes_per_gpu: Number
    """Of all-to-alls."""
    peak_bytes_per_gpu: int


def read_report(path: Path) -> CompiledWork:
    """The report of `dsv3 compile`: what `--json` printed into a file, or what `--dump` wrote.

    ValueError if it is none.
    """
    path = path / "report.json" if path.is_dir() else path
    require(path.is_file(), "--compiled", str(path), "a file of `dsv3 compile --json`")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--compiled {path}: {error}, expected JSON") from None
    missing = [name for name in FIELDS if not isinstance(report, Mapping) or name not in report]
    expected = f"{', '.join(missing)} as well: a report of `dsv3 compile --json`"
    require(not missing, f"--compiled {path}", sorted(report), expected)
    sent: list[dict[str, Any]] = report["collectives"]
    return CompiledWork(
        gpu=report["gpu"],
        devices=report["devices"],
        flops_per_gpu=float(report["compiled_flops_per_gpu"]),
        network_bytes_per_gpu=float(
            sum(item["network_bytes"] for item in sent if item["kind"] in ALL_TO_ALL)
        ),
        peak_bytes_per_gpu=int(report["peak_bytes_per_gpu"]),
    )


class FlopCounter:
    """Takes the place of a `Machine`: each operation's FLOPs instead of its seconds."""

    def gemm(
        self, rows: Number, n: int, k: int, *, groups: int = 1, weight: bool = False
    ) -> Number:
        return 2.0 * groups * rows * n * k

    def head_gemm(self, rows: Number, n: int, k: int) -> Number:
        return 2.0 * rows * n * k

    def attention(self, model: ModelConfig, tokens: Number, seq: int, *, backward: bool) -> Number:
        forward = tokens * attention_core_flops(model, seq, causal=True)
        # Backward computes the scores again: q.k, dv, dp, dq, dk for q.k and p.v.
        qk, v = model.qk_head_dim, model.v_head_dim
        return forward * (3 * qk + 2 * v) / (qk + v) if backward else forward

    def elementwise(self, part: str, work: Number) -> Number:
        return 0.0

    def moved(self, num_bytes: Number) -> Number:
        return 0.0


def closed_flops_per_gpu(config: RunConfig, job: Job) -> Number:
    """Of a step, what is computed again included, mean over the GPUs."""
    m, counter = config.model, FlopCounter()
    layers = {
        UnitKind.DENSE: m.num_dense_layers,
        UnitKind.MOE: m.num_moe_layers,
        UnitKind.NORM: 1,
        UnitKind.MTP: m.num_nextn_predict_layers,
    }
    total = 0.0
    for kind, number in layers.items():
        if number:
            total += number * sum(layer_times(counter, job, kind).compute().values())
    return total * config.parts / config.parallel.pipe


def closed_network_bytes_per_gpu(config: RunConfig, job: Job, spread: Fanout) -> Number:
    """Of rows that go to experts on other nodes and back, forward and backward."""
    m, precision = config.model, config.precision
    value = 2 * WIRE_BYTES[precision.dispatch_format] + 2 * WIRE_BYTES[precision.combine]
    layers = m.num_moe_layers + m.num_nextn_predict_layers
    rows = job.tokens * spread.remote_nodes * config.parts / config.parallel.pipe
    return rows * value * m.hidden_size * layers


def scaled(times: ChunkTimes, compute: Number, links: Number) -> ChunkTimes:
    """`times` with computation and transfers prolonged by these factors."""

    def of(layer: LayerTimes) -> LayerTimes:
        sends = {name: links * seconds for name, seconds in vars(layer.sends).items()}
        computed = {name: compute * seconds for name, seconds in layer.compute().items()}
        return replace(layer, **computed, sends=Exchange(**sends))

    return replace(
        times,
        alone={kind: of(layer) for kind, layer in times.alone.items()},
        beside={kind: of(layer) for kind, layer in times.beside.items()},
    )
