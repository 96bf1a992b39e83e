"""Losses and gradients of a batch through a pipeline: any schedule table, in one jitted program.

A loop over the table's ticks, inside shard_map. In a tick every rank looks up its action, and goes
through the places of a stage: at each a unit forward, a unit backward, or one of both (the
overlapped pair, in one branch, so that XLA may move one's transfers under the other's products).
Then neighbours exchange what they have made, and all ranks together do the embedding and the head
of the micro-batches that enter and leave (train/pipeline_head.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.pipeline.arrays import NONE, Peer, ScheduleArrays, lower_schedule
from dsv3_jax.parallel.pipeline.orders import Kind
from dsv3_jax.parallel.pipeline.schedule import make_schedule
from dsv3_jax.parallel.pipeline.stages import (
    StageTables,
    UnitKind,
    make_stage_tables,
    split_units,
)
from dsv3_jax.parallel.sharding import add_over
from dsv3_jax.quant.recipe import QUANTISED, make_recipe
from dsv3_jax.quant.scaled_array import is_scaled
from dsv3_jax.train.layout import Layout, compute_params
from dsv3_jax.train.loss import CHUNK_TOKENS, Losses, make_targets, masked_sums, term_weights
from dsv3_jax.train.pipeline_head import (
    add_embedding_gradient,
    embed,
    from_rank,
    head_loss,
)
from dsv3_jax.train.pipeline_units import Backward, Forward, MicroBatch, Mode, Rows, Units
from dsv3_jax.train.pipeline_weights import RankWeights, StageWeights

MODES = {
    Kind.BACKWARD: Mode.FULL,
    Kind.OVERLAPPED: Mode.FULL,
    Kind.BACKWARD_INPUT: Mode.INPUT,
    Kind.BACKWARD_WEIGHT: Mode.WEIGHT,
}


class Step(NamedTuple):
    """A unit forward, a unit backward, or one of both; kinds are values of `StageTables.kind`."""

    forward: int
    backward: int
    mode: Mode


NO_STEP = Step(UnitKind.EMPTY, UnitKind.EMPTY, Mode.FULL)


class Buffers(NamedTuple):
    """What waits in slots; each buffer has one slot more, for what nobody wants."""

    activations: Float[Array, "slots batch seq hidden"]
    gradients: Float[Array, "slots batch seq hidden"]
    losses: Float[Array, "slots streams batch seq hidden"]
    """Gradients of what the last stage put out: final states, then MTP states."""
    kept: dict[str, Array]
    """By name, [slots, places, ...]."""
    products: dict[str, Array]
    """The dy of late products, [slots, places, ...]."""


class Sums(NamedTuple):
    """What adds up over the micro-batches, FP32."""

    gradients: RankWeights
    nll: Float[Array, " streams"]
    balance_loss: Float[Array, ""]
    load: Float[Array, "rows experts"]


class Flow(NamedTuple):
    """What passes from unit to unit within a tick."""

    x: Float[Array, "batch seq hidden"]
    outputs: Float[Array, "streams batch seq hidden"]
    """Of the last stage."""
    d_x: Float[Array, "batch seq hidden"]
    d_ahead: Float[Array, "depths batch seq hidden"]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A run's schedule and stages on its layout."""

    layout: Layout
    arrays: ScheduleArrays
    tables: StageTables
    units: Units
    weights: StageWeights

    def gradients(
        self, state, rows, documents, settings, predictions, sequences
    ) -> tuple[Losses, Float[Array, "routed_layers experts"], nnx.State]:
        """The batch's losses and loads on this device, and its stored shards of the gradients."""
        numbers = settings.micro_batches, predictions, sequences, settings.mtp_weight
        run = self._run(state.params, state.selection_bias, rows, documents, *numbers)
        sums = jax.lax.fori_loop(0, self.arrays.kind.shape[0], run.tick, run.start())[1]
        with jax.named_scope("reduce_gradients"):
            gradients = self.weights.reduce(sums.gradients, state.params)
        return *run.report(sums), gradients

    def buffers(self, params: nnx.State, selection_bias: nnx.State) -> Buffers:
        """What waits in slots, empty as a step begins with it. Inside shard_map."""
        config = self.layout.config
        batch = config.train.batch_size // config.parts // config.parallel.token_shards
        rows = jnp.zeros((config.parts, batch, config.data.seq_len + 1), jnp.int32)
        zero = jnp.zeros((), jnp.float32)
        documents = rows if config.data.cross_document_mask else None
        numbers = jnp.int32(0), zero, zero, zero
        return self._run(params, selection_bias, rows, documents, *numbers).start()[0]

    def _run(
        self, params, selection_bias, rows, documents, used, predictions, sequences, mtp_weight
    ) -> "_Run":
        shards = compute_params(params, self.layout.config.precision.recipe)
        return _Run(
            pipeline=self,
            weights=self.weights.gather(shards),
            biases=self._biases(selection_bias),
            rows=rows,
            documents=documents,
            used=used,
            predictions=predictions,
            sequences=sequences,
            mtp_weight=mtp_weight,
        )

    def _biases(self, state: nnx.State) -> Float[Array, "rows experts"]:
        """The selection bias of every row."""
        experts = self.layout.config.model.n_routed_experts
        rank = jax.lax.axis_index(PIPE_AXIS)
        stacks = [jax.tree.leaves(state[s]) for s in ("moe_layers", "mtp") if s in state]
        table = jnp.asarray(self.tables.routed)[rank]
        if not any(stacks):
            return jnp.zeros((table.shape[0], experts), jnp.float32)
        return jnp.concatenate([leaf for leaves in stacks for leaf in leaves])[table]

    def steps(self) -> list[Step]:
        """Every step that some rank takes in some tick, `NO_STEP` first."""
        arrays, kinds = self.arrays, self.tables.kind
        found = {NO_STEP}
        ranks = np.arange(kinds.shape[0])
        actions = {
            (int(rank), *(int(a[tick, rank]) for a in self._action_arrays()))
            for tick in range(arrays.kind.shape[0])
            for rank in ranks
        }
        for rank, kind, forward_chunk, backward_chunk in actions:
            for place in range(self.tables.places):
                back = self.tables.places - 1 - place
                forward = kinds[rank, forward_chunk, place] if forward_chunk != NONE else 0
                backward = kinds[rank, backward_chunk, back] if backward_chunk != NONE else 0
                found.add(self.step_of(kind, int(forward), int(backward)))
        return sorted(found)

    def step_of(self, kind: int, forward: int, backward: int) -> Step:
        """The step of an action of this `Kind` where units of these kinds meet."""
        mode = MODES.get(Kind(kind), Mode.FULL)
        is_split = bool(self.units.late) and backward != UnitKind.NORM
        if backward == UnitKind.EMPTY or (mode == Mode.WEIGHT and not is_split):
            return Step(forward, UnitKind.EMPTY, Mode.FULL)
        return Step(forward, backward, mode if is_split else Mode.FULL)

    def _action_arrays(self) -> tuple[np.ndarray, ...]:
        arrays = self.arrays
        return arrays.kind, arrays.forward_chunk, arrays.backward_chunk


