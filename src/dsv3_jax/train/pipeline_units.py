"""One unit of a stage (a layer, the final norm, an MTP module): forward, and backward in parts.

Backward works from what forward kept (parallel/tape.py), so that a micro-batch may wait between
them. A unit's weights are a row of the rank's stacked weights (train/pipeline_weights.py).

A unit has four parts, of which two transfer and two compute. Where one micro-batch's forward and
another's backward meet, part after part is done of both, backward from its end:

    forward     attend    dispatch   compute     combine
    backward    combine'  compute'   dispatch'   attend'

So each one's transfers are under the other's products: the order of DeepSeek's own profile
(github.com/deepseek-ai/profile-data, train). XLA's scheduler finds what covers what within a part;
a barrier between the parts keeps it from using up early what later transfers need. Weight gradients
are outside of the barriers.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.model.rope import Rotary, rotary
from dsv3_jax.parallel.pipeline.stages import UnitKind
from dsv3_jax.parallel.tape import Inputs, Player, Recorder, Tape
from dsv3_jax.quant.scaled_array import joined, trained, untrained, with_handles
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.pipeline_weights import RankWeights, rows_of_state

INPUT = "x"
"""The name under which a unit's input is kept."""
GROUPS = {
    UnitKind.DENSE: ("block", "dense"),
    UnitKind.MOE: ("block", "moe"),
    UnitKind.MTP: ("block", "moe", "mtp"),
}


STACKS = {
    UnitKind.DENSE: "dense_layers",
    UnitKind.MOE: "moe_layers",
    UnitKind.MTP: "mtp",
}
PARTS = 4
Part = Callable[[RankWeights, Any], Any]
"""From weights and what the part before gave to what the next one gets."""


class Mode(enum.IntEnum):
    """How much of backward."""

    FULL = 0
    INPUT = 1
    """The gradient of the input, and the dy of every late product."""
    WEIGHT = 2
    """The weight gradients of the late products."""


class MicroBatch(NamedTuple):
    """What units read of a micro-batch beside the hidden states."""

    documents: Int[Array, "batch seq"] | None
    ahead: Float[Array, "depths batch seq hidden"]
    """Embeddings of the tokens 1, 2, ... ahead; real in the last stage alone."""


class UnitOutput(NamedTuple):
    y: Float[Array, "batch seq hidden"]
    balance_loss: Float[Array, ""]
    load: Float[Array, " experts"]


class Rows(NamedTuple):
    """Where a unit's weights are: its row, and that of its dense MLP."""

    block: Int[Array, ""]
    dense: Int[Array, ""]


class Forward(NamedTuple):
    """A unit to be run; `bias` is its router's selection bias."""

    kind: int
    weights: RankWeights
    bias: Float[Array, " experts"]
    x: Float[Array, "batch seq hidden"]
    micro_batch: MicroBatch


class Backward(NamedTuple):
    """A unit whose gradients are wanted, all of them, but for the products in `probes` their dy in
    place of the weight gradient."""

    kind: int
    weights: RankWeights
    bias: Float[Array, " experts"]
    saved: dict[str, Array]
    """What its forward kept."""
    micro_batch: MicroBatch
    gradient: tuple[Float[Array, "batch seq hidden"], Float[Array, ""]]
    """Of the output and of the balance loss."""
    probes: dict[str, jax.ShapeDtypeStruct]


