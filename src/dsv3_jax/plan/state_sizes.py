"""What a GPU holds of a training run, and what its optimizer moves: from the config alone. No JAX.

A closed form of what `dsv3 compile` reads from the compiled program, of the busiest rank: for
searching layouts, where compiling each would take minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.config.parallel import TWO_CHUNKS
from dsv3_jax.model.accounting import (
    attention_parameters,
    dense_mlp_parameters,
    expert_parameters,
    router_parameters,
)
from dsv3_jax.parallel.pipeline.orders import Kind
from dsv3_jax.parallel.pipeline.schedule import Schedule
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.machine import WIRE_BYTES, Fanout
from dsv3_jax.plan.pipeline_times import Orders
from dsv3_jax.plan.report import RESERVED_BYTES

SLOTS_OVER_ROWS = 1.125
"""Room for the experts' rows over what an even load fills: `dsv3 compile` of configs/v3_671b.py has
36,896 slots for 32,768 rows."""
COMPUTE_BYTES = {"fp8": 1 + 4 / 128**2, "bf16": 2.0, "fp32": 4.0}
"""Of a weight that products read, its block's scale included."""
WORKING_LAYERS = 2
"""Layers whose tensors are all there at once: one that computes, one whose results travel."""


@dataclass(frozen=True, kw_only=True)
class StateSizes:
    """Bytes of the busiest GPU. They add up to `total`."""

    weights: Number
    """What products read."""
    optimizer: Number
    """Master weights and both moments, of the GPU's share."""
    gradients: Number
    kept: Number
    """For backward, of all micro-batches under way."""
    buffers: Number
    """Of the layers that compute, and the logits."""
    reserved: Number = float(RESERVED_BYTES)

    @property
    def total(self) -> Number:
        parts = (self.weights, self.optimizer, self.gradients, self.kept, self.buffers)
        return sum(parts) + self.reserved


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of one rank's stages: experts' of one GPU, all others, and those outside any layer."""

    experts: Number
    dense: Number
    embedding: Number

    @property
    def total(self) -> Number:
        return self.experts + self.dense + self.embedding


def rank_parameters(
    model: ModelConfig, units: Sequence[Unit], expert_gpus: int, *, embedding: bool
) -> Parameters:
    """Of the units of a rank; `embedding` where it has the input embedding too."""
    experts = dense = outside = 0.0
    for unit in units:
        kind = UnitKind(min(unit.kind, UnitKind.MTP))
        if kind == UnitKind.EMPTY:
            continue
        if kind == UnitKind.NORM:
            outside += model.vocab_size * model.hidden_size
            continue
        dense += attention_parameters(model) + 2 * model.hidden_size
        if kind == UnitKind.DENSE:
            dense += dense_mlp_parameters(model)
            continue
        experts += model.n_routed_experts * expert_parameters(model) / expert_gpus
        dense += model.n_shared_experts * expert_parameters(model) + router_parameters(model)
        if kind == UnitKind.MTP:
            dense += 2 * model.hidden_size**2 + 3 * model.hidden_size
    if embedding:
        outside += model.vocab_size * model.hidden_size
    return Parameters(experts=experts, dense=dense, embedding=outside)


def every_rank(config: RunConfig, stages: Sequence[Sequence[Unit]]) -> list[Parameters]:
    """Of each rank of the pipeline, all its chunks together."""
    parallel = config.parallel
    chunks = 2 if parallel.schedule in TWO_CHUNKS else 1
    found = []
    for rank in range(parallel.pipe):
        held = [rank] if chunks == 1 else [rank, len(stages) - 1 - rank]
        units = [unit for stage in held for unit in stages[stage]]
        found.append(
            rank_parameters(config.model, units, _expert_gpus(config), embedding=0 in held)
        )
    return found


def padded_parameters(config: RunConfig, stages: Sequence[Sequence[Unit]]) -> Parameters:
    """What one program for all ranks has room for: as many layers in each chunk as the longest
    stage has, as many dense MLPs as the rank with most of them; embedding and head are split over
    the ranks."""
    m, pipe = config.model, config.parallel.pipe
    if not m.has_experts:
        return max(every_rank(config, stages), key=lambda parameters: parameters.total)
    chunks = 2 if config.parallel.schedule in TWO_CHUNKS else 1
    rows = chunks * max(sum(u.kind != UnitKind.NORM for u in stage) for stage in stages)
    dense = [sum(u.kind == UnitKind.DENSE for u in stage) for stage in stages]
    if chunks == 2:
        dense = [first + last for first, last in zip(dense, reversed(dense), strict=True)]
    layer = rank_parameters(m, [Unit(UnitKind.MOE, 0)], _expert_gpus(config), embedding=False)
    return Parameters(
        experts=rows * layer.experts,
        dense=rows * layer.dense + max(dense) * dense_mlp_parameters(m),
        embedding=2 * m.vocab_size * m.hidden_size / pipe,
    )


def _expert_gpus(config: RunConfig) -> int:
    return config.parallel.node * config.parallel.gpu


def copies(config: RunConfig) -> tuple[int, int]:
    """GPUs that hold the same (expert, other parameter)."""
    parallel = config.parallel
    twice = 2 if parallel.schedule == "dualpipe" else 1
    return twice * parallel.data, twice * parallel.token_shards


def moment_bytes(config: RunConfig) -> int:
    """Of a parameter's two moments."""
    return 2 * (2 if config.optimizer.moment_dtype == "bfloat16" else 4)