def make_pipeline(layout: Layout) -> Pipeline:
    """The pipeline of the layout's config. ValueError for what schedule or stages do not allow."""
    config = layout.config
    parallel, model = config.parallel, config.model
    stages = parallel.stages
    schedule = make_schedule(parallel.schedule, stages, parallel.micro_batches)
    units = split_units(
        model.num_dense_layers, model.num_moe_layers, model.num_nextn_predict_layers, stages
    )
    tables = make_stage_tables(schedule.layout, units)
    recipe = make_recipe(config.precision.recipe)
    kept = KEPT[config.train.remat] | config.train.kept
    if "attention_output" in kept and recipe.rules:
        kept |= {"attention_residual"}  # which o_proj makes of the unrounded one
    return Pipeline(
        layout,
        lower_schedule(schedule),
        tables,
        Units(
            layout,
            kept,
            LATE if parallel.late_weight_gradients else frozenset(),
            frozenset(recipe.kept) - {"expert_rows"},  # whose values FP8 holds as they are
        ),
        StageWeights(
            tables,
            layout.placements,
            model.vocab_size,
            QUANTISED if recipe.rules else frozenset(),
        ),
    )


ROUTING = frozenset({"chosen_experts", "node_experts", "gpu_experts", "rounds"})
"""Small, and the same choices must be met again."""
SELECTIVE = ROUTING | {
    *("q_latent", "kv_latent", "attention_output", "attention_lse", "attention_residual"),
    *("node_rows", "gpu_rows", "expert_up", "mlp_gate", "mlp_up"),
}
KEPT = {
    "none": SELECTIVE | {"queries", "keys_values", "expert_rows"},
    "selective": SELECTIVE,
    "full": ROUTING,
}
"""By `train.remat`."""
LATE = frozenset(
    {
        *("q_a_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_up_proj", "down_proj", "gate_proj", "up_proj", "mlp_down_proj"),
    }
)


