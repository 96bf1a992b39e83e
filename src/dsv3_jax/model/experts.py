"""The routed experts: exact for any routing, without a product over all experts.

The slots of a `DispatchPlan` are computed as one batched product; overflow blocks in a loop that
runs as often as the routing needs (with a custom VJP: its length is known only at run time).
Backward keeps the input of SwiGLU and gathers and computes the rest again.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, ParallelConfig
from dsv3_jax.model.linear import normal
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import (
    Dispatcher,
    Exchange,
    Sent,
    join_weights,
    split_weights,
)
from dsv3_jax.parallel.dispatch_plan import (
    DispatchPlan,
    choose_capacity,
    overflow_block,
    overflow_pairs,
    plan_dispatch,
)
from dsv3_jax.parallel.tape import AUTODIFF, Tape


class Experts(nnx.Module):
    """E SwiGLU networks; `gate_up_proj` [E, 2, F, D] holds gate then up, `down_proj` [E, D, F].

    Inside shard_map the arrays hold this device's experts and `dispatcher` brings the tokens.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        dispatcher: Dispatcher | None = None,
    ):
        self.gate_up_proj = nnx.Param(
            normal(rngs, (num_experts, 2, intermediate, hidden), std, dtype)
        )
        self.down_proj = nnx.Param(normal(rngs, (num_experts, hidden, intermediate), std, dtype))
        self.dispatcher = LocalDispatcher() if dispatcher is None else dispatcher

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, tape: Tape = AUTODIFF
    ) -> Float[Array, "tokens hidden"]:
        """sum_k weight_k * expert_k(x) for every token."""
        sent, parameters = self.dispatch(x, routing.experts, routing.weights, tape)
        return self.dispatcher.combine(self.dispatcher.compute(sent, parameters, tape), parameters)

    def dispatch(
        self,
        x: Float[Array, "tokens hidden"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        tape: Tape = AUTODIFF,
    ) -> tuple[Sent, Any]:
        """The first of the dispatcher's three parts."""
        gate_up = self.gate_up_proj[...].reshape(self.gate_up_proj.shape[0], -1, x.shape[-1])
        parameters = (gate_up, self.down_proj[...])
        return self.dispatcher.dispatch(x, experts, weights.astype(x.dtype), parameters, tape)


@dataclass(frozen=True)
class LocalDispatcher:
    """Computes with the experts that are here; a pair with a negative expert counts as nothing.

    A `Dispatcher` that sends nothing, and the `ExpertFunction` of one that does.
    """

    def dispatch(self, x, experts, weights, parameters, tape=AUTODIFF):
        del tape
        return Sent(join_weights(x, weights), experts), parameters

    def compute(self, sent, parameters, tape=AUTODIFF):
        x, weights = split_weights(sent.rows, sent.experts)
        done = self(x, sent.experts, weights, parameters, x.shape[0], tape)
        return sent._replace(rows=done)

    def combine(self, sent, parameters):
        del parameters
        return sent.rows

    def __call__(self, x, experts, weights, parameters, tokens, tape=AUTODIFF, is_further=False):
        gate_up, down = parameters
        num_experts, top_k = down.shape[0], weights.shape[1]
        if weights.size < num_experts:
            weights = jnp.where(experts < 0, 0, weights)
            return _expert_by_expert(x, experts, weights, gate_up, down)
        # In a further round nothing but overflow blocks, which compute what is there and no more.
        capacity = choose_capacity(tokens, top_k, num_experts, x.shape[0]) * (not is_further)
        plan = plan_dispatch(experts, num_experts, capacity)
        operands, out = (x, weights, gate_up, down), jnp.zeros_like(x)
        if capacity < x.shape[0]:
            out, operands = _overflow(capacity, operands, plan)
        if capacity:
            slots = tape.recomputed(partial(_slots, tape), but=("expert_up",))
            out += slots(*operands, plan)
        return out


def make_dispatcher(model: ModelConfig, parallel: ParallelConfig) -> Dispatcher:
    """How tokens come to the experts of a mesh: not at all, in one exchange, or in two hops."""
    node, gpu = parallel.node, parallel.gpu
    local, here = LocalDispatcher(), model.n_routed_experts // (node * gpu)
    # Distinct nodes of a token, and of those experts that are on one node, distinct GPUs, for
    # uniform choices (the restricted one: DeepSeek-V3, 8 of 256 in 4 of 8 groups, 3.6 nodes).
    top_k, grouped = model.num_experts_per_tok, model.n_group % node == 0
    reachable = min(node, model.topk_group) if grouped else node
    nodes = _distinct(reachable, float(top_k))
    gpus = _distinct(gpu, top_k / nodes)

    def exchange(axes, peers, experts_per_peer, rows_a_token, agree_on, inner):
        return Exchange(
            axes, peers, experts_per_peer, rows_a_token, parallel.capacity_factor, agree_on, inner
        )

    if node * gpu == 1:
        return local
    used = tuple(axis for axis in ("node", "gpu") if getattr(parallel, axis) > 1)
    if len(used) == 1 or parallel.dispatcher == "flat":
        return exchange(used, node * gpu, here, nodes * gpus / (node * gpu), used, local)
    inside = exchange(("gpu",), gpu, here, nodes * gpus / gpu, ("gpu",), local)
    return exchange(("node",), node, here * gpu, nodes / node, used, inside)


def _distinct(places: int, draws: float) -> float:
    """Expected number of distinct places that `draws` uniform choices hit."""
    return places * (1 - math.pow(1 - 1 / places, draws)) if places > 1 else 1.0


def swiglu(h: Float[Array, "*rows double_width"]) -> Float[Array, "*rows width"]:
    """silu(gate) * up of [gate ; up]."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _expert_by_expert(
    x: Float[Array, "tokens hidden"],
    experts: Int[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts double_width hidden"],
    down: Float[Array, "experts hidden width"],
) -> Float[Array, "tokens hidden"]:
    """The routed sum for fewer pairs than experts: pair by pair, reading only what is needed.

    A loop of known length, so it has a gradient without a custom rule.
    """
    top_k = weights.shape[1]

    def add_pair(out, pair):
        token, expert = pair // top_k, experts.reshape(-1)[pair]
        h = jax.lax.dynamic_slice_in_dim(x, token, 1) @ gate_up[expert].T
        y = swiglu(h) @ down[expert].T
        return out.at[token].add(weights.reshape(-1)[pair] * y[0]), None

    return jax.lax.scan(add_pair, jnp.zeros_like(x), jnp.arange(weights.size))[0]


Operands = tuple[
    Float[Array, "tokens hidden"],
    Float[Array, "tokens top_k"],
    Float[Array, "experts double_width hidden"],
    Float[Array, "experts hidden width"],
]
"""x, routing weights, gate_up, down."""


def _slots(
    tape: Tape,
    x: Float[Array, "tokens hidden"],
    weights: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts double_width hidden"],
    down: Float[Array, "experts hidden width"],
    plan: DispatchPlan,
) -> Float[Array, "tokens hidden"]:
    """What the slots contribute. Weights are applied before `down`, so that their gradient needs
    no expert's output."""
    rows = tape.keep("expert_rows", _take_slots(x, plan))
    h = tape.keep("expert_up", tape.linear("gate_up_proj", _gate_up_product, rows, gate_up))
    weighted = swiglu(h) * _slot_weights(weights, plan)[..., None]
    return _sum_slots(tape.linear("down_proj", _down_product, weighted, down), plan)


def _gate_up_product(rows: Array, gate_up: Array) -> Array:
    return jnp.einsum("ecd,efd->ecf", rows, gate_up)


def _down_product(activation: Array, down: Array) -> Array:
    return jnp.einsum("ecf,edf->ecd", activation, down)


@jax.custom_vjp
def _take_slots(
    x: Float[Array, "tokens hidden"], plan: DispatchPlan
) -> Float[Array, "experts capacity hidden"]:
    """Each slot's row (some row where it is empty); its transpose is `_sum_slots`."""
    return x[plan.slot_pair // plan.pair_slot.shape[1]]


@jax.custom_vjp
def _sum_slots(
    slots: Float[Array, "experts capacity hidden"], plan: DispatchPlan
) -> Float[Array, "tokens hidden"]:
    """Each token's sum over its slots, one gather a k (a reshape would copy T*K rows)."""
    rows = slots.reshape(-1, slots.shape[-1])
    total = jnp.zeros((plan.pair_slot.shape[0], rows.shape[1]), rows.dtype)
    for k in range(plan.pair_slot.shape[1]):
        total += jnp.where(plan.pair_in_slot[:, k, None], rows[plan.pair_slot[:, k]], 0)
    return total


@jax.custom_vjp
def _slot_weights(
    weights: Float[Array, "tokens top_k"], plan: DispatchPlan
) -> Float[Array, "experts capacity"]:
    """Each slot's routing weight, 0 where it is empty."""
    return jnp.where(plan.slot_filled, weights.reshape(-1)[plan.slot_pair], 0)


def _pair_gradients(
    plan: DispatchPlan, d_slots: Float[Array, "experts capacity"]
) -> Float[Array, "tokens top_k"]:
    return jnp.where(plan.pair_in_slot, d_slots.reshape(-1)[plan.pair_slot], 0)


_take_slots.defvjp(
    lambda x, plan: (_take_slots(x, plan), plan),
    lambda plan, d_rows: (_sum_slots(d_rows, plan), None),
)
# An empty slot's gradient is some row: what made the slot's output has weight 0 there.
_sum_slots.defvjp(
    lambda slots, plan: (_sum_slots(slots, plan), plan),
    lambda plan, d_out: (_take_slots(d_out, plan), None),
)
_slot_weights.defvjp(
    lambda weights, plan: (_slot_weights(weights, plan), plan),
    lambda plan, d_slots: (_pair_gradients(plan, d_slots), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _overflow(
    capacity: int, operands: Operands, plan: DispatchPlan
) -> tuple[Float[Array, "tokens hidden"], Operands]:
    """What the overflow blocks contribute, and the operands for whoever else needs them.

    Passed on like this they bring the others' gradients here in backward, to which the blocks add
    theirs in place.
    """
    x, weights, gate_up, down = operands
    block = overflow_block(x.shape[0])

    def add_block(index, out):
        expert, token, weight, _, _ = _overflow_rows(plan, index, capacity, block, weights)
        h = x[token] @ gate_up[expert].T
        return out.at[token].add(weight[:, None] * (swiglu(h) @ down[expert].T))

    out = jax.lax.fori_loop(0, plan.block_end[-1], add_block, jnp.zeros_like(x))
    return out, operands


def _overflow_rows(plan, index, capacity, block, weights):
    """A block's expert, its tokens, their weights (0 for none), its pairs, and which are real."""
    expert, pairs, real = overflow_pairs(plan, index, capacity, block)
    weight = jnp.where(real, weights.reshape(-1)[pairs], 0)
    return expert, pairs // weights.shape[1], weight, pairs, real


def _overflow_forward(capacity, operands, plan):
    return _overflow(capacity, operands, plan), (operands, plan)


def _overflow_backward(capacity, residuals, gradients):
    (x, weights, gate_up, down), plan = residuals
    d_out, (d_x, d_weights, d_gate_up, d_down) = gradients
    block = overflow_block(x.shape[0])

    def add_block(index, gradients):
        d_x, d_pairs, d_gate_up, d_down = gradients
        expert, token, weight, pairs, real = _overflow_rows(plan, index, capacity, block, weights)
        h = x[token] @ gate_up[expert].T
        activation, swiglu_vjp = jax.vjp(swiglu, h)
        d_activation = d_out[token] @ down[expert]  # before the routing weight
        (d_h,) = swiglu_vjp(d_activation * weight[:, None])
        d_weight = jnp.sum(activation * d_activation, axis=-1)
        return (
            d_x.at[token].add(d_h @ gate_up[expert]),
            d_pairs.at[pairs].add(jnp.where(real, d_weight, 0)),
            d_gate_up.at[expert].add(d_h.T @ x[token]),
            d_down.at[expert].add(d_out[token].T @ (activation * weight[:, None])),
        )

    start = (d_x, d_weights.reshape(-1), d_gate_up, d_down)
    d_x, d_pairs, d_gate_up, d_down = jax.lax.fori_loop(0, plan.block_end[-1], add_block, start)
    return (d_x, d_pairs.reshape(weights.shape), d_gate_up, d_down), None


_overflow.defvjp(_overflow_forward, _overflow_backward)
