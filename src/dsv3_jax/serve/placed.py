"""A model's weights, and an engine's programs over them, on a mesh.

Every device has slots and pages of its own for requests, and runs each program with them; together
they have the experts. One device is a mesh of one. Nothing here holds arrays: an engine compiles
the programs for what it holds, the planner lowers them for devices that are not there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from dsv3_jax.config import ModelConfig, ParallelConfig, ServeConfig
from dsv3_jax.model.cache import copy_pages, read_pages, write_pages
from dsv3_jax.model.expert_slots import ExpertSlots, move_slots
from dsv3_jax.model.spread import routed_modules, set_mesh
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.expert_placement import Placement, place_experts
from dsv3_jax.parallel.inference import (
    BY_TOKEN,
    EXPERTS,
    WHOLE,
    agreement_axes,
    check_division,
    expert_devices,
    on_mesh,
    weight_specs,
)
from dsv3_jax.parallel.mesh import EXPERT_AXES, used_axes
from dsv3_jax.parallel.wire import Wire
from dsv3_jax.serve.programs import Decoded, DecodeProgram, Weights, read_chunks, set_edit_row

UNSTACKED_LAYERS = 16
"""Up to this many layers have their own arrays and are unrolled: quicker, on CPU twice, but the
program grows with them."""
SLOTS = "slots"
"""Attribute of a MoE layer that says where its experts are."""


@dataclass(frozen=True)
class Program:
    """A function of each device's own arguments, and where those lie."""

    function: Callable
    in_specs: tuple[Any, ...]
    out_specs: Any
    donate: int | None = None


class PlacedModel:
    """The structure of a model's weights on `mesh`, and the programs of them."""

    def __init__(self, weights: Weights, mesh: Mesh, guesses: bool, steps: int):
        """`weights` are arrays or only their shapes; `steps` decode steps are one call."""
        self.mesh, self.guesses, self.steps = mesh, guesses, steps
        self.config, self.layers = weights.model.config, weights.model.cached_layers
        self.is_stacked = weights.layers is None
        self.structure = jax.tree.structure(weights)
        self.specs = jax.tree.leaves(_specs(weights), is_leaf=_is_spec)
        self.paths = [
            tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(weights)
        ]

    def jit(self, program: Program, compiler_options: dict[str, Any] | None = None) -> Any:
        """The program over the mesh, to be lowered or called with whole arrays."""
        return jax.jit(
            on_mesh(program.function, self.mesh, program.in_specs, program.out_specs),
            in_shardings=self.shardings(program.in_specs),
            out_shardings=self.shardings(program.out_specs),
            donate_argnums=program.donate,
            compiler_options=compiler_options,
        )

    @property
    def weight_shardings(self) -> list[NamedSharding]:
        """Of each array of the weights."""
        return [NamedSharding(self.mesh, spec) for spec in self.specs]

    def shardings(self, specs: Any) -> Any:
        """Where arrays with these specs lie."""
        return jax.tree.map(partial(NamedSharding, self.mesh), specs, is_leaf=_is_spec)

    # The programs

    def decode(self, guesses: bool, has_edits: bool) -> Program:
        """Of weights, pages, `DecodeRows`, steps, and where logits are edited their edits."""
        program = DecodeProgram(self.steps, guesses, has_edits, agreement_axes(self.mesh))

        def call(leaves, pool, *rest):
            return program(jax.tree.unflatten(self.structure, leaves), pool, *rest)

        alike: Any = dict.fromkeys(("guessed", "right", "steps", "load"), WHOLE)
        decoded: Any = dict.fromkeys(Decoded._fields, BY_TOKEN) | alike
        in_specs = self.specs, BY_TOKEN, BY_TOKEN, WHOLE, BY_TOKEN, BY_TOKEN
        return Program(call, in_specs, (BY_TOKEN, Decoded(**decoded), BY_TOKEN), donate=1)

    def read(self) -> Program:
        """Of weights, pages and `ChunkRows`."""
        axes = agreement_axes(self.mesh)

        def call(leaves, pool, rows):
            weights = jax.tree.unflatten(self.structure, leaves)
            return read_chunks(weights, pool, rows, guesses=self.guesses, axes=axes)

        return Program(call, (self.specs, BY_TOKEN, BY_TOKEN), (BY_TOKEN, WHOLE), donate=1)

    def copy_page(self) -> Program:
        """Of pages, sources and targets."""
        function = partial(copy_pages, layers=self.layers)
        return Program(function, (BY_TOKEN,) * 3, BY_TOKEN, donate=0)

    def read_pages(self) -> Program:
        """Of pages and their numbers: their contents, the devices' one after another."""
        function = partial(read_pages, layers=self.layers)
        return Program(function, (BY_TOKEN, BY_TOKEN), BY_TOKEN)

    def write_pages(self) -> Program:
        """Of pages, numbers and, the same on every device, contents."""
        return Program(write_pages, (BY_TOKEN, BY_TOKEN, WHOLE), BY_TOKEN, donate=0)

    def set_edits(self) -> Program:
        """Of the edits' state, a row of each device (beyond the last: none) and what is set."""

        def call(state, row, *values):
            return set_edit_row(state, row[0], *values)

        return Program(call, (BY_TOKEN, BY_TOKEN, WHOLE, WHOLE, WHOLE), BY_TOKEN, donate=0)

    def move_experts(self, stacked: bool) -> Program:
        """Of one layer's experts, or of stacks and the layer's number, and the slots whose experts
        are to be in each slot."""
        axes, devices = used_axes(self.mesh, EXPERT_AXES), expert_devices(self.mesh)
        if not stacked:

            def call(leaves, source):
                return [move_slots(leaf, source, axes, devices) for leaf in leaves]

            spec = PartitionSpec(EXPERT_AXES)
            return Program(call, (spec, WHOLE), spec, donate=0)

        def call_stacked(leaves, source, layer):
            moved = [move_slots(leaf[layer], source, axes, devices) for leaf in leaves]
            return [leaf.at[layer].set(new) for leaf, new in zip(leaves, moved, strict=True)]

        spec = PartitionSpec(None, EXPERT_AXES)
        return Program(call_stacked, (spec, WHOLE, WHOLE), spec, donate=0)

    # Where a layer's experts are among the leaves

    def expert_leaves(self, layer: int, what: str = EXPERTS) -> list[int]:
        """Numbers of the leaves that have the experts (or the `SLOTS`) of a MoE layer, counted
        without the dense ones; of the stack that it is in where layers are stacked."""
        number = str(self.config.num_dense_layers + layer)
        start = ("model", "moe_layers") if self.is_stacked else ("layers", number)
        return [i for i, path in enumerate(self.paths) if path[:2] == start and what in path]


