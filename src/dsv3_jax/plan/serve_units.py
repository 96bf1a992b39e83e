"""What a unit of GPUs does that serves a model: memory, a prefill pass, a decode step. No JAX.

A unit shares the routed experts; attention, dense and shared parts are whole on every GPU, and so
is the cache of its own requests. Two micro-batches go through it: one computes while the rows of
the other travel.

Source: DeepSeek, "Day 6: inference system overview" for the units; FlashMLA, DeepGEMM and DeepEP
for the kernels; SGLang on H100 for what they take together (`overhead`).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from dsv3_jax.config import ModelConfig, PrecisionConfig
from dsv3_jax.config.checks import require
from dsv3_jax.model.accounting import (
    attention_parameters,
    dense_mlp_parameters,
    expert_parameters,
    router_parameters,
)
from dsv3_jax.parallel.pipeline.stages import UnitKind
from dsv3_jax.plan.calibration import H800, published
from dsv3_jax.plan.cluster import Cluster, find_cluster
from dsv3_jax.plan.layer_times import Job, layer_times
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import WIRE_BYTES, Machine, exchange, fanout
from dsv3_jax.plan.model_arithmetic import cache_bytes_per_layer, cache_bytes_per_token
from dsv3_jax.plan.model_shape import shape_of
from dsv3_jax.plan.report import RESERVED_BYTES

WORKSPACE_BYTES = 4e9
"""Activations and the buffers of transfers."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """GPUs that share the experts. ValueError where they do not hold them evenly."""

    cluster: Cluster
    model: ModelConfig
    precision: PrecisionConfig
    gpus: int
    redundant: int = 32
    """Experts that are held twice."""
    cache: str = "bf16"
    drafts: bool = False
    """Whether the MTP module is there."""
    imbalance: Number = 1.0
    """Rows of the busiest GPU's experts over the mean."""

    def __post_init__(self):
        experts = self.model.n_routed_experts
        require(experts > 0, "model.n_routed_experts", experts, "experts, which a unit shares")
        held = experts + self.redundant
        rule = f"a divisor of the {held} routed and redundant experts"
        require(self.gpus >= 1 and held % self.gpus == 0, "unit: gpus", self.gpus, rule)
        require(self.redundant >= 0, "unit: redundant", self.redundant, "at least 0")

    @property
    def routed_per_gpu(self) -> int:
        return (self.model.n_routed_experts + self.redundant) // self.gpus

    @property
    def weight_bytes(self) -> Number:
        """Of one GPU: matrices in the recipe's format, embedding and head in BF16."""
        m = self.model
        matrices = 1 + 4 / 128**2 if self.precision.recipe == "fp8" else 2.0
        moe = (self.routed_per_gpu + m.n_shared_experts) * expert_parameters(m)
        layer = attention_parameters(m)
        values = m.num_hidden_layers * layer + m.num_dense_layers * dense_mlp_parameters(m)
        values += m.num_moe_layers * moe
        depth = m.num_nextn_predict_layers * self.drafts
        values += depth * (layer + moe)
        rest = 2 * m.vocab_size * m.hidden_size + depth * 2 * m.hidden_size**2
        rest += m.num_moe_layers * router_parameters(m)
        return matrices * values + 2.0 * rest

    @property
    def cache_room_bytes(self) -> Number:
        """What is left on a GPU for caches; negative where the weights do not fit."""
        memory = self.cluster.gpu.memory_bytes
        return memory - RESERVED_BYTES - WORKSPACE_BYTES - self.weight_bytes

    @property
    def cache_tokens(self) -> int:
        """Tokens whose cache a GPU has room for."""
        per_token = cache_bytes_per_token(shape_of(self.model), self.cache)
        depth = self.model.num_nextn_predict_layers * self.drafts
        per_token *= 1 + depth / self.model.num_hidden_layers
        return max(0, math.floor(self.cache_room_bytes / per_token))


@dataclass(frozen=True, kw_only=True)
class PassTimes:
    """Seconds of one pass of all layers over both micro-batches."""

    compute_seconds: Number
    """If only the multiprocessors counted."""
    exchange_seconds: Number
    """If only the experts' rows did."""
    ideal_seconds: Number
    """Each layer as long as the longer of both; then the head."""
    seconds: Number
    """Times what measured systems take over that."""


