"""A run's own train step, compiled for a cluster and reported on: what `dsv3 compile` does."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec

from dsv3_jax.config import RunConfig
from dsv3_jax.model.accounting import count_flops
from dsv3_jax.plan.compile_ahead import CompiledStep, compile_ahead, topology_devices
from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.pipeline_rules import PipelineRules
from dsv3_jax.plan.program import TripRule
from dsv3_jax.plan.report import Analysis, HeldBytes, MemoryUse, analyse
from dsv3_jax.plan.report_page import as_html
from dsv3_jax.plan.roofline import BranchRule
from dsv3_jax.quant.scaled_array import is_scaled
from dsv3_jax.train.layout import Layout, compute_params, make_layout
from dsv3_jax.train.pipeline_step import make_pipeline

LowerStep = Callable[[RunConfig, list[Any]], jax.stages.Lowered]


def compile_step(
    config: RunConfig,
    gpu: Gpu,
    hosts: int,
    lower: LowerStep,
    branches: BranchRule | str | None = None,
) -> tuple[CompiledStep, Analysis]:
    """The step that `lower(config, devices)` makes, for `hosts` nodes of eight GPUs.

    `branches` (see `analyse`) is by default the slowest of every conditional, in a pipeline what
    its schedule says. ValueError if the mesh of `config.parallel` does not have as many devices.
    """
    check_hosts(config, gpu, hosts)
    devices = topology_devices(gpu, hosts)
    trips, timed, pairs = balanced_trips(config.parts), None, None
    layout = make_layout(config, devices)
    if config.parallel.pipe > 1:
        rules = PipelineRules(make_pipeline(layout))
        trips, timed, pairs = rules.trips, rules.slowest_rank, rules.pairs
        branches = branches or rules.mean
    compiled = compile_ahead(lower(config, devices))
    analysis = analyse(
        compiled.hlo_text,
        memory_use(compiled),
        gpu,
        compile_seconds=compiled.compile_seconds,
        compile_host_bytes=compiled.host_peak_bytes,
        model_flops_per_gpu=model_flops_per_gpu(config, hosts * gpu.gpus_per_node),
        held=held_bytes(layout),
        branches=branches or "max",
        timed_branches=timed,
        trips=trips,
        pairs=pairs,
    )
    return compiled, analysis


def memory_use(compiled: CompiledStep, kinds: dict[str, int] | None = None) -> MemoryUse:
    """What a compiled program says of its memory; `kinds` of arguments where it is no training
    step's."""
    return MemoryUse(
        argument_bytes=compiled.argument_bytes,
        new_output_bytes=compiled.output_bytes - compiled.alias_bytes,
        temp_bytes=compiled.temp_bytes,
        code_bytes=compiled.code_bytes,
        arguments=compiled.arguments,
        kinds=kinds,
    )


def held_bytes(layout: Layout) -> HeldBytes:
    """Of a step on `layout`: the weights that it computes with, their FP32 gradients, and what a
    pipeline keeps of micro-batches under way."""
    recipe, in_pipeline = layout.config.precision.recipe, layout.config.parallel.pipe > 1

    def gathered(params, bias):
        del bias
        if not in_pipeline:
            return layout.weights(params)
        return make_pipeline(layout).weights.gather(compute_params(params, recipe))

    def on_a_device(function) -> list:
        specs, abstract, whole = layout.state_specs(), layout.abstract, PartitionSpec()
        # The spec of what comes out is `whole`, so that its shape is that of a device.
        on_mesh = layout.on_mesh(function, (specs.params, specs.selection_bias), whole)
        made = jax.eval_shape(on_mesh, abstract.params, abstract.selection_bias)
        return jax.tree.leaves(made, is_leaf=is_scaled)

    used = on_a_device(gathered)
    made, kept = used, []
    if in_pipeline:
        kept = on_a_device(make_pipeline(layout).buffers)
    else:  # where what is stored may be computed with as it is
        stored = on_a_device(lambda params, bias: params)
        made = [new for new, old in zip(used, stored, strict=True) if new != old]
    return HeldBytes(
        weights=_nbytes(made),
        gradients=sum(math.prod(leaf.shape) * 4 for leaf in used),
        kept=_nbytes(kept),
    )


def _nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def check_hosts(config: RunConfig, gpu: Gpu, hosts: int) -> None:
    """Raises ValueError where the cluster's GPUs are not those of the run's mesh."""
    p = config.parallel
    wanted = p.pipe * p.data * p.node * p.gpu
    if hosts < 1 or hosts * gpu.gpus_per_node != wanted:
        raise ValueError(
            f"--hosts is {hosts} of {gpu.gpus_per_node} GPUs, expected pipe x data x node x gpu ="
            f" {p.pipe} x {p.data} x {p.node} x {p.gpu} = {wanted} GPUs: {_hosts_for(wanted, gpu)}"
        )


def _hosts_for(devices: int, gpu: Gpu) -> str:
    whole, rest = divmod(devices, gpu.gpus_per_node)
    return "the mesh does not fill whole hosts" if rest else f"--hosts {whole}"


def model_flops_per_gpu(config: RunConfig, devices: int) -> float:
    """Accounting's FLOPs of one optimizer step, forward and backward, MTP included, a GPU."""
    seq = config.data.seq_len
    tokens = config.train.batch_size * seq
    return count_flops(config.model, seq).training * tokens / devices


def balanced_trips(accumulation: int) -> TripRule:
    """How often the step's loops run that end by its data, if experts are loaded evenly.

    Those in the routed experts are for rows beyond the buffers of the first round: never. Outside
    them the outermost is over the parts of a batch, of which a full batch has `accumulation`.
    """

    def trips(op_name: str) -> int:
        if "routed_experts" in op_name:
            return 0
        return accumulation if op_name.count("/while") <= 1 else 1

    return trips


def dump(
    directory: Path, compiled: CompiledStep, analysis: Analysis, report: dict[str, Any]
) -> list[Path]:
    """Writes `step.hlo.txt`, `report.html` and `report.json` into `directory`; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {
        "step.hlo.txt": compiled.hlo_text,
        "report.html": as_html(analysis),
        "report.json": json.dumps(report) + "\n",
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in files]
