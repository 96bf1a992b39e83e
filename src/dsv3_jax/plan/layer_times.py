"""Seconds of a layer's parts and of a chunk of layers: forward, backward, overlapped. No JAX.

A layer of a chunk does, on the multiprocessors and beside them on the links:

    forward     attention, [dispatch], mlp, [combine]
    backward    [gradient_dispatch], mlp_dx, [gradient_combine], mlp_dw, attention_dx, attention_dw

An overlapped pair weaves both, in the order of DeepSeek's training profile:

    compute     attention   mlp_dx   mlp_dw   mlp   attention_dx   attention_dw
    links       gradient_dispatch    dispatch    gradient_combine   combine
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3_jax.config import ModelConfig, PrecisionConfig, RunConfig
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind
from dsv3_jax.plan.calibration import PROFILE_EXPERT_ROWS, PROFILE_EXPERTS, training_fit
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import Exchange, Fanout, Machine, Operations, exchange, fanout

NO_EXCHANGE = Exchange(dispatch=0.0, combine=0.0, gradient_dispatch=0.0, gradient_combine=0.0)


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Seconds of one unit of a stage for one micro-batch; `dx` is backward for inputs, `dw` for
    weights."""

    attention: Number = 0.0
    mlp: Number = 0.0
    mlp_dx: Number = 0.0
    mlp_dw: Number = 0.0
    attention_dx: Number = 0.0
    attention_dw: Number = 0.0
    sends: Exchange = NO_EXCHANGE

    def compute(self) -> dict[str, Number]:
        """The parts by name, without the transfers."""
        names = ("attention", "mlp", "mlp_dx", "mlp_dw", "attention_dx", "attention_dw")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What decides a layer's times beside the machine."""

    model: ModelConfig
    seq: int
    tokens: Number
    """Of a micro-batch on one GPU."""
    expert_gpus: int
    tensor: int = 1
    """GPUs that share a layer's heads and its dense and shared MLPs (Megatron's, not ours)."""
    imbalance: Number = 1.0
    """Rows of the busiest GPU's experts over the mean."""
    remat: str = "selective"
    kept: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: RunConfig, *, imbalance: Number = 1.0) -> "Job":
        """A run's."""
        parallel = config.parallel
        sequences = config.train.batch_size / config.parts / parallel.token_shards
        return cls(
            model=config.model,
            seq=config.data.seq_len,
            tokens=sequences * config.data.seq_len,
            expert_gpus=parallel.node * parallel.gpu,
            imbalance=imbalance,
            remat=config.train.remat,
            kept=config.train.kept,
        )


def layer_times(
    machine: Operations, job: Job, kind: UnitKind, sends: Exchange = NO_EXCHANGE
) -> LayerTimes:
    """Of one dense layer, MoE layer, MTP module, or the final norm with head and loss."""
    if kind == UnitKind.EMPTY:
        return LayerTimes()
    if kind == UnitKind.NORM:
        return _head(machine, job)
    attention = _attention(machine, job)
    if kind == UnitKind.DENSE:
        return replace(attention, **_dense(machine, job))
    times = replace(attention, **_experts(machine, job), sends=sends)
    return _with_mtp(times, machine, job) if kind >= UnitKind.MTP else times


def _attention(machine: Operations, job: Job) -> LayerTimes:
    m, rows = job.model, job.tokens
    own_rows = rows / job.tensor  # what is not split by heads is split by rows
    heads = m.num_attention_heads // job.tensor
    queries, values = heads * m.qk_head_dim, heads * m.v_head_dim
    expanded = heads * (m.qk_nope_head_dim + m.v_head_dim)
    latent = m.kv_lora_rank + m.qk_rope_head_dim
    down = [(own_rows, latent, m.hidden_size)]
    up = [(rows, expanded, m.kv_lora_rank)]
    if m.q_lora_rank is None:
        down.append((rows, queries, m.hidden_size))
    else:
        down.append((own_rows, m.q_lora_rank, m.hidden_size))
        up.append((rows, queries, m.q_lora_rank))
    out = [(rows, m.hidden_size, values)]
    every = [*down, *up, *out]

    def forward(shapes: Sequence[tuple[Number, int, int]]) -> Number:
        return sum(machine.gemm(rows, n, k) for rows, n, k in shapes)

    core = machine.attention(m, rows, job.seq, backward=False) / job.tensor
    again = 0.0  # computed again for backward
    if job.remat != "none":
        again += 0.0 if "queries" in job.kept else forward(up)
    if job.remat == "full":
        again += 0.0 if "q_latent" in job.kept else forward(down)
        again += 0.0 if "attention_output" in job.kept else core
        again += 0.0 if "attention_residual" in job.kept else forward(out)
    work = rows / training_fit().tokens * _attention_width(m, heads) / _attention_width(V3, 128)
    backward = sum(machine.gemm(rows, k, n) for rows, n, k in every)
    backward += machine.attention(m, rows, job.seq, backward=True) / job.tensor
    return LayerTimes(
        attention=forward(every) + core + machine.elementwise("attn(F)", work),
        attention_dx=again + backward + machine.elementwise("attn(B)", work),
        attention_dw=sum(machine.gemm(n, k, round(rows), weight=True) for rows, n, k in every),
    )