def decode_step(unit: Unit, batch: Number, context: Number, *, overhead: bool = True) -> PassTimes:
    """One step of `batch` requests a GPU whose caches hold `context` tokens on average.

    With drafts every request has two tokens in it.
    """
    m, cluster = unit.model, unit.cluster
    rows = batch * (1 + unit.drafts) / 2  # of one of two micro-batches
    machine = _machine(unit, cluster.gpu.multiprocessors)
    attention = _absorbed(unit, machine, rows) + _decode_core(unit, batch / 2, context)
    shared = m.n_shared_experts * m.moe_intermediate_size
    routed = rows * m.num_experts_per_tok / unit.routed_per_gpu * unit.imbalance
    experts = _swiglu(machine, m, routed, m.moe_intermediate_size, unit.routed_per_gpu)
    experts += _swiglu(machine, m, rows, shared) if shared else 0.0
    dense = _swiglu(machine, m, rows, m.intermediate_size)
    sends = low_latency_seconds(unit, rows)
    return _combine(unit, attention, dense, experts, sends, rows, overhead, "decode")


def prefill_pass(
    unit: Unit, tokens: Number, prompt: int, hit: Number, *, overhead: bool = True
) -> PassTimes:
    """One pass of `tokens` a GPU that are computed, of prompts of `prompt` tokens, of which a share
    `hit` was in the cache."""
    m, cluster = unit.model, unit.cluster
    half = tokens / 2
    machine = _machine(unit, cluster.gpu.multiprocessors - cluster.communication_sms)
    # Every computed token sees the cached ones too: of the triangle what is below its top.
    seen = prompt * (1 + hit)
    job = Job(model=m, seq=round(seen), tokens=half, expert_gpus=unit.gpus)
    whole = layer_times(machine, job, UnitKind.DENSE)
    routed = half * m.num_experts_per_tok / unit.routed_per_gpu * unit.imbalance
    experts = _swiglu(machine, m, routed, m.moe_intermediate_size, unit.routed_per_gpu)
    shared = m.n_shared_experts * m.moe_intermediate_size
    experts += _swiglu(machine, m, half, shared) if shared else 0.0
    experts += machine.elementwise("mlp(F)", half / 4096)
    spread = fanout(m, _even(unit.gpus, m), cluster.gpus_per_node)
    sent = exchange(cluster, m, unit.precision, half * unit.imbalance, spread, beside=False)
    sends = sent.dispatch + sent.combine
    return _combine(unit, whole.attention, whole.mlp, experts, sends, half, overhead, "prefill")


def _even(gpus: int, model: ModelConfig) -> int:
    """The largest power of two of GPUs that the groups divide among; 144 spread as 128 do."""
    return min(model.n_routed_experts, 2 ** math.floor(math.log2(gpus)))


def _machine(unit: Unit, sms: int) -> Machine:
    return Machine(cluster=unit.cluster, recipe=unit.precision.recipe, sms=sms, training=False)


def _combine(
    unit: Unit,
    attention: Number,
    dense: Number,
    experts: Number,
    sends: Number,
    rows: Number,
    overhead: bool,
    kind: str,
) -> PassTimes:
    """Of layers whose parts take so long for one micro-batch."""
    m = unit.model
    depth = m.num_nextn_predict_layers * unit.drafts
    moe = m.num_moe_layers + depth
    machine = _machine(unit, unit.cluster.gpu.multiprocessors)
    # A prompt's last token alone needs the head, of a decode step all.
    sampled = 2 * rows if kind == "decode" else 1.0
    head = (1 + depth) * machine.head_gemm(sampled, m.vocab_size, m.hidden_size)
    compute = 2 * (m.num_dense_layers * (attention + dense) + moe * (attention + experts)) + head
    ideal = 2 * m.num_dense_layers * (attention + dense) + head
    ideal += 2 * moe * max(attention + experts, sends)
    return PassTimes(
        compute_seconds=compute,
        exchange_seconds=2 * moe * sends,
        ideal_seconds=ideal,
        seconds=ideal * (serving_overhead(kind) if overhead else 1.0),
    )


