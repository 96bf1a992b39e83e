"""Seconds of one operation on one GPU of a cluster: products, attention, memory, transfers. No JAX.

What was measured is of an H800 (calibration.py). Another GPU is as much faster as its peaks are
higher; nothing was measured on one.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.plan.calibration import (
    H800,
    PROFILE_NODES,
    TILE,
    gemm_fit,
    published,
    rounds,
    training_fit,
)
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.roofline import MATRIX_EFFICIENCY, MEMORY_EFFICIENCY

WIRE_BYTES = {"bf16": 2.0, "fp8": 1 + 4 / TILE, "logfmt10": 1.28125, "logfmt8": 1 + 4 / TILE}
"""Of one value on its way; scales, or a tile's two extremes, included."""
CODEC_FACTOR = 1.75
"""By which LogFMT's encoding prolongs a transfer that multiprocessors do: by 50 to 100 %
("Insights" §3.2)."""
SMALLEST_TILE = 32
"""Of n: what a product of few rows is cut into, so that all multiprocessors have some."""


@runtime_checkable
class Operations(Protocol):
    """What a layer is made of; each says what it costs, in seconds or (compiled_work.py) FLOPs."""

    def gemm(
        self, rows: Number, n: int, k: int, *, groups: int = 1, weight: bool = False
    ) -> Number: ...
    def head_gemm(self, rows: Number, n: int, k: int) -> Number: ...
    def attention(
        self, model: ModelConfig, tokens: Number, seq: int, *, backward: bool
    ) -> Number: ...
    def elementwise(self, part: str, work: Number) -> Number: ...
    def moved(self, num_bytes: Number) -> Number: ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One GPU of `cluster`, `recipe` what it multiplies in, `sms` how many of it compute."""

    cluster: Cluster
    recipe: str
    sms: int
    training: bool = True
    """Whether products are as slow as in the training profile, or as DeepGEMM's alone."""

    @property
    def gpu(self) -> Gpu:
        return self.cluster.gpu

    def gemm(
        self, rows: Number, n: int, k: int, *, groups: int = 1, weight: bool = False
    ) -> Number:
        """Of `groups` products of `rows` x k by k x n; `weight` where it is a weight's gradient."""
        if rows <= 0:
            return 0.0
        fit, slow = gemm_fit(), training_fit()
        per_k = fit.per_k_seconds * H800.fp8_flops_per_second / H800.multiprocessors
        per_k *= self.gpu.multiprocessors
        if self.recipe == "fp8":
            per_k /= self.gpu.fp8_flops_per_second
            factor = slow.weight_gemm_slowdown if weight else slow.gemm_slowdown
            factor = factor if self.training else 1.0
        else:  # the share that a product reaches in a step is in MATRIX_EFFICIENCY
            is_bf16 = self.recipe == "bf16"
            peak = self.gpu.bf16_flops_per_second if is_bf16 else self.gpu.fp32_flops_per_second
            per_k = 2 * TILE**2 * self.gpu.multiprocessors / peak / MATRIX_EFFICIENCY
            factor = 1.0
        seconds = math.inf
        width = TILE
        while width >= SMALLEST_TILE:
            turns = rounds(rows, n * TILE // width, self.sms, groups)
            seconds = min(seconds, turns * (fit.fill_seconds + k * per_k * width / TILE))
            width //= 2
        return max(factor * seconds, self._operands(rows, n, k, groups))

    def _operands(self, rows: Number, n: int, k: int, groups: int) -> Number:
        """Of reading and writing a product's operands once, as fast as small products do."""
        size = {"fp8": 1, "bf16": 2, "fp32": 4}[self.recipe]
        moved = groups * (size * (rows * k + n * k) + 2 * rows * n)
        low, high = published("small_gemm")["bytes_per_second"]
        share = (low + high) / 2 / H800.memory_bytes_per_second
        return moved / (share * self.gpu.memory_bytes_per_second)

    def head_gemm(self, rows: Number, n: int, k: int) -> Number:
        """Of a product that no recipe has in FP8."""
        flops = 2 * rows * n * k
        compute = flops / (self.gpu.bf16_flops_per_second * MATRIX_EFFICIENCY)
        return max(compute * self.gpu.multiprocessors / self.sms, self.moved(2.0 * n * k))

    def attention(self, model: ModelConfig, tokens: Number, seq: int, *, backward: bool) -> Number:
        """Of causal attention, queries, keys and values given; sequences of `seq`."""
        fit, v3 = training_fit(), ModelConfig()
        seconds = fit.attention_backward_seconds if backward else fit.attention_forward_seconds
        work = _scores(model) * tokens * seq / (_scores(v3) * fit.tokens**2)
        per_sm = self.gpu.bf16_flops_per_second / self.gpu.multiprocessors
        per_sm /= H800.bf16_flops_per_second / H800.multiprocessors
        return seconds * work * fit.compute_sms / self.sms / per_sm

    def elementwise(self, part: str, work: Number) -> Number:
        """Of a part's norms, casts and permutations; `work` is that of the profile's layer."""
        fit = training_fit()
        seconds = fit.other_seconds.get(part, 0.0)
        if self.recipe == "fp8":
            seconds += fit.cast_seconds.get(part, 0.0)
        return seconds * work * H800.memory_bytes_per_second / self.gpu.memory_bytes_per_second

    def moved(self, num_bytes: Number) -> Number:
        """Of a kernel that streams so many bytes."""
        return num_bytes / (MEMORY_EFFICIENCY * self.gpu.memory_bytes_per_second)


def _scores(model: ModelConfig) -> Number:
    return model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)


