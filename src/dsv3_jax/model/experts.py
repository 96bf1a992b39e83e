"""The routed experts: exact for any routing, without a product over all experts.

The slots of a `DispatchPlan` are computed as one batched product; overflow blocks in a loop that
runs as often as the routing needs. Backward repeats both (a custom VJP: the loop's length is known
only at run time) and recomputes SwiGLU from its saved input.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, ParallelConfig
from dsv3_jax.model.linear import normal
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import Exchange, ExpertFunction
from dsv3_jax.parallel.dispatch_plan import (
    DispatchPlan,
    choose_capacity,
    overflow_block,
    overflow_pairs,
    plan_dispatch,
)


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
        dispatcher: ExpertFunction | None = None,
    ):
        self.gate_up_proj = nnx.Param(
            normal(rngs, (num_experts, 2, intermediate, hidden), std, dtype)
        )
        self.down_proj = nnx.Param(normal(rngs, (num_experts, hidden, intermediate), std, dtype))
        self.dispatcher = LocalDispatcher() if dispatcher is None else dispatcher

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing
    ) -> Float[Array, "tokens hidden"]:
        """sum_k weight_k * expert_k(x) for every token."""
        gate_up = self.gate_up_proj[...].reshape(self.gate_up_proj.shape[0], -1, x.shape[-1])
        parameters = (gate_up, self.down_proj[...])
        weights = routing.weights.astype(x.dtype)
        return self.dispatcher(x, routing.experts, weights, parameters, x.shape[0])


@dataclass(frozen=True)
class LocalDispatcher:
    """Computes with the experts that are here; a pair with a negative expert counts as nothing."""

    def __call__(self, x, experts, weights, parameters, tokens):
        gate_up, down = parameters
        num_experts, top_k = down.shape[0], weights.shape[1]
        if weights.size < num_experts:
            weights = jnp.where(experts < 0, 0, weights)
            return _expert_by_expert(x, experts, weights, gate_up, down)
        capacity = choose_capacity(tokens, top_k, num_experts)
        if capacity == tokens:  # all that could come
            capacity = x.shape[0]
        capacity = min(capacity, x.shape[0])
        plan = plan_dispatch(experts, num_experts, capacity)
        return _routed_experts(capacity, x, weights, gate_up, down, plan)


def make_dispatcher(model: ModelConfig, parallel: ParallelConfig) -> ExpertFunction:
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


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed_experts(
    capacity: int,
    x: Float[Array, "tokens hidden"],
    weights: Float[Array, "tokens top_k"],
    gate_up: Float[Array, "experts double_width hidden"],
    down: Float[Array, "experts hidden width"],
    plan: DispatchPlan,
) -> Float[Array, "tokens hidden"]:
    return _forward(capacity, x, weights, gate_up, down, plan)[0]


def _forward(capacity, x, weights, gate_up, down, plan):
    out = jnp.zeros_like(x)
    h = None
    if capacity:
        rows = x[plan.slot_pair // weights.shape[1]]
        h = jnp.einsum("ecd,efd->ecf", rows, gate_up)
        y = jnp.einsum("ecf,edf->ecd", swiglu(h), down)
        out = _gather_sum(y, plan, jnp.where(plan.pair_in_slot, weights, 0))
    if capacity < x.shape[0]:
        out = _add_overflow(capacity, x, weights, gate_up, down, plan, out)
    return out, (x, weights, gate_up, down, plan, h)


def _add_overflow(capacity, x, weights, gate_up, down, plan, out):
    """`out` plus what the overflow blocks contribute."""
    top_k, block = weights.shape[1], overflow_block(x.shape[0])

    def add_block(index, out):
        expert, pairs, real = overflow_pairs(plan, index, capacity, block)
        h = x[pairs // top_k] @ gate_up[expert].T
        y = swiglu(h) @ down[expert].T
        weight = jnp.where(real, weights.reshape(-1)[pairs], 0)
        return out.at[pairs // top_k].add(weight[:, None] * y)

    return jax.lax.fori_loop(0, plan.block_end[-1], add_block, out)


def _backward(capacity, residuals, d_out):
    x, weights, gate_up, down, plan, h = residuals
    d_x, d_gate_up, d_down = (jnp.zeros_like(a) for a in (x, gate_up, down))
    d_pairs = jnp.zeros((weights.size,), weights.dtype)
    if capacity:
        pairs = plan.slot_pair
        token = pairs // weights.shape[1]
        weight = jnp.where(plan.slot_filled, weights.reshape(-1)[pairs], 0)
        d_rows, d_h, weighted, d_slots = _expert_backward(h, weight, d_out[token], down, gate_up)
        d_gate_up = jnp.einsum("ecf,ecd->efd", d_h, x[token])
        d_down = jnp.einsum("ecd,ecf->edf", d_out[token], weighted)
        d_x = _gather_sum(d_rows, plan, plan.pair_in_slot.astype(x.dtype))
        d_pairs = jnp.where(plan.pair_in_slot, d_slots.reshape(-1)[plan.pair_slot], 0).reshape(-1)
    gradients = (d_x, d_pairs, d_gate_up, d_down)
    if capacity < x.shape[0]:
        gradients = _add_overflow_backward(capacity, residuals, d_out, gradients)
    d_x, d_pairs, d_gate_up, d_down = gradients
    return d_x, d_pairs.reshape(weights.shape), d_gate_up, d_down, None


def _add_overflow_backward(capacity, residuals, d_out, gradients):
    """`gradients` of (x, pair weights, gate_up, down) plus those of the overflow blocks."""
    x, weights, gate_up, down, plan, _ = residuals
    top_k, block = weights.shape[1], overflow_block(x.shape[0])

    def add_block(index, gradients):
        d_x, d_pairs, d_gate_up, d_down = gradients
        expert, pairs, real = overflow_pairs(plan, index, capacity, block)
        token = pairs // top_k
        weight = jnp.where(real, weights.reshape(-1)[pairs], 0)
        h = x[token] @ gate_up[expert].T
        d_rows, d_h, weighted, d_weight = (
            a[0]
            for a in _expert_backward(
                h[None], weight[None], d_out[token][None], down[expert][None], gate_up[expert][None]
            )
        )
        return (
            d_x.at[token].add(d_rows),
            d_pairs.at[pairs].add(jnp.where(real, d_weight, 0)),
            d_gate_up.at[expert].add(d_h.T @ x[token]),
            d_down.at[expert].add(d_out[token].T @ weighted),
        )

    return jax.lax.fori_loop(0, plan.block_end[-1], add_block, gradients)


def _expert_backward(
    h: Float[Array, "experts rows double_width"],
    weight: Float[Array, "experts rows"],
    d_out: Float[Array, "experts rows hidden"],
    down: Float[Array, "experts hidden width"],
    gate_up: Float[Array, "experts double_width hidden"],
):
    """Gradients of weight * down(swiglu(h)) by row: d_rows, d_h, weight * activation, d_weight."""
    activation, swiglu_vjp = jax.vjp(swiglu, h)
    d_activation = jnp.einsum("ecd,edf->ecf", d_out, down)  # before the routing weight
    d_weight = jnp.sum(activation * d_activation, axis=-1)
    (d_h,) = swiglu_vjp(d_activation * weight[..., None])
    d_rows = jnp.einsum("ecf,efd->ecd", d_h, gate_up)
    return d_rows, d_h, activation * weight[..., None], d_weight


def _gather_sum(
    slots: Float[Array, "experts capacity hidden"],
    plan: DispatchPlan,
    weights: Float[Array, "tokens top_k"],
) -> Float[Array, "tokens hidden"]:
    """Each token's weighted sum over its slots, one gather a k (a reshape would copy T*K rows)."""
    rows = slots.reshape(-1, slots.shape[-1])
    total = rows[plan.pair_slot[:, 0]] * weights[:, 0, None]
    for k in range(1, weights.shape[1]):
        total += rows[plan.pair_slot[:, k]] * weights[:, k, None]
    return total


_routed_experts.defvjp(_forward, _backward)