def _swiglu(
    machine: Machine, model: ModelConfig, rows: Number, width: int, groups: int = 1
) -> Number:
    hidden = model.hidden_size
    up = machine.gemm(rows, 2 * width, hidden, groups=groups)
    return up + machine.gemm(rows, hidden, width, groups=groups)


def _absorbed(unit: Unit, machine: Machine, rows: Number) -> Number:
    """Projections of decode: `kv_b_proj` is applied to queries and outputs, not to the cache."""
    m = unit.model
    heads = m.num_attention_heads
    queries = heads * m.qk_head_dim
    seconds = machine.gemm(rows, m.kv_lora_rank + m.qk_rope_head_dim, m.hidden_size)
    if m.q_lora_rank is None:
        seconds += machine.gemm(rows, queries, m.hidden_size)
    else:
        seconds += machine.gemm(rows, m.q_lora_rank, m.hidden_size)
        seconds += machine.gemm(rows, queries, m.q_lora_rank)
    for size in (m.qk_nope_head_dim, m.v_head_dim):
        seconds += machine.head_gemm(rows, heads * size, m.kv_lora_rank)
    return seconds + machine.gemm(rows, m.hidden_size, heads * m.v_head_dim)


def _decode_core(unit: Unit, requests: Number, context: Number) -> Number:
    """FlashMLA's: the cache read once a request, every token of it against all heads."""
    m, gpu, given = unit.model, unit.cluster.gpu, published("decode_attention")
    size = requests * context * cache_bytes_per_layer(shape_of(m), unit.cache)
    width = 2 * m.kv_lora_rank + m.qk_rope_head_dim
    flops = 2 * m.num_attention_heads * width * context * requests * (1 + unit.drafts)
    memory = gpu.memory_bytes_per_second / H800.memory_bytes_per_second
    compute = gpu.bf16_flops_per_second / H800.bf16_flops_per_second
    return max(
        size / (memory * given["bytes_per_second"]),
        flops / (compute * given["flops_per_second"]),
    )


def low_latency_seconds(unit: Unit, rows: Number) -> Number:
    """Dispatch and combine of `rows` tokens of a GPU, as DeepEP's low-latency kernels do them:
    every expert's row on its own way, no multiprocessor busy."""
    given, m, cluster = published("low_latency"), unit.model, unit.cluster
    if unit.gpus == 1:
        return 0.0
    scale = rows / given["tokens"] * m.hidden_size / 7168 * m.num_experts_per_tok / 8
    link, base = cluster.network, H800.network_achieved_bytes_per_second
    if unit.gpus <= cluster.gpus_per_node:
        link, base = cluster.nvlink, H800.nvlink_achieved_bytes_per_second
    measured = [math.log2(gpus) for gpus in given["expert_gpus"]]
    total = 0.0
    for kind, wire, usual in (
        ("dispatch", WIRE_BYTES[unit.precision.dispatch_format], WIRE_BYTES["fp8"]),
        ("combine", WIRE_BYTES[unit.precision.combine], WIRE_BYTES["bf16"]),
    ):
        at = float(np.interp(math.log2(unit.gpus), measured, given[f"{kind}_seconds"]))
        if unit.gpus <= cluster.gpus_per_node:
            at = given[f"{kind}_seconds"][0]
        moving = (at - link.latency_seconds) * scale * wire / usual
        total += link.latency_seconds + moving * base / link.achieved_bytes_per_second
    return total


@functools.cache
def serving_overhead(kind: str) -> Number:
    """By how much SGLang's measured pass is longer than the kernels', of `prefill` or `decode`:
    launches, uneven experts, kernels that wait for each other. DeepSeek's service is not used."""
    given = published("serving")[kind]
    unit = Unit(
        cluster=find_cluster("h100_1024"),
        model=ModelConfig(),
        precision=PrecisionConfig(recipe="fp8"),
        gpus=given["gpus"],
    )
    per_gpu = given["tokens_per_second_per_node"] / 8
    if kind == "decode":
        ideal = decode_step(unit, given["batch"], given["context"], overhead=False).ideal_seconds
        return given["batch"] / per_gpu / ideal
    tokens = given["batch_tokens"]
    ideal = prefill_pass(unit, tokens, given["input"], 0.0, overhead=False).ideal_seconds
    return tokens / per_gpu / ideal
