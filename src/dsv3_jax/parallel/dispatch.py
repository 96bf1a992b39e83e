"""Rows to the devices of their experts and back, inside shard_map: exact for any routing.

An `Exchange` sends every row once to each peer that holds any of its experts, lets `inner` work
there, sends the results back and adds them up. One over (node, gpu) is a flat dispatch; one over
node with one over gpu inside is DeepSeek's two hops: a token crosses to a node once, to the GPU of
the sender's own index, and spreads inside the node from there; on the way back the partial sums of
a node are added before they cross.

    source --node--> same index on each node --gpu--> experts' GPUs
           <-- sum --                        <-- sum --

Which row goes where is sent ahead, hop by hop (`Route`); then the rows, with their routing weights
as further columns, so that each hop is one transfer each way. Both ways may be in fewer bits
(parallel/wire.py).

Buffers hold `capacity` rows a peer. What does not fit goes in further rounds of the same program.
One number on which all devices agree (a pmax) says how many: none, as a rule. They come after the
first round, forward and backward, so that nothing stands between the transfers of the first one and
what they wait for; backward repeats them, and only the first round keeps anything for it.

Source: DeepSeek-V3 Technical Report §3.2.2 (two hops), §2.1.2 (node-limited routing).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
from dsv3_jax.parallel.wire import AS_IS, UNCHANGED, Packing, Wire
from dsv3_jax.quant.formats import Codec
from dsv3_jax.quant.scaled_array import joined, trained, untrained
from dsv3_kernels.permute.op import sum_rows, take_rows


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


@runtime_checkable
class Dispatcher(Protocol):
    """Brings tokens to their experts, has them computed, brings the sums back. All transfers are in
    the first and the last of these.

    What a part gives the next is a pytree: a pipeline may have something else done between them.
    """

    def dispatch(
        self,
        x: Float[Array, "tokens hidden"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        parameters: Any,
        tape: Tape = AUTODIFF,
    ) -> tuple["Sent", Any]:
        """What has come here, and the parameters to compute with."""
        ...

    def compute(self, sent: "Sent", parameters: Any, tape: Tape = AUTODIFF) -> "Sent":
        """Each row's sum over the experts that are here, in place of the row."""
        ...

    def combine(self, sent: "Sent", parameters: Any) -> Float[Array, "tokens hidden"]:
        """Each token's sum over all its experts."""
        ...


class Route(NamedTuple):
    """The first round of a hop: its plan, and the experts (as numbered here) of rows that come."""

    plan: RoundPlan
    experts: Int[Array, "rows top_k"]


class Further(NamedTuple):
    """The rounds beyond the first one of all hops: how many of the first hop may be needed, and the
    zeros by which their gradients find their way (`_mark`)."""

    count: Int[Array, ""]
    zeros: tuple[Float[Array, "tokens hidden"], Float[Array, "tokens hidden"]]


class Sent(NamedTuple):
    """A dispatch under way."""

    rows: Float[Array, "rows width"]
    """What is here now: rows with their routing weights as the last columns, later their sums."""
    experts: Int[Array, "tokens top_k"]
    source: Float[Array, "tokens hidden_and_top_k"] | None = None
    """What the rows were at the sender, for further rounds."""
    routes: tuple[Route, ...] = ()
    """One of every hop."""
    further: Further | None = None
    """None where everything fits into the first round."""