def state_sizes(
    config: RunConfig,
    schedule: Orders | Schedule,
    stages: Sequence[Sequence[Unit]],
    spread: Fanout,
) -> StateSizes:
    """Of the rank that keeps most, in one program for all ranks (`padded_parameters`)."""
    moments, compute = moment_bytes(config), COMPUTE_BYTES[config.precision.recipe]
    expert_copies, dense_copies = copies(config)
    held = padded_parameters(config, stages)
    share = held.experts / expert_copies + (held.dense + held.embedding) / dense_copies
    weights = compute * (held.experts + held.dense) + min(4.0, 2 * compute) * held.embedding
    gradients = 4 * held.total
    if config.parallel.zero == 3:
        weights, gradients = weights / dense_copies, gradients / dense_copies
    # Every micro-batch has the room of the longest stage.
    kept = max(micro_batch_bytes(config, stages, spread))
    late = max(late_bytes(config, stages))
    return StateSizes(
        weights=weights,
        optimizer=(4 + moments) * share,
        gradients=gradients,
        kept=max(_kept(schedule, rank, kept, late) for rank in range(schedule.layout.ranks)),
        buffers=_buffers(config, spread),
    )


def _kept(schedule: Orders | Schedule, rank: int, kept: Number, late: Number) -> Number:
    """The most that a rank's micro-batches under way keep at a time; `late` is what weight
    gradients that wait keep besides."""
    held = most = 0.0
    for action in schedule.orders[rank]:
        held += kept * (action.forward is not None)
        most = max(most, held)
        if action.kind == Kind.BACKWARD_INPUT and late:
            held += late
        elif action.kind == Kind.BACKWARD_WEIGHT and late:
            held -= late + kept
        elif action.backward is not None and action.kind != Kind.BACKWARD_WEIGHT:
            held -= kept
        most = max(most, held)
    return most