@dataclass(frozen=True, eq=False)
class _Run:
    """One batch on one device: what stays the same over all ticks."""

    pipeline: Pipeline
    weights: RankWeights
    biases: Float[Array, "rows experts"]
    rows: Int[Array, "parts batch seq_and_one"]
    documents: Int[Array, "parts batch seq_and_one"] | None
    used: Int[Array, ""]
    predictions: Float[Array, ""]
    sequences: Float[Array, ""]
    mtp_weight: Float[Array, ""]

    @property
    def dtype(self) -> Any:
        return self.weights["whole"]["lm_head", "weight"].dtype

    @property
    def hidden_shape(self) -> tuple[int, int, int]:
        _, batch, seq_and_one = self.rows.shape
        return batch, seq_and_one - 1, self.pipeline.layout.config.model.hidden_size

    @property
    def depths(self) -> int:
        return self.pipeline.units.depths

    def start(self) -> tuple[Buffers, Sums]:
        """Empty buffers and zero sums."""
        arrays, shape, streams = self.pipeline.arrays, self.hidden_shape, 1 + self.depths

        def empty(slots: np.ndarray, *shape: int, dtype: Any = self.dtype) -> Array:
            return jnp.zeros((int(slots.max()) + 1, *shape), dtype)

        def pool(slots: np.ndarray, shapes: dict[str, Any]) -> dict[str, Array]:
            places = self.pipeline.tables.places
            return {
                name: empty(slots, places, *leaf.shape, dtype=leaf.dtype)
                for name, leaf in shapes.items()
            }

        kept, products = self.shapes(self.main_kind)
        is_split = any(step.mode == Mode.WEIGHT for step in self.pipeline.steps())
        buffers = Buffers(
            empty(arrays.activation_slots, *shape),
            empty(arrays.gradient_slots, *shape),
            empty(arrays.loss_slots, streams, *shape),
            pool(arrays.residual_slots, kept),
            pool(arrays.weight_slots, products) if is_split else {},
        )
        gradients = jax.tree.map(
            lambda w: jnp.zeros(w.shape, jnp.float32), self.weights, is_leaf=is_scaled
        )
        zero = jnp.zeros((), jnp.float32)
        return buffers, Sums(gradients, jnp.zeros((streams,)), zero, jnp.zeros_like(self.biases))

    @property
    def main_kind(self) -> int:
        """The kind of layer whose tensors the buffers are made for."""
        kinds = self.pipeline.tables.kind
        return UnitKind.MOE if (kinds == UnitKind.MOE).any() else int(kinds[kinds > 0].min())

    def shapes(self, kind: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of what a unit keeps and of the dy of its late products, but only where the
        buffers have such."""
        units = self.pipeline.units
        zero = jnp.zeros((), jnp.int32)

        def forward(weights, bias, x, ahead):
            unit = units.weights_at(weights, kind, Rows(zero, zero))
            micro_batch = MicroBatch(self._some_documents(), ahead)
            made, _ = units.run(Forward(kind, unit, bias, x, micro_batch), None)
            assert made is not None
            tape = made[1]
            late = units.late & tape.outputs.keys()
            return tape.saved, {name: tape.outputs[name] for name in late}

        x = jax.ShapeDtypeStruct(self.hidden_shape, self.dtype)
        ahead = jax.ShapeDtypeStruct((self.depths, *self.hidden_shape), self.dtype)
        found = jax.eval_shape(forward, self.weights, self.biases[0], x, ahead)
        if kind == self.main_kind:
            return found
        kept, products = self.shapes(self.main_kind)
        return _common(found[0], kept), _common(found[1], products)

    def _some_documents(self) -> Array | None:
        return None if self.documents is None else self.documents[0, :, :-1]

    # One tick

    def tick(self, index: Int[Array, ""], carry: tuple[Buffers, Sums]) -> tuple[Buffers, Sums]:
        """All ranks' actions of one tick, and what passes between them at its end."""
        buffers, sums = carry
        action = _Action.at(self.pipeline, index)
        with jax.named_scope("embedding"):
            entering = self._embedded(action.enters, 0)
            leading = [self._embedded_ahead(action.leaves), self._embedded_ahead(action.turns)]
        forward_direction = self._direction(action.forward_micro_batch)
        backward_direction = self._direction(action.backward_micro_batch)
        received = _read(buffers.activations, action.activation_slot)
        x = jnp.where(action.activation_slot == NONE, entering[forward_direction], received)
        d_x = _read(buffers.gradients, action.gradient_slot)
        d_x = jnp.where(action.gradient_slot == NONE, 0, d_x)
        flow = Flow(
            x,
            jnp.zeros((1 + self.depths, *self.hidden_shape), self.dtype),
            d_x,
            jnp.zeros((self.depths, *self.hidden_shape), self.dtype),
        )
        micro_batches = (
            self._micro_batch(action.forward_micro_batch, leading[0][forward_direction]),
            self._micro_batch(action.backward_micro_batch, leading[1][backward_direction]),
        )
        places = jnp.where(action.kind == Kind.IDLE, 0, self.pipeline.tables.places)
        step = partial(self._place, action, micro_batches)
        flow, buffers, sums = jax.lax.fori_loop(0, places, step, (flow, buffers, sums))
        with jax.named_scope("pipeline_messages"):
            buffers = self._exchange(action, flow, buffers)
        return self._ends(action, flow, buffers, sums)

    def _direction(self, micro_batch: Int[Array, ""]) -> Int[Array, ""]:
        if self.pipeline.arrays.enters.shape[1] == 1:
            return jnp.int32(0)
        return (micro_batch >= self.rows.shape[0] // 2).astype(jnp.int32)

    def _micro_batch(self, index: Int[Array, ""], ahead: Array) -> MicroBatch:
        documents = None
        if self.documents is not None:
            documents = _read(self.documents, index)[:, :-1]
        return MicroBatch(documents, ahead)

    def _embedded(self, micro_batches: Int[Array, " directions"], ahead: int) -> Array:
        """Embeddings [directions, batch, seq, hidden] of each micro-batch's tokens `ahead`."""
        part = self.weights["whole"]["embed_tokens", "weight"]

        def of_direction(micro_batch):
            return jax.lax.cond(
                micro_batch != NONE,
                lambda: embed(part, self._tokens(micro_batch, ahead), self.dtype),
                lambda: jnp.zeros(self.hidden_shape, self.dtype),
            )

        return jnp.stack([of_direction(m) for m in micro_batches])

    def _embedded_ahead(self, micro_batches: Int[Array, " directions"]) -> Array:
        """The same for every MTP depth, [directions, depths, batch, seq, hidden]."""
        if not self.depths:
            return jnp.zeros((micro_batches.shape[0], 0, *self.hidden_shape), self.dtype)
        every = [self._embedded(micro_batches, depth) for depth in range(1, self.depths + 1)]
        return jnp.stack(every, axis=1)

    def _tokens(self, micro_batch: Int[Array, ""], ahead: int) -> Int[Array, "batch seq"]:
        """The tokens `ahead` of each position, 0 where the row has ended."""
        rows = _read(self.rows, micro_batch)
        seq = rows.shape[1] - 1
        return jnp.pad(rows, ((0, 0), (0, ahead)))[:, ahead : ahead + seq]

    # The places of a stage

    def _place(self, action, micro_batches, place, carry):
        """The step at one place: forward goes up the places, backward down."""
        rank = jax.lax.axis_index(PIPE_AXIS)
        tables, steps = self.pipeline.tables, self.pipeline.steps()
        back = tables.places - 1 - place
        kinds = jnp.asarray(tables.kind)[rank]

        def kind_at(chunk, place):
            return jnp.where(chunk == NONE, UnitKind.EMPTY, kinds[chunk, place])

        forward = kind_at(action.forward_chunk, place)
        backward = kind_at(action.backward_chunk, back)
        branch = jnp.asarray(self._branch_table(steps))[action.kind, forward, backward]
        branches = [partial(self._run_step, step, action, micro_batches, place) for step in steps]
        return jax.lax.switch(branch, branches, carry)

    def _branch_table(self, steps: list[Step]) -> np.ndarray:
        """The number of the step by action, forward kind and backward kind; 0 for what is not."""
        pipeline = self.pipeline
        kinds = int(pipeline.tables.kind.max()) + 1
        table = np.zeros((len(Kind), kinds, kinds), np.int32)
        number = {step: i for i, step in enumerate(steps)}
        for kind in Kind:
            for forward in range(kinds):
                for backward in range(kinds):
                    table[kind, forward, backward] = number.get(
                        pipeline.step_of(kind, forward, backward), 0
                    )
        return table

    def _run_step(self, step: Step, action: "_Action", micro_batches, place, carry):
        flow, buffers, sums = carry
        back = self.pipeline.tables.places - 1 - place
        forward = backward = None
        late: dict[str, Array] = {}
        if step.backward:
            saved, late, buffers = self._read_kept(step, action, back, buffers)
            backward = self._backward(step, action, micro_batches[1], back, saved, flow, buffers)
        if step.forward:
            forward = self._forward(step.forward, action, micro_batches[0], place, flow)
        if backward is not None and step.mode == Mode.WEIGHT:
            rows = self._rows(action.backward_chunk, back)
            found = self.pipeline.units.weight_backward(backward, late)
            return flow, buffers, self._add_gradients(sums, found, step.backward, rows)
        made, gradients = self.pipeline.units.run(forward, backward)
        carry = flow, buffers, sums
        if made is not None:
            carry = self._after_forward(step.forward, action, place, made, carry)
        if gradients is not None:
            carry = self._after_backward(step, action, back, gradients, carry)
        return carry

    def _rows(self, chunk: Int[Array, ""], place: Int[Array, ""]) -> Rows:
        tables = self.pipeline.tables
        dense = jnp.asarray(tables.dense_row)[jax.lax.axis_index(PIPE_AXIS)]
        return Rows(chunk * tables.places + place, dense[chunk, place])

    def _read_kept(self, step: Step, action: "_Action", place, buffers: Buffers):
        """What the backward reads: tensors that its forward kept, the dy of late products."""
        at = action.backward_residual_slot, place
        kept, products = self.shapes(step.backward)
        saved = {name: _read(buffers.kept[name], *at) for name in kept}
        late = {}
        if step.mode == Mode.WEIGHT:
            at = action.weight_slot, place
            late = {name: _read(buffers.products[name], *at) for name in products}
        # Reads before writes, so that the buffers are written in place.
        return jax.lax.optimization_barrier((saved, late, buffers))

    def _forward(self, kind: int, action, micro_batch, place, flow: Flow) -> Forward:
        rows = self._rows(action.forward_chunk, place)
        weights = self.pipeline.units.weights_at(self.weights, kind, rows)
        return Forward(kind, weights, _read(self.biases, rows.block), flow.x, micro_batch)

    def _backward(
        self, step, action, micro_batch, place, saved, flow: Flow, buffers: Buffers
    ) -> Backward:
        config, kind = self.pipeline.layout.config, step.backward
        rows = self._rows(action.backward_chunk, place)
        d_y = flow.d_x
        if kind >= UnitKind.NORM:
            d_y = d_y + _read(buffers.losses, action.loss_slot, kind - UnitKind.NORM)
        is_used = (action.backward_micro_batch < self.used).astype(jnp.float32)
        return Backward(
            kind,
            self.pipeline.units.weights_at(self.weights, kind, rows),
            _read(self.biases, rows.block),
            saved,
            micro_batch,
            (d_y, config.loss.balance_weight * self.rows.shape[1] / self.sequences * is_used),
            self.shapes(kind)[1] if step.mode == Mode.INPUT else {},
        )

    def _after_forward(self, kind, action, place, made, carry):
        """What a unit put out goes to the next, what it kept into the buffers."""
        (flow, buffers, sums), (output, tape) = carry, made
        rows = self._rows(action.forward_chunk, place)
        kept = dict(buffers.kept)
        for name in self.shapes(kind)[0]:
            kept[name] = _write(kept[name], tape.saved[name], action.forward_residual_slot, place)
        flow = flow._replace(x=output.y)
        if kind >= UnitKind.NORM:
            flow = flow._replace(outputs=flow.outputs.at[kind - UnitKind.NORM].set(output.y))
        is_used = (action.forward_micro_batch < self.used).astype(jnp.float32)
        sums = sums._replace(
            balance_loss=sums.balance_loss + is_used * output.balance_loss,
            load=sums.load.at[rows.block].add(is_used * output.load),
        )
        return flow, buffers._replace(kept=kept), sums

    def _after_backward(self, step, action, place, gradients, carry):
        """A unit's gradients go to the one before it, into the sums, and those of late products
        into the buffers."""
        flow, buffers, sums = carry
        products = dict(buffers.products)
        for name, found in gradients.products.items():
            products[name] = _write(products[name], found, action.weight_slot, place)
        flow = flow._replace(d_x=gradients.x)
        if step.backward >= UnitKind.MTP:
            flow = flow._replace(d_ahead=flow.d_ahead + gradients.ahead)
        rows = self._rows(action.backward_chunk, place)
        sums = self._add_gradients(sums, gradients.weights, step.backward, rows)
        return flow, buffers._replace(products=products), sums

    def _add_gradients(self, sums: Sums, gradients: RankWeights, kind: int, rows: Rows) -> Sums:
        units = self.pipeline.units
        return sums._replace(gradients=units.add_gradients(sums.gradients, gradients, kind, rows))

    # Between ranks

    def _exchange(self, action: "_Action", flow: Flow, buffers: Buffers) -> Buffers:
        """Sends outputs and input gradients to where the next stage and the one before are."""
        arrays = self.pipeline.arrays
        ranks = arrays.kind.shape[1]
        paths = {
            Peer.PREVIOUS: [(r, r + 1) for r in range(ranks - 1)],
            Peer.NEXT: [(r + 1, r) for r in range(ranks - 1)],
            Peer.SELF: [],
        }

        def receive(buffer, value, slots, every_slot):
            for peer, path in paths.items():
                if (every_slot[..., peer] != NONE).any():
                    came = jax.lax.ppermute(value, PIPE_AXIS, path) if path else value
                    buffer = _write(buffer, came, slots[peer])
            return buffer

        return buffers._replace(
            activations=receive(
                buffers.activations, flow.x, action.receive_activation, arrays.receive_activation
            ),
            gradients=receive(
                buffers.gradients, flow.d_x, action.receive_gradient, arrays.receive_gradient
            ),
        )

    def _ends(self, action, flow: Flow, buffers: Buffers, sums: Sums) -> tuple[Buffers, Sums]:
        """Head and loss of what leaves, and the embedding's gradients, on all ranks together."""
        arrays = self.pipeline.arrays
        rank = jax.lax.axis_index(PIPE_AXIS)
        for direction in range(arrays.enters.shape[1]):
            first, last = int(arrays.first_rank[direction]), int(arrays.last_rank[direction])

            def head(operand, direction=direction, last=last):
                losses, sums = operand
                micro_batch = action.leaves[direction]
                d_outputs, sums = self._head(micro_batch, from_rank(last, flow.outputs), sums)
                slot = jnp.where(rank == last, action.receive_loss, NONE)
                return _write(losses, d_outputs, slot), sums

            operand = buffers.losses, sums
            leaves = action.leaves[direction] != NONE
            losses, sums = jax.lax.cond(leaves, head, lambda operand: operand, operand)
            buffers = buffers._replace(losses=losses)
            sums = self._add_embedding(action.returns[direction], 0, first, flow.d_x, sums)
            for depth in range(1, self.depths + 1):
                d_ahead = flow.d_ahead[depth - 1]
                sums = self._add_embedding(action.turns[direction], depth, last, d_ahead, sums)
        return buffers, sums

    def _head(self, micro_batch, outputs, sums: Sums) -> tuple[Array, Sums]:
        """Gradients of the outputs, and the sums with this micro-batch's losses."""
        config = self.pipeline.layout.config
        rows = _read(self.rows, micro_batch)
        documents = None if self.documents is None else _read(self.documents, micro_batch)
        targets = make_targets(rows, documents, self.depths)
        is_used = (micro_batch < self.used).astype(jnp.float32)
        masks = targets.masks * is_used
        terms = term_weights(self.depths, self.mtp_weight, self.predictions)
        with jax.named_scope("cross_entropy"):
            result = head_loss(
                outputs.reshape(-1, outputs.shape[-1]),
                self.weights["whole"]["lm_head", "weight"],
                targets.tokens.reshape(-1),
                (masks * terms[:, None, None]).reshape(-1),
                config.model.vocab_size,
                CHUNK_TOKENS * config.parallel.pipe,
            )
        whole = dict(sums.gradients["whole"])
        whole["lm_head", "weight"] = whole["lm_head", "weight"] + result.d_head
        gradients = sums.gradients | {"whole": whole}
        sums = sums._replace(gradients=gradients, nll=sums.nll + masked_sums(result.nll, masks))
        return result.d_hidden.reshape(outputs.shape), sums

    def _add_embedding(self, micro_batch, ahead: int, source: int, gradient, sums: Sums) -> Sums:
        def add(total):
            everywhere = from_rank(source, gradient)
            return add_embedding_gradient(total, self._tokens(micro_batch, ahead), everywhere)

        whole = dict(sums.gradients["whole"])
        name = ("embed_tokens", "weight")
        whole[name] = jax.lax.cond(micro_batch != NONE, add, lambda total: total, whole[name])
        return sums._replace(gradients=sums.gradients | {"whole": whole})

    def report(self, sums: Sums) -> tuple[Losses, Float[Array, "routed_layers experts"]]:
        """This device's part of the batch's losses and loads, of all ranks."""
        config, tables = self.pipeline.layout.config, self.pipeline.tables
        model = config.model
        means = sums.nll / self.predictions
        layers = model.num_moe_layers + model.num_nextn_predict_layers
        table = jnp.asarray(tables.routed)[jax.lax.axis_index(PIPE_AXIS)]
        load = jnp.zeros((layers, model.n_routed_experts), jnp.float32).at[table].add(sums.load)
        balance, load = add_over((PIPE_AXIS,), (sums.balance_loss, load))
        balance = balance * (self.rows.shape[1] / self.sequences)
        mtp = jnp.mean(means[1:]) if self.depths else jnp.zeros(())
        loss = means[0] + self.mtp_weight * mtp + config.loss.balance_weight * balance
        return Losses(loss, means[0], mtp, balance), load


class _Action(NamedTuple):
    """One tick: this rank's entries of `ScheduleArrays`, and what all ranks have alike."""

    kind: Array
    forward_micro_batch: Array
    forward_chunk: Array
    backward_micro_batch: Array
    backward_chunk: Array
    activation_slot: Array
    gradient_slot: Array
    loss_slot: Array
    receive_loss: Array
    forward_residual_slot: Array
    backward_residual_slot: Array
    weight_slot: Array
    receive_activation: Array
    receive_gradient: Array
    enters: Array
    leaves: Array
    turns: Array
    returns: Array

    @classmethod
    def at(cls, pipeline: Pipeline, tick: Int[Array, ""]) -> "_Action":
        rank = jax.lax.axis_index(PIPE_AXIS)

        def entry(name):
            of_tick = jnp.asarray(getattr(pipeline.arrays, name))[tick]
            return of_tick if name in ("enters", "leaves", "turns", "returns") else of_tick[rank]

        return cls(*(entry(name) for name in cls._fields))


def _common(mine: dict[str, Any], main: dict[str, Any]) -> dict[str, Any]:
    """Those of `mine` that `main` has with the same shape."""
    return {k: v for k, v in mine.items() if k in main and v.shape == main[k].shape}


def _read(buffer: Array, *at: Any) -> Array:
    """buffer[at]; `NONE` reads the last slot."""
    start = _start(buffer, at)
    sizes = (1,) * len(at) + buffer.shape[len(at) :]
    return jax.lax.dynamic_slice(buffer, start, sizes).reshape(buffer.shape[len(at) :])


def _write(buffer: Array, value: Array, *at: Any) -> Array:
    """The buffer with `value` at `at`; `NONE` writes the last slot."""
    value = value.reshape((1,) * len(at) + buffer.shape[len(at) :])
    return jax.lax.dynamic_update_slice(buffer, value.astype(buffer.dtype), _start(buffer, at))


def _start(buffer: Array, at: tuple[Any, ...]) -> list[Any]:
    first = jnp.where(at[0] == NONE, buffer.shape[0] - 1, at[0])
    return [first, *at[1:], *[0] * (buffer.ndim - len(at))]
