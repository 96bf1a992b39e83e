"""Rows to the devices of their experts and back, inside shard_map: exact for any routing.

An `Exchange` sends every row once to each peer that holds any of its experts, lets `inner` work
there, sends the results back and adds them up. One over (node, gpu) is a flat dispatch; one over
node with one over gpu inside is DeepSeek's two hops: a token crosses to a node once, to the GPU of
the sender's own index, and spreads inside the node from there; on the way back the partial sums of
a node are added before they cross.

    source --node--> same index on each node --gpu--> experts' GPUs
           <-- sum --                        <-- sum --

Buffers hold `capacity` rows a peer. What does not fit goes in further rounds of the same program,
as many as the fullest sender of all needs (one flag, a pmax). Backward repeats the rounds; only the
first one, the usual one, keeps its residuals.

Source: DeepSeek-V3 Technical Report §3.2.2 (two hops), §2.1.2 (node-limited routing).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.exchange_plan import (
    NO_EXPERT,
    RoundPlan,
    localise,
    plan_round,
    rounds_needed,
    wanted_by,
)


@runtime_checkable
class ExpertFunction(Protocol):
    """sum_k weight_k * expert_k(x) over the experts that are here; a hashable value."""

    def __call__(
        self,
        x: Float[Array, "rows hidden"],
        experts: Int[Array, "rows top_k"],
        weights: Float[Array, "rows top_k"],
        parameters: Any,
        tokens: int,
    ) -> Float[Array, "rows hidden"]: ...


@dataclass(frozen=True)
class Exchange:
    """`inner` on the devices of `axes`, of which peer p holds experts p*n to p*n + n - 1.

    `rows_a_token` is how many rows a peer is expected to get for each token of this device;
    `capacity_factor` times that is the size of a buffer. `agree_on` are the axes of all collectives
    in here, `inner`'s too.
    """

    axes: tuple[str, ...]
    peers: int
    experts_per_peer: int
    rows_a_token: float
    capacity_factor: float
    agree_on: tuple[str, ...]
    inner: ExpertFunction

    def __call__(self, x, experts, weights, parameters, tokens):
        return _exchange(self, tokens, x, weights, parameters, experts)

    def capacity(self, rows: int, tokens: int) -> int:
        """Rows of one peer's buffer: a multiple of 8, at most all."""
        wanted = self.capacity_factor * self.rows_a_token * tokens
        return min(rows, -(-int(wanted + 1) // 8) * 8)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(hop, tokens, x, weights, parameters, experts):
    wanted, capacity = _plan(hop, tokens, experts)
    y = _one_round(hop, tokens, wanted, 0, experts, x, weights, parameters)
    return _further_rounds(hop, tokens, wanted, capacity, experts, (x, weights, parameters), y)


def _forward(hop, tokens, x, weights, parameters, experts):
    wanted, capacity = _plan(hop, tokens, experts)
    first = partial(_one_round, hop, tokens, wanted, 0, experts)
    y, vjp = jax.vjp(first, x, weights, parameters)
    arguments = (x, weights, parameters)
    y = _further_rounds(hop, tokens, wanted, capacity, experts, arguments, y)
    return y, (vjp, arguments, experts)


def _backward(hop, tokens, residuals, d_y):
    vjp, arguments, experts = residuals
    wanted, capacity = _plan(hop, tokens, experts)
    gradients = vjp(d_y)
    if capacity < wanted.shape[0]:

        def add_round(index, gradients):
            of_round = partial(_one_round, hop, tokens, wanted, index, experts)
            return jax.tree.map(jnp.add, gradients, jax.vjp(of_round, *arguments)[1](d_y))

        gradients = jax.lax.fori_loop(1, _rounds(hop, wanted, capacity), add_round, gradients)
    return *gradients, None


_exchange.defvjp(_forward, _backward)


def _plan(hop: Exchange, tokens: int, experts: Int[Array, "rows top_k"]):
    wanted = wanted_by(experts, hop.peers, hop.experts_per_peer)
    return wanted, hop.capacity(experts.shape[0], tokens)


def _rounds(hop: Exchange, wanted, capacity: int) -> Int[Array, ""]:
    return jax.lax.pmax(rounds_needed(wanted, capacity), hop.agree_on)


def _further_rounds(hop, tokens, wanted, capacity, experts, arguments, y):
    if capacity >= wanted.shape[0]:  # everything fits into one
        return y

    def add_round(index, y):
        return y + _one_round(hop, tokens, wanted, index, experts, *arguments)

    return jax.lax.fori_loop(1, _rounds(hop, wanted, capacity), add_round, y)


def _one_round(hop, tokens, wanted, index, experts, x, weights, parameters):
    """What the rows of one round add to the result."""
    plan = plan_round(wanted, index, hop.capacity(x.shape[0], tokens))
    with jax.named_scope("dispatch"):
        # x[T_local, D] -> rows[peers * C, D], each from the peer of that number
        there = [_swap(hop, _to_slots(a, plan)) for a in (x, weights)]
        experts_sent = _take_rows(experts, plan.slot_row, NO_EXPERT)
        by_peer = jnp.arange(hop.peers, dtype=experts.dtype)[:, None, None]
        experts_there = _swap(hop, localise(experts_sent, by_peer, hop.experts_per_peer))
    rows, row_weights, row_experts = (a.reshape(-1, a.shape[-1]) for a in (*there, experts_there))
    done = hop.inner(rows, row_experts, row_weights, parameters, tokens)
    with jax.named_scope("combine"):
        # y[peers * C, D] -> y[T_local, D], the sum over peers
        returned = _swap(hop, done.reshape(hop.peers, -1, done.shape[-1]))
        return _from_slots(returned, plan)


def _swap(hop: Exchange, rows: Array) -> Array:
    """all_to_all of [peers, capacity, ...]."""
    return jax.lax.all_to_all(rows, hop.axes, split_axis=0, concat_axis=0, tiled=True)


def _take_rows(x: Array, slot_row: Int[Array, "peers capacity"], fill: float) -> Array:
    filler = jnp.full((1, x.shape[1]), fill, x.dtype)
    return jnp.concatenate([x, filler])[slot_row]


@jax.custom_vjp
def _to_slots(
    x: Float[Array, "rows width"], plan: RoundPlan
) -> Float[Array, "peers capacity width"]:
    """Each slot's row, zero where there is none; its transpose is `_from_slots`."""
    return _take_rows(x, plan.slot_row, 0)


@jax.custom_vjp
def _from_slots(
    slots: Float[Array, "peers capacity width"], plan: RoundPlan
) -> Float[Array, "rows width"]:
    """Each row's sum over its slots, one gather a peer; its transpose is `_to_slots`."""
    flat = slots.reshape(-1, slots.shape[-1])
    padded = jnp.concatenate([flat, jnp.zeros((1, flat.shape[1]), flat.dtype)])
    total = padded[plan.row_slot[:, 0]]
    for peer in range(1, plan.row_slot.shape[1]):
        total += padded[plan.row_slot[:, peer]]
    return total


_to_slots.defvjp(
    lambda x, plan: (_to_slots(x, plan), plan),
    lambda plan, d_slots: (_from_slots(d_slots, plan), None),
)
_from_slots.defvjp(
    lambda slots, plan: (_from_slots(slots, plan), plan),
    lambda plan, d_rows: (_to_slots(d_rows, plan), None),
)
