"""One unit of a stage (a layer, the final norm, an MTP module): forward, and backward in parts.

Backward works from what forward kept (parallel/tape.py), so that a micro-batch may wait between
them. A unit's weights are a row of the rank's stacked weights (train/pipeline_weights.py).
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.model.block import Block
from dsv3_jax.model.rope import Rotary, rotary
from dsv3_jax.parallel.pipeline.stages import UnitKind
from dsv3_jax.parallel.tape import Inputs, Player, Recorder, Tape
from dsv3_jax.train.layout import Layout
from dsv3_jax.train.pipeline_weights import RankWeights, rows_of_state

INPUT = "x"
"""The name under which a unit's input is kept."""
GROUPS = {
    UnitKind.DENSE: ("block", "dense"),
    UnitKind.MOE: ("block", "moe"),
    UnitKind.MTP: ("block", "moe", "mtp"),
}


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


class UnitGradients(NamedTuple):
    """Of a unit's weights, input, embeddings ahead, and the dy of late products."""

    weights: RankWeights
    x: Float[Array, "batch seq hidden"]
    ahead: Float[Array, "depths batch seq hidden"]
    products: dict[str, Array]


@dataclass(frozen=True, eq=False)
class Units:
    """The model's units on one rank of a pipeline, inside shard_map.

    `kept` are names of tensors that a forward hands to its backward, `late` names of products whose
    weight gradients a split backward leaves for later.
    """

    layout: Layout
    kept: frozenset[str]
    late: frozenset[str]

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
            group: {
                name: jax.lax.dynamic_index_in_dim(leaf, at[group], keepdims=False)
                for name, leaf in weights[group].items()
            }
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

    def apply(
        self,
        kind: int,
        weights: RankWeights,
        bias: Float[Array, " experts"],
        x: Float[Array, "batch seq hidden"],
        micro_batch: MicroBatch,
        tape: Tape,
    ) -> UnitOutput:
        """The unit itself; `bias` is its router's selection bias."""
        experts = self.layout.config.model.n_routed_experts
        nothing = jnp.zeros((), jnp.float32), jnp.zeros((experts,), jnp.float32)
        if kind == UnitKind.NORM:
            module = self._module("norm", weights, bias)
            return UnitOutput(module(x), *nothing)
        documents = micro_batch.documents
        if kind >= UnitKind.MTP:
            depth, seq = kind - UnitKind.MTP + 1, x.shape[1]
            arguments = (x, micro_batch.ahead[depth - 1], self.angles, documents, seq - depth, tape)
            y, statistics = self._module("mtp", weights, bias)(*arguments)
        else:
            stack = "dense_layers" if kind == UnitKind.DENSE else "moe_layers"
            block: Block = self._module(stack, weights, bias)
            y, _, statistics = block(x, self.angles, documents, None, tape)
        if statistics is None:
            return UnitOutput(y, *nothing)
        return UnitOutput(y, statistics.balance_loss, statistics.load)

    def _module(self, name: str, weights: RankWeights, bias: Array) -> Any:
        """The module `name` of the model, one layer of it, with these weights."""
        layout = self.layout
        params = rows_of_state(layout.abstract.params[name], weights, name)
        biases = layout.abstract.selection_bias
        of_router = jax.tree.map(lambda _: bias, biases[name]) if name in biases else nnx.State({})
        return nnx.merge(layout.graph_of(name), params, of_router)

    def forward(
        self,
        kind: int,
        weights: RankWeights,
        bias: Float[Array, " experts"],
        x: Float[Array, "batch seq hidden"],
        micro_batch: MicroBatch,
    ) -> tuple[UnitOutput, dict[str, Array], dict[str, Array]]:
        """The output, what is kept, and the output of every product."""
        tape = Recorder(self.kept)
        output = self.apply(kind, weights, bias, x, micro_batch, tape)
        return output, tape.saved | {INPUT: x}, tape.outputs

    def backward(
        self,
        kind: int,
        weights: RankWeights,
        bias: Float[Array, " experts"],
        saved: dict[str, Array],
        micro_batch: MicroBatch,
        gradient: tuple[Float[Array, "batch seq hidden"], Float[Array, ""]],
        probes: dict[str, jax.ShapeDtypeStruct],
    ) -> UnitGradients:
        """Everything, but for the products in `probes` their dy in place of the weight gradient.

        `gradient` is that of the output and of the balance loss.
        """

        def unit(weights, x, ahead, probes):
            tape = Player(saved, probes)
            output = self.apply(kind, weights, bias, x, micro_batch._replace(ahead=ahead), tape)
            return output.y, output.balance_loss

        zeros = jax.tree.map(lambda probe: jnp.zeros(probe.shape, probe.dtype), probes)
        _, vjp = jax.vjp(unit, weights, saved[INPUT], micro_batch.ahead, zeros)
        return UnitGradients(*vjp(gradient))

    def weight_backward(
        self,
        kind: int,
        weights: RankWeights,
        bias: Float[Array, " experts"],
        saved: dict[str, Array],
        micro_batch: MicroBatch,
        products: dict[str, Array],
    ) -> RankWeights:
        """The weight gradients of late products, from their dy."""

        def outputs(weights):
            tape = Inputs(saved, frozenset(products))
            self.apply(kind, weights, bias, saved[INPUT], micro_batch, tape)
            return tape.outputs

        return jax.vjp(outputs, weights)[1](products)[0]
