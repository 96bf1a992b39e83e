"""Rows to the devices of their experts and back, inside shard_map: exact for any routing.

An `Exchange` sends every row once to each peer that holds any of its experts, lets `inner` work
there, sends the results back and adds them up. One over (node, gpu) is a flat dispatch; one over
node with one over gpu inside is DeepSeek's two hops: a token crosses to a node once, to the GPU of
the sender's own index, and spreads inside the node from there; on the way back the partial sums of
a node are added before they cross.

    source --node--> same index on each node --gpu--> experts' GPUs
           <-- sum --                        <-- sum --

Buffers hold `capacity` rows a peer. What does not fit goes in further rounds of the same program,
as many as the fullest sender of all needs (one flag, a pmax). Backward repeats the further rounds;
only the first, the usual one, keeps anything for it.

Source: DeepSeek-V3 Technical Report §3.2.2 (two hops), §2.1.2 (node-limited routing).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.parallel.exchange_plan import (
    NO_EXPERT,
    RoundPlan,
    localise,
    plan_round,
    rounds_needed,
    wanted_by,
)
from dsv3_jax.parallel.tape import AUTODIFF, Tape


@runtime_checkable
class ExpertFunction(Protocol):
    """sum_k weight_k * expert_k(x) over the experts that are here; a hashable value.

    `is_further` says that most rows are empty: those of a further round.
    """

    def __call__(
        self,
        x: Float[Array, "rows hidden"],
        experts: Int[Array, "rows top_k"],
        weights: Float[Array, "rows top_k"],
        parameters: Any,
        tokens: int,
        tape: Tape = AUTODIFF,
        is_further: bool = False,
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

    def __call__(self, x, experts, weights, parameters, tokens, tape=AUTODIFF, is_further=False):
        wanted, operands = self.wanted(experts), (x, weights, parameters)
        if is_further:  # one loop is the smallest program for what is rare
            return _rounds_from(0, self, tokens, operands, experts)[0]
        if self.capacity(x.shape[0], tokens) >= x.shape[0]:  # everything fits into one round
            return _one_round(self, tokens, wanted, 0, experts, operands, tape)
        y, operands = _rounds_from(1, self, tokens, operands, experts)
        return y + _one_round(self, tokens, wanted, 0, experts, operands, tape)

    def wanted(self, experts: Int[Array, "rows top_k"]) -> Bool[Array, "rows peers"]:
        return wanted_by(experts, self.peers, self.experts_per_peer)

    def capacity(self, rows: int, tokens: int) -> int:
        """Rows of one peer's buffer: a multiple of 8, at most all."""
        wanted = self.capacity_factor * self.rows_a_token * tokens
        return min(rows, -(-int(wanted + 1) // 8) * 8)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _rounds_from(first, hop, tokens, operands, experts):
    """What the rounds from `first` on add, as many as the fullest sender needs, and the operands.

    Passed on, they bring the first round's gradients here in backward, to which these add theirs.
    """
    wanted = hop.wanted(experts)

    def add_round(index, y):
        return y + _one_round(hop, tokens, wanted, index, experts, operands, is_further=True)

    y = jax.lax.fori_loop(
        first, _rounds(hop, wanted, tokens), add_round, jnp.zeros_like(operands[0])
    )
    return y, operands


def _forward(first, hop, tokens, operands, experts):
    return _rounds_from(first, hop, tokens, operands, experts), (operands, experts)


def _backward(first, hop, tokens, residuals, gradients):
    operands, experts = residuals
    d_y, d_operands = gradients
    wanted = hop.wanted(experts)

    def add_round(index, gradients):
        of_round = partial(_one_round, hop, tokens, wanted, index, experts, is_further=True)
        return jax.tree.map(jnp.add, gradients, jax.vjp(of_round, operands)[1](d_y)[0])

    d_operands = jax.lax.fori_loop(first, _rounds(hop, wanted, tokens), add_round, d_operands)
    return d_operands, None


_rounds_from.defvjp(_forward, _backward)


def _rounds(hop: Exchange, wanted: Bool[Array, "rows peers"], tokens: int) -> Int[Array, ""]:
    needed = rounds_needed(wanted, hop.capacity(wanted.shape[0], tokens))
    return jax.lax.pmax(needed, hop.agree_on)


def _one_round(hop, tokens, wanted, index, experts, operands, tape=AUTODIFF, is_further=False):
    """What the rows of one round add to the result."""
    x, weights, parameters = operands
    plan = plan_round(wanted, index, hop.capacity(x.shape[0], tokens))
    axis = hop.axes[-1]
    with jax.named_scope("dispatch"):
        # x[T_local, D] -> rows[peers * C, D], each from the peer of that number
        rows, row_weights = (_swap(hop, _to_slots(a, plan)) for a in (x, weights))
        experts_sent = _take_rows(experts, plan.slot_row, NO_EXPERT)
        by_peer = jnp.arange(hop.peers, dtype=experts.dtype)[:, None, None]
        row_experts = _swap(hop, localise(experts_sent, by_peer, hop.experts_per_peer))
    rows = tape.keep(f"{axis}_rows", rows.reshape(-1, rows.shape[-1]))
    row_weights = tape.keep(f"{axis}_weights", row_weights.reshape(-1, weights.shape[-1]))
    row_experts = tape.keep(f"{axis}_experts", row_experts.reshape(-1, experts.shape[-1]))
    done = hop.inner(rows, row_experts, row_weights, parameters, tokens, tape, is_further)
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
