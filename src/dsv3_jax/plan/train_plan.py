"""What a training run would take on a cluster: step time, its parts, memory, days and dollars.

A prediction: the run's own pipeline table, each action timed by its layers (layer_times.py), and
the optimizer after it. Imports no JAX.
"""

from dataclasses import dataclass
from typing import Any

from dsv3_jax.config import RunConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.accounting import count_flops
from dsv3_jax.parallel.pipeline.simulate import Timeline
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.compiled_work import (
    CompiledWork,
    closed_flops_per_gpu,
    closed_network_bytes_per_gpu,
    scaled,
)
from dsv3_jax.plan.layer_times import ChunkTimes, Job, Woven, chunk_times
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.optimizer_times import gather_seconds, optimizer_seconds
from dsv3_jax.plan.pipeline_times import (
    StageSeconds,
    StepParts,
    run_orders,
    run_schedule,
    run_stages,
    split_parts,
)
from dsv3_jax.plan.state_sizes import StateSizes, state_sizes

DAY = 24 * 3600


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """One step of a run on a cluster, and what the whole run takes. All of it is predicted."""

    cluster: str
    gpu: str
    gpus: int
    schedule: str
    ranks: int
    micro_batches: int
    parts: StepParts
    """Of the first rank."""
    mean_parts: StepParts
    """Over the ranks."""
    optimizer_seconds: Number
    exposed_gather_seconds: Number
    """Of weights gathered layer by layer (parallel.zero=3), beyond what computing hides."""
    step_seconds: Number
    pair_seconds: Number | None
    """Of an overlapped pair on a rank in the middle; None where nothing overlaps."""
    pair_exposed_seconds: Number | None
    tokens_per_step: int
    tokens_per_second_per_gpu: Number
    tokens_per_day: Number
    tflops_causal: Number
    """A GPU: the model's FLOPs without MTP, as in "Insights" Table 4."""
    tflops_noncausal: Number
    mfu_causal: Number
    """Of the BF16 peak, whatever the recipe."""
    mfu_noncausal: Number
    target_tokens: Number
    days: Number
    gpu_hours: Number
    dollars: Number | None
    """None for a cluster without a price."""
    memory: StateSizes
    """By closed forms, whatever the rest is counted from."""
    peak_bytes_per_gpu: Number
    memory_bytes_per_gpu: int
    fits: bool
    counted_from: str
    """`closed forms`, or `dsv3 compile`."""


@dataclass(frozen=True, kw_only=True)
class Detail:
    """What pictures are drawn from."""

    timeline: Timeline
    pair: Woven | None
    times: ChunkTimes


def predict_training(
    config: RunConfig,
    cluster: Cluster,
    *,
    tokens: Number | None = None,
    imbalance: Number = 1.0,
    compiled: CompiledWork | None = None,
) -> tuple[TrainPlan, Detail]:
    """The plan of `config` on `cluster`. `tokens` are those of the whole run, by default its steps.

    ValueError where the run has more devices than the cluster. A run that does not fit the memory
    is a result, not an error.
    """
    config.check_is_training()
    parallel = config.parallel
    rule = f"at most the {cluster.num_gpus} of cluster {cluster.name}"
    gpus = parallel.num_devices
    require(gpus <= cluster.num_gpus, "parallel.pipe x data x node x gpu", gpus, rule)
    require(imbalance >= 1, "imbalance", imbalance, "at least 1, rows of the busiest over the mean")
    require(tokens is None or tokens > 0, "tokens", tokens, "a positive number")
    job = Job.of(config, imbalance=imbalance)
    times = chunk_times(cluster, config.precision, job)
    if compiled is not None:
        times = _as_compiled(times, config, job, cluster, compiled)
    stages, orders = run_stages(config), run_orders(config)
    seconds = StageSeconds(times, stages, late_weights=parallel.late_weight_gradients)
    timeline = run_schedule(orders, seconds, message_seconds(cluster, config, job))
    memory = state_sizes(config, orders, stages, times.spread)
    optimizer = optimizer_seconds(cluster, config, stages)
    gathered = gather_seconds(cluster, config, stages)
    exposed = max(0.0, gathered - timeline.total_seconds)
    step = timeline.total_seconds + optimizer + exposed
    pair = None
    if seconds.pairs:
        middle = len(stages) // 2
        pair = seconds.pair(middle, middle - 1)
    peak = memory.total if compiled is None else compiled.peak_bytes_per_gpu + memory.reserved
    plan = TrainPlan(
        cluster=cluster.name,
        gpu=cluster.gpu.name,
        gpus=gpus,
        schedule=parallel.schedule,
        ranks=orders.layout.ranks,
        micro_batches=config.parts,
        parts=split_parts(timeline, 0),
        mean_parts=split_parts(timeline),
        optimizer_seconds=optimizer,
        exposed_gather_seconds=exposed,
        step_seconds=step,
        pair_seconds=None if pair is None else pair.seconds,
        pair_exposed_seconds=None if pair is None else pair.exposed_seconds,
        memory=memory,
        peak_bytes_per_gpu=peak,
        memory_bytes_per_gpu=cluster.gpu.memory_bytes,
        fits=peak <= cluster.gpu.memory_bytes,
        counted_from="closed forms" if compiled is None else "dsv3 compile",
        **_rates(config, cluster, step, tokens),
    )
    return plan, Detail(timeline=timeline, pair=pair, times=times)


def message_seconds(cluster: Cluster, config: RunConfig, job: Job) -> Number:
    """Of one micro-batch's rows between two ranks of the pipeline."""
    apart = config.parallel.token_shards >= cluster.gpus_per_node
    link = cluster.network if apart else cluster.nvlink
    value = 4 if config.precision.recipe == "fp32" else 2
    size = job.tokens * config.model.hidden_size * value
    return link.latency_seconds + size / link.achieved_bytes_per_second


def _rates(
    config: RunConfig, cluster: Cluster, step: Number, tokens: Number | None
) -> dict[str, Any]:
    gpus = config.parallel.num_devices
    a_step = config.train.batch_size * config.data.seq_len
    target = float(config.train.steps * a_step) if tokens is None else float(tokens)
    per_second = a_step / step
    seq, peak = config.data.seq_len, cluster.gpu.bf16_flops_per_second
    found = {}
    for name, causal in (("causal", True), ("noncausal", False)):
        flops = count_flops(config.model, seq, causal=causal).training_without_mtp
        found[f"tflops_{name}"] = flops * per_second / gpus / 1e12
        found[f"mfu_{name}"] = flops * per_second / gpus / peak
    hours = target / per_second / 3600 * gpus
    price = cluster.gpu_dollars_per_hour
    return found | {
        "tokens_per_step": a_step,
        "tokens_per_second_per_gpu": per_second / gpus,
        "tokens_per_day": per_second * DAY,
        "target_tokens": target,
        "days": target / per_second / DAY,
        "gpu_hours": hours,
        "dollars": None if price is None else hours * price,
    }


def _as_compiled(
    times: ChunkTimes, config: RunConfig, job: Job, cluster: Cluster, compiled: CompiledWork
) -> ChunkTimes:
    devices = config.parallel.num_devices
    require(compiled.devices == devices, "--compiled: devices", compiled.devices, str(devices))
    require(compiled.gpu == cluster.gpu.name, "--compiled: gpu", compiled.gpu, cluster.gpu.name)
    compute = compiled.flops_per_gpu / closed_flops_per_gpu(config, job)
    sent = closed_network_bytes_per_gpu(config, job, times.spread)
    return scaled(times, compute, compiled.network_bytes_per_gpu / sent if sent else 1.0)