V3 = ModelConfig()


def _attention_width(model: ModelConfig, heads: int) -> int:
    """Values of a token that attention's elementwise kernels pass over."""
    return model.hidden_size + heads * (2 * model.qk_head_dim + model.v_head_dim)


def _mlp(machine: Operations, rows: Number, hidden: int, width: int, groups: int = 1) -> LayerTimes:
    """The products of a SwiGLU network: gate and up together, then down."""

    def gemm(n: int, k: int) -> Number:
        return machine.gemm(rows, n, k, groups=groups)

    def gradient(n: int, k: int) -> Number:
        return machine.gemm(n, k, round(rows), groups=groups, weight=True)

    return LayerTimes(
        mlp=gemm(2 * width, hidden) + gemm(hidden, width),
        mlp_dx=gemm(width, hidden) + gemm(hidden, 2 * width),
        mlp_dw=gradient(2 * width, hidden) + gradient(hidden, width),
    )


def _dense(machine: Operations, job: Job) -> dict[str, Number]:
    m, width = job.model, job.model.intermediate_size // job.tensor
    found = _mlp(machine, job.tokens, m.hidden_size, width)
    again = 0.0
    if job.remat == "full" and "mlp_gate" not in job.kept:
        again = machine.gemm(job.tokens, 2 * width, m.hidden_size)
    # No rows are moved about: of the elementwise kernels what SwiGLU and its casts take.
    work = job.tokens * width / (PROFILE_EXPERTS * PROFILE_EXPERT_ROWS * V3.moe_intermediate_size)
    return _mlp_parts(machine, [found], again, work)


def _experts(machine: Operations, job: Job) -> dict[str, Number]:
    m = job.model
    local = m.n_routed_experts / job.expert_gpus
    # Of one expert, from all GPUs that share the experts.
    rows = job.tokens / job.tensor * m.num_experts_per_tok / local * job.imbalance
    routed = _mlp(machine, rows, m.hidden_size, m.moe_intermediate_size, max(1, round(local)))
    width = m.n_shared_experts * m.moe_intermediate_size // job.tensor
    found = [routed]
    if width:
        found.append(_mlp(machine, job.tokens, m.hidden_size, width))
    again = 0.0
    if job.remat == "full" and "expert_up" not in job.kept:
        again += machine.gemm(
            rows, 2 * m.moe_intermediate_size, m.hidden_size, groups=max(1, round(local))
        )
    if job.remat == "full" and "mlp_gate" not in job.kept:
        again += machine.gemm(job.tokens, 2 * width, m.hidden_size)
    work = (
        rows
        * local
        * _expert_width(m)
        / (PROFILE_EXPERTS * PROFILE_EXPERT_ROWS * _expert_width(V3))
    )
    return _mlp_parts(machine, found, again, work)


def _expert_width(model: ModelConfig) -> int:
    """Values of a row that the experts' elementwise kernels pass over."""
    return model.hidden_size + 3 * model.moe_intermediate_size


def _mlp_parts(
    machine: Operations, found: list[LayerTimes], again: Number, work: Number
) -> dict[str, Number]:
    return {
        "mlp": sum(part.mlp for part in found) + machine.elementwise("mlp(F)", work),
        "mlp_dx": again + sum(p.mlp_dx for p in found) + machine.elementwise("mlp(B)", work),
        "mlp_dw": sum(part.mlp_dw for part in found) + machine.elementwise("mlp(W)", work),
    }


def _head(machine: Operations, job: Job) -> LayerTimes:
    """The output head in BF16, and softmax and loss in FP32, which pass over the logits four times
    forward and twice backward."""
    m, rows = job.model, job.tokens
    vocab = m.vocab_size // job.tensor
    product = machine.head_gemm(rows, vocab, m.hidden_size)
    logits = 4.0 * rows * vocab
    return LayerTimes(
        mlp=product + machine.moved(4 * logits),
        mlp_dx=product + machine.moved(2 * logits),
        mlp_dw=product,
    )