def layer_tensors(config: RunConfig, spread: Fanout, *, dense: bool) -> dict[str, Number]:
    """Bytes a token of each tensor of a layer that backward could read, by the names of
    `dsv3_jax.config.training.TENSORS`."""
    m, is_fp8 = config.model, config.precision.recipe == "fp8"
    value = 4.0 if config.precision.recipe == "fp32" else 2.0
    row = WIRE_BYTES["fp8"] if is_fp8 else value  # of what goes into products
    wire = WIRE_BYTES[config.precision.dispatch_format]
    heads, hidden = m.num_attention_heads, m.hidden_size
    queries = heads * m.qk_head_dim
    found = {
        "q_latent": value * (m.q_lora_rank or 0),
        "kv_latent": value * (m.kv_lora_rank + m.qk_rope_head_dim),
        "queries": value * queries,
        "keys_values": value * heads * (m.qk_nope_head_dim + m.v_head_dim),
        # FP8 keeps o_proj's input in E5M6, 12 bits; the scores' log-sum-exp is beside it.
        "attention_output": (1.5 if is_fp8 else value) * heads * m.v_head_dim + 4.0 * heads,
        "attention_residual": value * hidden,
    }
    if dense:
        width = m.intermediate_size
        return found | {"mlp_gate": row * width, "mlp_up": row * width}
    routed, width = m.num_experts_per_tok, m.moe_intermediate_size
    return found | {
        "chosen_experts": 8.0 * routed,
        "node_rows": wire * hidden * spread.nodes,
        "gpu_rows": wire * hidden * spread.gpus,
        "expert_rows": row * hidden * routed * SLOTS_OVER_ROWS,
        "expert_up": row * 2 * width * routed * SLOTS_OVER_ROWS,
        "mlp_gate": row * m.n_shared_experts * width,
        "mlp_up": row * m.n_shared_experts * width,
    }


RECOMPUTED = {"selective": ("queries", "keys_values", "expert_rows")}
"""What `remat` computes again though it is not named in `keep`; `full` all."""


def micro_batch_bytes(
    config: RunConfig, stages: Sequence[Sequence[Unit]], spread: Fanout
) -> list[Number]:
    """What a stage keeps of one micro-batch for its backward, by stage."""
    tokens = _tokens(config)
    remat, kept = config.train.remat, config.train.kept
    value = 4.0 if config.precision.recipe == "fp32" else 2.0
    inputs = value * config.model.hidden_size
    size = {}
    for dense in (True, False):
        found = layer_tensors(config, spread, dense=dense)
        again = set(found) if remat == "full" else set(RECOMPUTED.get(remat, ()))
        size[dense] = inputs + sum(b for name, b in found.items() if name not in again - kept)
    result = []
    for units in stages:
        layers = [u for u in units if u.kind not in (UnitKind.EMPTY, UnitKind.NORM)]
        result.append(tokens * sum(size[unit.kind == UnitKind.DENSE] for unit in layers))
    return result


def late_bytes(config: RunConfig, stages: Sequence[Sequence[Unit]]) -> list[Number]:
    """What waits with a stage's weight gradients: those of every product's output."""
    if not config.parallel.late_weight_gradients:
        return [0.0] * len(stages)
    m, value = config.model, 4.0 if config.precision.recipe == "fp32" else 2.0
    heads = m.num_attention_heads
    outputs = heads * (m.qk_head_dim + m.qk_nope_head_dim + m.v_head_dim) + m.hidden_size
    outputs += (m.q_lora_rank or 0) + m.kv_lora_rank + m.qk_rope_head_dim
    experts = m.num_experts_per_tok + m.n_shared_experts
    routed = experts * (2 * m.moe_intermediate_size + m.hidden_size)
    dense = 2 * m.intermediate_size + m.hidden_size
    result = []
    for units in stages:
        layers = [u for u in units if u.kind not in (UnitKind.EMPTY, UnitKind.NORM)]
        values = sum(outputs + (dense if u.kind == UnitKind.DENSE else routed) for u in layers)
        result.append(_tokens(config) * value * values)
    return result


def _buffers(config: RunConfig, spread: Fanout) -> Number:
    """Of layers that compute, forward and backward, and of logits and their gradient."""
    dense = not config.model.has_experts
    working = sum(layer_tensors(config, spread, dense=dense).values())
    logits = 2 * 4.0 * config.model.vocab_size
    return _tokens(config) * max(WORKING_LAYERS * 2 * working, logits)


def _tokens(config: RunConfig) -> Number:
    shards = config.parallel.token_shards
    return config.train.batch_size / config.parts / shards * config.data.seq_len