class Arranged(NamedTuple):
    """A model made ready for a mesh."""

    weights: Weights
    """Arrays where they were, experts in their slots."""
    placed: PlacedModel
    placement: Placement | None
    """Where the experts are at first; None: each in its place for good."""


def arrange_model(
    model: Transformer,
    mesh: Mesh,
    serve: ServeConfig,
    how: ParallelConfig | None,
    wire: Wire | None,
    guesses: bool,
) -> Arranged:
    """The model's parts as the programs take them; `model` itself stays as it is.

    Raises ValueError where experts do not divide over the mesh.
    """
    config = model.config
    places_experts = serve.places_experts and config.has_experts
    slots = config.n_routed_experts + serve.redundant_experts * places_experts
    if config.has_experts:
        check_division(slots, mesh, "n_routed_experts + serve.redundant_experts")
    model = nnx.merge(*nnx.split(model))
    if not guesses and config.num_nextn_predict_layers:  # neither its weights nor a cache for it
        del model.mtp
        config = replace(config, num_nextn_predict_layers=0)
        model.config = config
    placement = first_placement(config, mesh, slots) if places_experts else None
    if placement is not None:
        _replicate(model, placement.expert_of_slot[0])
        _set_slots(model, placement, mesh, most=slots - config.n_routed_experts + 1)
    set_mesh(model, mesh, how, slots=slots, wire=wire)
    weights = _parts(model, guesses)
    return Arranged(weights, PlacedModel(weights, mesh, guesses, serve.decode_steps), placement)


def first_placement(config: ModelConfig, mesh: Mesh, slots: int) -> Placement:
    """Of every MoE layer alike, before any load is known."""
    nodes, gpus = int(mesh.shape["node"]), expert_devices(mesh)
    load = np.ones((1, config.n_routed_experts))
    one = place_experts(load, slots=slots, groups=config.n_group, nodes=nodes, gpus=gpus)
    return _repeated(one, config.num_moe_layers)


def _repeated(one: Placement, layers: int) -> Placement:
    """The first layer of `one` as many times."""
    return Placement(
        expert_of_slot=np.repeat(one.expert_of_slot[:1], layers, axis=0),
        replica_of_slot=np.repeat(one.replica_of_slot[:1], layers, axis=0),
        replicas=np.repeat(one.replicas[:1], layers, axis=0),
    )


def _set_slots(model: Transformer, placement: Placement, mesh: Mesh, most: int) -> None:
    """Gives MoE layers and MTP modules their tables, of at most `most` replicas of an expert."""
    for moe in routed_modules(model):
        layers = moe.gate.weight[...].shape[0]
        axes = used_axes(mesh, EXPERT_AXES)
        moe.slots = ExpertSlots(_repeated(placement, layers), most, axes)


def _replicate(model: Transformer, expert_of_slot: Int[np.ndarray, " slots"]) -> None:
    """Puts an expert into each slot, of new arrays."""
    for moe in routed_modules(model):
        graph, state = nnx.split(moe.experts)
        moe.experts = nnx.merge(graph, jax.tree.map(lambda a: a[:, expert_of_slot], state))


def _parts(model: Transformer, guesses: bool) -> Weights:
    """The model's parts; where layers are taken out of their stacks, without the stacks."""
    if model.config.num_hidden_layers > UNSTACKED_LAYERS:
        return Weights(model, None, None)
    mtp = model.layers("mtp")[0] if guesses else None
    layers = model.unstacked_layers()
    for name in ("dense_layers", "moe_layers", "mtp"):
        if name in vars(model):
            delattr(model, name)
    return Weights(model, layers, mtp)


def _specs(weights: Weights) -> Any:
    unstacked = partial(weight_specs, expert_dim=0)
    return Weights(weight_specs(weights.model), unstacked(weights.layers), unstacked(weights.mtp))


def _is_spec(node: Any) -> bool:
    return isinstance(node, PartitionSpec)