class UnitGradients(NamedTuple):
    """Of a unit's weights, input, embeddings ahead, and the dy of late products."""

    weights: RankWeights
    x: Float[Array, "batch seq hidden"]
    ahead: Float[Array, "depths batch seq hidden"]
    products: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Units:
    """The model's units on one rank of a pipeline, inside shard_map.

    `kept` are names of tensors that a forward hands to its backward, `rounded` those of them that
    it rounds for that; `late` are names of products whose weight gradients a split backward leaves
    for later.
    """

    layout: Layout
    kept: frozenset[str]
    late: frozenset[str]
    rounded: frozenset[str] = frozenset()

    @property
    def depths(self) -> int:
        return self.layout.config.model.num_nextn_predict_layers

    @property
    def angles(self) -> Rotary:
        return rotary(self.layout.config.model, jnp.arange(self.layout.config.data.seq_len)[None])

    def weights_at(self, weights: RankWeights, kind: int, rows: Rows) -> RankWeights:
        """The weights of the unit of this `kind` at `rows`."""
        if kind == UnitKind.NORM:
            return {"whole": {("norm", "weight"): weights["whole"]["norm", "weight"]}}
        at = {"block": rows.block, "moe": rows.block, "dense": rows.dense}
        at["mtp"] = jnp.int32(kind - UnitKind.MTP)
        return {
            group: jax.tree.map(
                lambda leaf, i=at[group]: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False),
                weights[group],
            )
            for group in GROUPS[UnitKind(min(kind, UnitKind.MTP))]
        }

    def add_gradients(
        self, total: RankWeights, gradients: RankWeights, kind: int, rows: Rows
    ) -> RankWeights:
        """`total` (FP32) with a unit's gradients added at its rows."""
        at = {"block": rows.block, "moe": rows.block, "dense": rows.dense}
        at["mtp"] = jnp.int32(kind - UnitKind.MTP)

        def add(group, leaf, gradient):
            if group == "whole":
                return leaf + gradient.astype(leaf.dtype)
            row = at[group]
            sum_of_row = jax.lax.dynamic_index_in_dim(leaf, row) + gradient[None].astype(leaf.dtype)
            return jax.lax.dynamic_update_index_in_dim(leaf, sum_of_row, row, 0)

        return total | {
            group: total[group]
            | {name: add(group, total[group][name], g) for name, g in of_group.items()}
            for group, of_group in gradients.items()
        }

    def parts(self, of: Forward | Backward, tape: Tape) -> tuple[Part, ...]:
        """attend, dispatch, compute, combine: from (x, embeddings ahead) to a `UnitOutput`."""
        kind, bias, documents = of.kind, of.bias, of.micro_batch.documents
        experts = self.layout.config.model.n_routed_experts
        nothing = jnp.zeros((), jnp.float32), jnp.zeros((experts,), jnp.float32)
        if kind == UnitKind.NORM:

            def norm(weights, entering):
                return UnitOutput(self._module("norm", weights, bias)(entering[0]), *nothing)

            return norm, *[lambda weights, output: output] * 3
        stack = STACKS[UnitKind(min(kind, UnitKind.MTP))]

        def block_of(weights):
            module = self._module(stack, weights, bias)
            return module.block if kind >= UnitKind.MTP else module

        def attend(weights, entering):
            (x, ahead), valid = entering, None
            if kind >= UnitKind.MTP:
                depth = kind - UnitKind.MTP + 1
                x = self._module(stack, weights, bias).join(x, ahead[depth - 1], tape)
                valid = x.shape[1] - depth
            state = block_of(weights).attend(x, self.angles, documents, valid, tape)
            return state._replace(latent=None)

        def combine(weights, state):
            y, _, _, statistics, *_ = block_of(weights).combine(state)
            if kind >= UnitKind.MTP:
                y = self._module(stack, weights, bias).shared_head.norm(y)
            if statistics is None:
                return UnitOutput(y, *nothing)
            return UnitOutput(y, statistics.balance_loss, statistics.load)

        return (
            attend,
            lambda weights, state: block_of(weights).dispatch(state, tape),
            lambda weights, state: block_of(weights).compute(state, tape),
            combine,
        )

    def _module(self, name: str, weights: RankWeights, bias: Array) -> Any:
        """The module `name` of the model, one layer of it, with these weights."""
        layout = self.layout
        params = rows_of_state(layout.abstract.params[name], weights, name)
        biases = layout.abstract.selection_bias
        of_router = jax.tree.map(lambda _: bias, biases[name]) if name in biases else nnx.State({})
        return nnx.merge(layout.graph_of(name), params, of_router)

    def run(
        self, forward: Forward | None, backward: Backward | None
    ) -> tuple[tuple[UnitOutput, Recorder] | None, UnitGradients | None]:
        """What there is to do, part by part: the output with what was recorded (the input is among
        what is kept), and the gradients."""
        state: Any = None
        gradient: Any = None
        parts, pulls, of_weights = (), [], []
        tape = Recorder(self.kept)
        if forward is not None:
            tape.saved[INPUT] = forward.x
            parts, state = self.parts(forward, tape), (forward.x, forward.micro_batch.ahead)
        if backward is not None:
            pulls = self._pulls(backward)
            gradient = UnitOutput(*backward.gradient, jnp.zeros_like(backward.bias))
        for number in range(PARTS):
            if forward is not None:
                state = parts[number](forward.weights, state)
            if backward is not None:
                *found, gradient = pulls[PARTS - 1 - number](gradient)
                of_weights.append(tuple(found))
            if forward is not None and backward is not None and number < PARTS - 1:
                state, gradient = _meet(state, gradient)
        made = None if forward is None else (state, tape)
        if backward is None:
            return made, None
        weights, products = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *of_weights)
        d_x, d_ahead = gradient
        return made, UnitGradients(weights, d_x, d_ahead, products)

    def _saved(self, of: Backward) -> dict[str, Array]:
        """What backward reads. An MTP module has a norm after its layer: nothing that was rounded
        may stand in for what leads to that."""
        if of.kind < UnitKind.MTP or not self.rounded:
            return of.saved
        return {k: v for k, v in of.saved.items() if k.split(":")[0] not in self.rounded}

    def _pulls(self, of: Backward) -> list[Callable]:
        """For each part, from the gradient of what it gives to those of weights, probes and what it
        gets."""
        zeros = jax.tree.map(lambda probe: jnp.zeros(probe.shape, probe.dtype), of.probes)
        fixed, weights = untrained(of.weights), trained(with_handles(of.weights))
        saved = self._saved(of)
        state, pulls = (saved[INPUT], of.micro_batch.ahead), []
        for number in range(PARTS):

            def part(weights, probes, state, number=number):
                weights = joined(fixed, weights)
                return self.parts(of, Player(saved, probes))[number](weights, state)

            state, pull = jax.vjp(part, weights, zeros, state)
            pulls.append(pull)
        return pulls

    def weight_backward(
        self,
        of: Backward,
        products: dict[str, Array],
    ) -> RankWeights:
        """The weight gradients of late products, from their dy."""

        fixed, weights = untrained(of.weights), trained(with_handles(of.weights))
        saved = self._saved(of)

        def outputs(weights):
            weights = joined(fixed, weights)
            tape = Inputs(saved, frozenset(products))
            state = (saved[INPUT], of.micro_batch.ahead)
            for part in self.parts(of, tape):
                state = part(weights, state)
            return tape.outputs

        return jax.vjp(outputs, weights)[1](products)[0]


def _meet[S, G](state: S, gradient: G) -> tuple[S, G]:
    """Both, when both are there; what belongs to parameters is not waited for."""
    leaves, structure = jax.tree.flatten_with_path((state, gradient))
    waits = [
        not any(getattr(key, "name", "") == "parameters" for key in path)
        and leaf.dtype != jax.dtypes.float0
        for path, leaf in leaves
    ]
    values = [leaf for _, leaf in leaves]
    met = iter(jax.lax.optimization_barrier([v for v, w in zip(values, waits, strict=True) if w]))
    values = [next(met) if w else v for v, w in zip(values, waits, strict=True)]
    return jax.tree.unflatten(structure, values)