@dataclass(frozen=True)
class Exchange:
    """`inner` on the devices of `axes`, of which peer p holds experts p*n to p*n + n - 1.

    `rows_a_token` is how many rows a peer is expected to get for each token of this device;
    `capacity_factor` times that is the size of a buffer. `wire` is what rows and sums travel in,
    `kept` how rows that came wait for backward. `agree_on` are the axes of all collectives in
    here, `inner`'s too. A `Dispatcher`.
    """

    axes: tuple[str, ...]
    peers: int
    experts_per_peer: int
    rows_a_token: float
    capacity_factor: float
    agree_on: tuple[str, ...]
    inner: "ExpertFunction | Exchange"
    wire: Wire = UNCHANGED
    kept: Packing = AS_IS

    @property
    def hops(self) -> tuple["Exchange", ...]:
        """This one and those within."""
        return (self, *(self.inner.hops if isinstance(self.inner, Exchange) else ()))

    def dispatch(self, x, experts, weights, parameters, tape=AUTODIFF):
        rows, tokens = join_weights(x, weights), x.shape[0]
        routes, needed = self._routes(experts, tape)
        sent = Sent(rows, experts, None, routes)
        if self._may_overflow(tokens):
            rounds = jax.lax.pmax(jnp.stack(needed), self.agree_on)
            count = tape.keep("rounds", jnp.where(jnp.any(rounds > 1), rounds[0], 0))
            operands, span = (rows, trained(parameters)), (jnp.bool(True), count)
            fixed = experts, untrained(parameters)
            (rows, of_rows), (of_trained, of_parameters) = (
                _mark(self, tokens, which, operands, fixed, span) for which in (0, 1)
            )
            parameters = joined(fixed[1], of_trained)
            sent = Sent(rows, experts, rows, routes, Further(count, (of_rows, of_parameters)))
        for hop, route in zip(self.hops, routes, strict=True):
            came = _send_rows(hop, experts.shape[1], rows, route.plan)
            rows = self._keep(f"{hop.axes[-1]}_rows", came, experts.shape[1], tape)
        return sent._replace(rows=rows), parameters

    def compute(self, sent, parameters, tape=AUTODIFF):
        experts, tokens = sent.routes[-1].experts, sent.experts.shape[0]
        x, weights = split_weights(sent.rows, experts)
        experts_here = self.hops[-1].inner
        assert not isinstance(experts_here, Exchange)  # the last hop's
        done = experts_here(x, experts, weights, parameters, tokens, tape)
        return sent._replace(rows=done)

    def combine(self, sent, parameters):
        done, tokens = sent.rows, sent.experts.shape[0]
        for hop, route in reversed(list(zip(self.hops, sent.routes, strict=True))):
            done = _send_back(hop, 0, done, route.plan)
        if sent.further is None:
            return done
        operands = jax.tree.map(jax.lax.stop_gradient, (sent.source, trained(parameters)))
        fixed, span = (sent.experts, untrained(parameters)), (jnp.bool(True), sent.further.count)
        return _add_further(self, tokens, done, sent.further.zeros, operands, fixed, span)

    def _keep(self, name: str, rows: Float[Array, "rows width"], extra: int, tape: Tape) -> Array:
        """`rows`, of which the last `extra` columns are their weights."""
        kept = self.kept
        codec = Codec(
            kept.name,
            ("",),
            lambda x: (kept.pack(x, extra),),
            lambda arrays, dtype: kept.unpack(arrays[0], extra, dtype),
        )
        return tape.keep(name, rows, codec)

    def _routes(
        self, experts: Int[Array, "rows top_k"], tape: Tape
    ) -> tuple[tuple[Route, ...], list[Int[Array, ""]]]:
        """The first round of every hop, and the rounds that this device's rows need in each."""
        routes, needed, tokens = [], [], experts.shape[0]
        for hop in self.hops:
            wanted = hop.wanted(experts)
            capacity = hop.capacity(experts.shape[0], tokens)
            needed.append(rounds_needed(wanted, capacity))
            plan = plan_round(wanted, 0, capacity, experts.shape[1])
            experts = tape.keep(f"{hop.axes[-1]}_experts", _send_experts(hop, experts, plan))
            routes.append(Route(plan, experts))
        return tuple(routes), needed

    def wanted(self, experts: Int[Array, "rows top_k"]) -> Bool[Array, "rows peers"]:
        return wanted_by(experts, self.peers, self.experts_per_peer)

    def capacity(self, rows: int, tokens: int) -> int:
        """Rows of one peer's buffer: a multiple of 8, at most all."""
        wanted = self.capacity_factor * self.rows_a_token * tokens
        return min(rows, -(-int(wanted + 1) // 8) * 8)

    def _may_overflow(self, tokens: int) -> bool:
        """Whether some routing needs more than one round in some hop."""
        rows = tokens
        for hop in self.hops:
            capacity = hop.capacity(rows, tokens)
            if capacity < rows:
                return True
            rows = hop.peers * capacity
        return False


def join_weights(
    x: Float[Array, "rows hidden"], weights: Float[Array, "rows top_k"]
) -> Float[Array, "rows hidden_and_top_k"]:
    """Rows with their routing weights as the last columns: one transfer for both."""
    return jnp.concatenate([x, weights], axis=-1)


def split_weights(
    rows: Float[Array, "rows hidden_and_top_k"], experts: Int[Array, "rows top_k"]
) -> tuple[Float[Array, "rows hidden"], Float[Array, "rows top_k"]]:
    """Rows and their routing weights."""
    hidden = rows.shape[-1] - experts.shape[-1]
    return rows[:, :hidden], rows[:, hidden:]


# Further rounds: everything but the first round of all hops.
#
# In forward they come after it (`_add_further`). In backward they do as well: `_mark` stands before
# the first round, so its backward rule is called when the first round's gradients are there, and
# adds theirs in place. What it needs for that, the gradient of the result, comes to it by a zero.

Operands = tuple[Float[Array, "rows hidden_and_top_k"], Any]
"""Rows, and what is trained of the experts' parameters."""
Fixed = tuple[Int[Array, "rows top_k"], Any]
"""The rows' experts, and the rest of the parameters."""
Span = tuple[Bool[Array, ""], Int[Array, ""]]
"""Whether the first round of all hops has been, and rounds of this hop until all is served."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add_further(hop, tokens, y, zeros, operands: Operands, fixed: Fixed, span: Span):
    """`y` and what the further rounds add. Its gradient goes on to `y`, and to the `zeros`."""
    del zeros
    has_begun, count = span

    def add_round(index, y):
        return y + _further_round(hop, tokens, index, has_begun, operands, fixed)

    return jax.lax.fori_loop(_first_index(hop, has_begun), count, add_round, y)


_add_further.defvjp(
    lambda *arguments: (_add_further(*arguments), None),
    lambda hop, tokens, _, d_y: (d_y, (d_y, d_y), None, None, None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mark(hop, tokens, which, operands: Operands, fixed: Fixed, span: Span):
    """operands[which] for the first round, and the zero for `_add_further`.

    Rows and parameters each have a loop of their own in backward, so that the gradients of the
    parameters keep nobody waiting.
    """
    del hop, tokens, span
    return operands[which], jnp.zeros_like(split_weights(operands[0], fixed[0])[0])


def _mark_forward(hop, tokens, which, operands, fixed, span):
    return _mark(hop, tokens, which, operands, fixed, span), (operands, fixed, span)


def _mark_backward(hop, tokens, which, residuals, gradients):
    operands, fixed, (has_begun, count) = residuals
    first_gradients, d_y = gradients

    def add_round(index, gradients):
        def of_round(operand):
            changed = (operand, operands[1]) if which == 0 else (operands[0], operand)
            return _further_round(hop, tokens, index, has_begun, changed, fixed)

        return jax.tree.map(jnp.add, gradients, jax.vjp(of_round, operands[which])[1](d_y)[0])

    first = _first_index(hop, has_begun)
    found = jax.lax.fori_loop(first, count, add_round, first_gradients)
    return ((found, None) if which == 0 else (None, found)), None, None


_mark.defvjp(_mark_forward, _mark_backward)


def _first_index(hop: Exchange, has_begun: Bool[Array, ""]) -> Int[Array, ""]:
    """Round 0 of the last hop has been; round 0 of another one has to be gone through again for
    what is left over further in."""
    return (has_begun & (len(hop.hops) == 1)).astype(jnp.int32)


def _further_round(hop, tokens, index, has_begun, operands: Operands, fixed: Fixed):
    """What round `index` adds, but for the first round of all hops if that has been."""
    (rows, of_trained), (experts, rest) = operands, fixed
    capacity = hop.capacity(experts.shape[0], tokens)
    plan = plan_round(hop.wanted(experts), index, capacity, experts.shape[1])
    experts = _send_experts(hop, experts, plan)
    rows = _send_rows(hop, experts.shape[1], rows, plan)
    x, weights = split_weights(rows, experts)
    if isinstance(hop.inner, Exchange):
        inner, operands, fixed = hop.inner, (rows, of_trained), (experts, rest)
        needed = rounds_needed(inner.wanted(experts), inner.capacity(experts.shape[0], tokens))
        span = has_begun & (index == 0), jax.lax.pmax(needed, inner.agree_on)
        (_, of_rows), (_, of_parameters) = (
            _mark(inner, tokens, which, operands, fixed, span) for which in (0, 1)
        )
        zeros, constants = (of_rows, of_parameters), jax.tree.map(jax.lax.stop_gradient, operands)
        # Nothing uses the marked operands, whose gradients so begin at zero.
        done = _add_further(inner, tokens, jnp.zeros_like(x), zeros, constants, fixed, span)
    else:
        parameters = joined(rest, of_trained)
        done = hop.inner(x, experts, weights, parameters, tokens, is_further=True)
    return _send_back(hop, 0, done, plan)


# One hop


def _send_experts(hop: Exchange, experts: Int[Array, "rows top_k"], plan: RoundPlan) -> Array:
    """Of the rows that come, this device's experts by its own numbers: [peers * capacity, K]."""
    nobody = jnp.full((1, experts.shape[1]), NO_EXPERT, experts.dtype)
    chosen = jnp.concatenate([experts, nobody])[plan.slot_row]
    by_peer = jnp.arange(hop.peers, dtype=experts.dtype)[:, None, None]
    return _swap(hop, localise(chosen, by_peer, hop.experts_per_peer))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send_rows(
    hop: Exchange, extra: int, rows: Float[Array, "rows width"], plan: RoundPlan
) -> Float[Array, "slots width"]:
    """The rows that come, of which the last `extra` columns are not to be rounded."""
    return _out(hop, extra, rows, plan)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _send_back(
    hop: Exchange, extra: int, rows: Float[Array, "slots width"], plan: RoundPlan
) -> Float[Array, "rows width"]:
    """Each row's sum over the peers that it went to; its transpose is `_send_rows`."""
    return _back(hop, extra, rows, plan)


_send_rows.defvjp(
    lambda hop, extra, rows, plan: (_out(hop, extra, rows, plan), plan),
    lambda hop, extra, plan, d_rows: (_back(hop, extra, d_rows, plan), None),
)
_send_back.defvjp(
    lambda hop, extra, rows, plan: (_back(hop, extra, rows, plan), plan),
    lambda hop, extra, plan, d_rows: (_out(hop, extra, d_rows, plan), None),
)


def _out(hop: Exchange, extra: int, rows: Array, plan: RoundPlan) -> Array:
    # x[T_local, W] -> rows[peers * C, W], each from the peer of that number
    packing = hop.wire.dispatch
    packed = take_rows(packing.pack(rows, extra), plan.slot_row)
    return packing.unpack(_swap(hop, packed), extra, rows.dtype)


def _back(hop: Exchange, extra: int, rows: Array, plan: RoundPlan) -> Array:
    # y[peers * C, D] -> y[T_local, D], the sum over peers
    packing = hop.wire.combine
    packed = packing.pack(rows, extra)
    swapped = _swap(hop, packed.reshape(hop.peers, -1, packed.shape[-1]))
    return sum_rows(packing.unpack(swapped, extra, rows.dtype), plan.row_slot)


def _swap(hop: Exchange, rows: Array) -> Array:
    """all_to_all of [peers, capacity, width], as [peers * capacity, width]."""
    swapped = jax.lax.all_to_all(rows, hop.axes, split_axis=0, concat_axis=0, tiled=True)
    return swapped.reshape(-1, rows.shape[-1])