def _with_mtp(times: LayerTimes, machine: Operations, job: Job) -> LayerTimes:
    """A MoE layer with `eh_proj` before it and the shared head, with its own loss, after it."""
    m, head = job.model, _head(machine, job)
    joined = machine.head_gemm(job.tokens, m.hidden_size, 2 * m.hidden_size)
    return replace(
        times,
        attention=times.attention + joined,
        mlp=times.mlp + head.mlp,
        mlp_dx=times.mlp_dx + head.mlp_dx,
        mlp_dw=times.mlp_dw + head.mlp_dw,
        attention_dx=times.attention_dx + joined,
        attention_dw=times.attention_dw + joined,
    )


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """Every unit's times, alone on the whole GPU and beside transfers."""

    alone: dict[UnitKind, LayerTimes]
    beside: dict[UnitKind, LayerTimes]
    spread: Fanout

    def forward(self, units: Sequence[Unit]) -> Number:
        """One after the other: nothing computes while rows travel."""
        layers = [self.alone[_kind(unit)] for unit in units]
        return sum(_alone_forward(layer) for layer in layers)

    def backward(self, units: Sequence[Unit]) -> tuple[Number, Number]:
        """(for inputs, for weights), one after the other."""
        layers = [self.alone[_kind(unit)] for unit in units]
        return (
            sum(_alone_backward(layer) for layer in layers),
            sum(layer.mlp_dw + layer.attention_dw for layer in layers),
        )

    def overlapped(self, forward: Sequence[Unit], backward: Sequence[Unit]) -> "Woven":
        """A forward chunk and a full backward chunk together."""
        first = [self.beside[_kind(unit)] for unit in forward]
        second = [self.beside[_kind(unit)] for unit in reversed(backward)]
        length = max(len(first), len(second))
        empty = [LayerTimes()] * length
        return weave([*first, *empty][:length], [*second, *empty][:length])


def _kind(unit: Unit) -> UnitKind:
    return UnitKind(min(unit.kind, UnitKind.MTP))


def _alone_forward(layer: LayerTimes) -> Number:
    return layer.attention + layer.sends.dispatch + layer.mlp + layer.sends.combine


def _alone_backward(layer: LayerTimes) -> Number:
    sends = layer.sends
    computed = layer.mlp_dx + layer.attention_dx
    return computed + sends.gradient_dispatch + sends.gradient_combine


@dataclass(frozen=True)
class Interval:
    """One part on one lane, seconds from the pair's start."""

    lane: str
    start: Number
    end: Number
    name: str


@dataclass(frozen=True)
class Woven:
    """An overlapped pair: how long it takes, and what waits."""

    seconds: Number
    compute_seconds: Number
    link_seconds: Number
    intervals: tuple[Interval, ...]

    @property
    def exposed_seconds(self) -> Number:
        """In which nothing computes."""
        return self.seconds - self.compute_seconds


def weave(forward: Sequence[LayerTimes], backward: Sequence[LayerTimes]) -> Woven:
    """The layers of a forward and of a backward chunk, pairwise, on two lanes.

    A part starts when its lane is free and what it reads is there (the module's drawing).
    """
    free = {"compute": 0.0, "links": 0.0}
    busy = {"compute": 0.0, "links": 0.0}
    intervals: list[Interval] = []

    def run(lane: str, name: str, seconds: Number, *after: Number) -> Number:
        if seconds <= 0:
            return max(after, default=0.0)
        start = max(free[lane], *after)
        free[lane] = start + seconds
        busy[lane] += seconds
        intervals.append(Interval(lane, start, free[lane], name))
        return free[lane]

    row = gradient = 0.0  # when the forward's and the backward's input is there
    for f, b in zip(forward, backward, strict=True):
        sent_back = run("links", "gradient dispatch", b.sends.gradient_dispatch, gradient)
        attended = run("compute", "attention", f.attention, row)
        sent = run("links", "dispatch", f.sends.dispatch, attended)
        mlp_dx = run("compute", "mlp dx", b.mlp_dx, sent_back)
        added = run("links", "gradient combine", b.sends.gradient_combine, mlp_dx)
        run("compute", "mlp dw", b.mlp_dw, mlp_dx)
        mlp = run("compute", "mlp", f.mlp, sent)
        row = run("links", "combine", f.sends.combine, mlp)
        gradient = run("compute", "attention dx", b.attention_dx, added)
        run("compute", "attention dw", b.attention_dw, gradient)
    seconds = max(row, gradient, *free.values())
    return Woven(seconds, busy["compute"], busy["links"], tuple(intervals))


@functools.lru_cache(maxsize=256)  # searches ask for the same layers again and again
def chunk_times(
    cluster: Cluster, precision: PrecisionConfig, job: Job, spread: Fanout | None = None
) -> ChunkTimes:
    """Of a job on `cluster`. `spread` is by default that of even routing."""
    if spread is None:
        spread = fanout(job.model, job.expert_gpus, cluster.gpus_per_node)
    rows = job.tokens / job.tensor * job.imbalance
    routed = () if job.model.has_experts else (UnitKind.MOE, UnitKind.MTP)
    kinds = [kind for kind in UnitKind if kind not in routed]
    found = {}
    for beside in (False, True):
        taken = cluster.communication_sms if beside and spread.gpus > 1 else 0
        machine = Machine(
            cluster=cluster, recipe=precision.recipe, sms=cluster.gpu.multiprocessors - taken
        )
        sends = exchange(cluster, job.model, precision, rows, spread, beside=beside)
        found[beside] = {kind: layer_times(machine, job, kind, sends) for kind in kinds}
    return ChunkTimes(alone=found[False], beside=found[True], spread=spread)