@dataclass(frozen=True, kw_only=True)
class Fanout:
    """Where the rows of one token go, on average; the routing is even over the experts."""

    nodes: Number
    """Nodes that hold one of its experts, the own one included."""
    gpus: Number
    remote_nodes: Number
    remote_gpus: Number
    """Of these nodes' GPUs, without the one at which the row arrives."""


def fanout(model: ModelConfig, expert_gpus: int, gpus_per_node: int) -> Fanout:
    """Of a token whose experts are spread evenly over `expert_gpus`, in order.

    Groups are chosen evenly, then experts evenly among theirs. Source: counting; for the 671B model
    on 8 nodes 3.63 nodes.
    """
    if not model.has_experts:
        return Fanout(nodes=1, gpus=1, remote_nodes=0, remote_gpus=0)
    nodes = max(1, expert_gpus // gpus_per_node)
    on_nodes = nodes * _hit(model, nodes)
    on_gpus = expert_gpus * _hit(model, expert_gpus)
    return Fanout(
        nodes=on_nodes,
        gpus=on_gpus,
        remote_nodes=on_nodes * (nodes - 1) / nodes,
        remote_gpus=on_gpus * (1 - 1 / min(gpus_per_node, expert_gpus)),
    )


def _hit(model: ModelConfig, parts: int) -> Number:
    """How likely one of `parts` equal parts of the experts holds one that a token chooses."""
    m = model
    size = m.n_routed_experts // m.n_group
    seen = m.topk_group * size
    within = m.n_routed_experts / parts  # experts of a part
    if within <= size:  # a part of one group, which is among the chosen ones or not
        return m.topk_group / m.n_group * (1 - _none(seen, within, m.num_experts_per_tok))
    held = round(within / size)  # whole groups
    total = math.comb(m.n_group, m.topk_group)
    missed = 0.0
    for chosen in range(min(held, m.topk_group) + 1):
        ways = math.comb(held, chosen) * math.comb(m.n_group - held, m.topk_group - chosen)
        missed += ways / total * _none(seen, chosen * size, m.num_experts_per_tok)
    return 1 - missed


def _none(seen: int, among: Number, chosen: int) -> Number:
    """How likely none of `chosen` of `seen` experts is `among` so many."""
    return math.prod(max(0.0, (seen - among - i) / (seen - i)) for i in range(chosen))


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Seconds of rows on their way to the experts and back, for one layer and micro-batch."""

    dispatch: Number
    combine: Number
    gradient_dispatch: Number
    """Backward of combine."""
    gradient_combine: Number
    """Backward of dispatch."""


def exchange(
    cluster: Cluster,
    model: ModelConfig,
    precision: PrecisionConfig,
    tokens: Number,
    spread: Fanout,
    *,
    beside: bool,
) -> Exchange:
    """Of `tokens` of a GPU, two hops; `beside` where kernels compute at the same time.

    Alone: DeepEP's bandwidths over network and NVLink, whichever hop takes longer. Beside
    computation: what the kernels of the training profile reached, and their waiting for each other.
    """
    if spread.gpus <= 1:
        return Exchange(dispatch=0.0, combine=0.0, gradient_dispatch=0.0, gradient_combine=0.0)
    fit = training_fit()
    row = model.hidden_size * tokens
    sent = {
        "dispatch": row * WIRE_BYTES[precision.dispatch_format],
        "combine": row * WIRE_BYTES[precision.combine],
        "gradient_combine": row * WIRE_BYTES[precision.combine],
    }
    sent["gradient_dispatch"] = sent["dispatch"]
    network = cluster.network.achieved_bytes_per_second / H800.network_achieved_bytes_per_second
    nvlink = cluster.nvlink.achieved_bytes_per_second / H800.nvlink_achieved_bytes_per_second
    latency = cluster.nvlink.latency_seconds
    if spread.remote_nodes:
        latency += cluster.network.latency_seconds
    parts = dict(zip(sent, ("dispatch(F)", "combine(F)", "dispatch(B)", "combine(B)"), strict=True))
    seconds = {}
    for name, size in sent.items():
        kind = "combine" if name.endswith("combine") else "dispatch"
        hops = [size * spread.remote_gpus / (nvlink * _in_node(kind))]
        if spread.remote_nodes:
            speed = _beside(kind) if beside else _alone(kind)
            hops.append(size * spread.remote_nodes / (network * speed))
        seconds[name] = max(hops) + latency
        if kind == "combine" and precision.combine.startswith("logfmt"):
            seconds[name] *= 1.0 if cluster.in_network == "codec" else CODEC_FACTOR
        if spread.remote_nodes and beside:
            seconds[name] += fit.notify_seconds[parts[name]] * tokens / fit.tokens
    return Exchange(**seconds)


def _alone(kind: str) -> Number:
    """Bytes/s that leave a GPU for other nodes, of DeepEP over four and eight nodes."""
    given = published("dispatch")
    speeds = dict(zip(given["expert_gpus"], given[f"{kind}_bytes_per_second"], strict=True))
    # Published is what goes to all nodes; of n nodes one is the own one.
    return sum(speeds[gpus] * (1 - 8 / gpus) for gpus in (32, 64)) / 2


def _in_node(kind: str) -> Number:
    return published("dispatch")[f"in_node_{kind}_bytes_per_second"]


def _beside(kind: str) -> Number:
    """The same in the training profile, whose balanced rows go to 4 of 8 nodes."""
    fit, model = training_fit(), ModelConfig()
    seconds = fit.combine_seconds if kind == "combine" else fit.dispatch_seconds
    value = WIRE_BYTES["bf16" if kind == "combine" else "fp8"]
    row = model.hidden_size * value
    return fit.tokens * row * model.topk_group * (1 - 1 / PROFILE_NODES) / seconds
