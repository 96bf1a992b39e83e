"""A run's state on its mesh: what lies where, and functions of the model over all devices."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from dsv3_jax.config import RunConfig
from dsv3_jax.model.transformer import GATHERED, Transformer
from dsv3_jax.parallel.mesh import TOKEN_AXES, compiler_options, make_mesh, used_axes
from dsv3_jax.parallel.sharding import STACKS, add_over, place
from dsv3_jax.quant.recipe import QUANTISED, make_recipe
from dsv3_jax.train.optimizer import Moments
from dsv3_jax.train.state import TrainState, build_model, init_state, split_model

HOPPER = "9.0"
"""Compute capability of the GPUs that dsv3_kernels' FP8 kernels are for."""
ROWS = PartitionSpec(None, TOKEN_AXES)
"""Of arrays [accumulation, part, tokens]: every device has its sequences of each part."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The structure of the run's model, the mesh, and each parameter's `Placement`."""

    config: RunConfig
    mesh: Mesh
    graph: nnx.GraphDef
    abstract: TrainState
    placements: nnx.State

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes over which tokens are split."""
        return used_axes(self.mesh, TOKEN_AXES)

    def graph_of(self, name: str) -> nnx.GraphDef:
        """The structure of a part of the model, such as one of its stacks."""
        model = nnx.merge(self.graph, self.abstract.params, self.abstract.selection_bias)
        return nnx.graphdef(getattr(model, name))

    def state_specs(self) -> Any:
        """A TrainState of the PartitionSpec of every array."""
        params = jax.tree.map(lambda placement: placement.spec(), self.placements)
        replicated = jax.tree.map(lambda _: PartitionSpec(), self.abstract.selection_bias)
        specs: Any = TrainState  # its fields hold arrays elsewhere
        return specs(PartitionSpec(), params, replicated, Moments(params, params))

    def state_shardings(self) -> Any:
        """The same with the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.state_specs())

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings, as a checkpoint is read into."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self.abstract,
            self.state_shardings(),
        )

    def initial_state(self, initial: Transformer | None = None) -> TrainState:
        """The state before the first step, made in shards; its weights are those of `initial`."""
        config = self.config

        def state_of(model: Transformer) -> TrainState:
            _, params, bias = split_model(model)
            params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
            return init_state(config.optimizer, params, bias)

        if initial is not None:
            return jax.device_put(state_of(initial), self.state_shardings())

        def fresh() -> TrainState:
            return state_of(build_model(config, nnx.Rngs(config.train.seed)))

        return jax.jit(fresh, out_shardings=self.state_shardings())()

    def data_share(self) -> tuple[int, int]:
        """(which, of how many): the part of a batch that this process feeds.

        Processes that differ in their pipeline rank alone feed the same part.
        """
        rows = self.mesh.devices.reshape(self.config.parallel.pipe, -1)
        owned: dict[int, set[int]] = {}
        for row in rows:
            for shard, device in enumerate(row):
                owned.setdefault(device.process_index, set()).add(shard)
        parts = sorted({tuple(sorted(shards)) for shards in owned.values()})
        return parts.index(tuple(sorted(owned[jax.process_index()]))), len(parts)

    def put_rows(self, rows: Int[np.ndarray, "parts part seq_and_one"]) -> jax.Array:
        """This process's rows as its part of the global array."""
        return jax.make_array_from_process_local_data(NamedSharding(self.mesh, ROWS), rows)

    def weights(self, params: nnx.State) -> nnx.State:
        """What `model` computes with, from stored shards; inside `on_mesh`.

        In the dtype that is computed in, and whole but for layers that are gathered when they come.
        """

        def gather(path, leaf, placement):
            return leaf if self._gathers_late(path) else placement.gather(leaf)

        params = compute_params(params, self.config.precision.recipe)
        return jax.tree.map_with_path(gather, params, self.placements)

    def reduce(self, gradients: nnx.State) -> nnx.State:
        """The stored shards of the gradients with respect to `weights`, over all devices."""

        def reduce(path, leaf, placement):
            if self._gathers_late(path) and placement.dim is not None:
                return leaf  # by the transpose of its late gathering
            return placement.reduce(leaf)

        return jax.tree.map_with_path(reduce, gradients, self.placements)

    def model(self, weights: nnx.State, bias: nnx.State) -> Transformer:
        """The model of these weights; it may gather each layer when it comes."""
        model: Transformer = nnx.merge(self.graph, weights, bias)
        if self._gathers_layers:
            model.gather_layer = self._gather_layer
        return model

    @property
    def _gathers_layers(self) -> bool:
        """Whether whole-model functions gather each layer when it comes: with `zero` 3, and in a
        pipeline (whose training step is another, train/pipeline_step.py)."""
        return self.config.parallel.zero == 3 or self.config.parallel.pipe > 1

    def _gathers_late(self, path: tuple) -> bool:
        return self._gathers_layers and path[0].key in STACKS

    def _gather_layer(self, stack: str, layer: nnx.State) -> nnx.State:
        def gather(leaf, placement):
            return checkpoint_name(placement.gather(leaf, first_dim=1), GATHERED)

        return jax.tree.map(gather, layer, self.placements[stack])

    def on_mesh(
        self,
        function: Callable,
        in_specs: Sequence[Any],
        out_specs: Any,
        donate: tuple[int, ...] = (),
    ) -> Callable:
        """`function`, written for one device and its shards, jitted over all of them."""
        if self.mesh.size > 1:
            function = jax.shard_map(
                function,
                mesh=self.mesh,
                in_specs=tuple(in_specs),
                out_specs=out_specs,
                check_vma=False,
            )
        options = compiler_options(self.mesh)
        return jax.jit(function, donate_argnums=donate, compiler_options=options)

    def sum_over_tokens(self, function: Callable) -> Callable:
        """`call(state, rows, documents, *replicated)`, jitted: what `function(model, rows,
        documents, *replicated)` finds for each device's sequences, added up."""

        def call(params, bias, rows, documents, replicated):
            model = self.model(self.weights(params), bias)
            return add_over(self.token_axes, function(model, rows, documents, *replicated))

        specs, rows = self.state_specs(), PartitionSpec(TOKEN_AXES)
        in_specs = (specs.params, specs.selection_bias, rows, rows, PartitionSpec())
        on_mesh = self.on_mesh(call, in_specs, PartitionSpec())
        return lambda state, rows, documents, *replicated: on_mesh(
            state.params, state.selection_bias, rows, documents, replicated
        )


def make_layout(
    config: RunConfig, devices: Sequence[Any] | None = None, model: Transformer | None = None
) -> Layout:
    """The layout of a run over `devices` (None: all there are); nothing is allocated.

    `model` gives another structure than the config's, such as one with a module swapped. Raises
    ValueError where the mesh needs another number of devices, or the recipe another GPU.
    """
    mesh = make_mesh(config.parallel, devices)
    _require_gpu_of_recipe(config.precision.recipe, mesh.devices.flat[0])
    if model is None:
        model = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(config.train.seed)))
    graph, params, bias = split_model(model)
    state = jax.eval_shape(lambda *parts: init_state(config.optimizer, *parts), params, bias)
    placements = jax.tree.map_with_path(lambda path, leaf: place(path, leaf.shape, mesh), params)
    return Layout(config, mesh, graph, state, placements)


def _require_gpu_of_recipe(recipe: str, device: Any) -> None:
    """ValueError for FP8 on a GPU whose tensor cores its kernels do not know."""
    if recipe != "fp8" or device.platform != "gpu" or device.compute_capability == HOPPER:
        return
    raise ValueError(
        f"precision.recipe is 'fp8', expected bf16 or fp32 on {device.device_kind} (compute"
        f" capability {device.compute_capability}): the FP8 kernels are for {HOPPER}, Hopper"
    )


def compute_params(params: nnx.State, recipe: str) -> nnx.State:
    """The weights in the dtype the model computes in; embedding, norms and routers stay FP32, and
    what is quantised comes from the FP32 weights."""
    chosen = make_recipe(recipe)
    kept_names = {"gate", "embed_tokens"} | (QUANTISED if chosen.rules else set())

    def cast(path, leaf):
        names = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        keep = not kept_names.isdisjoint(names) or any("norm" in name for name in names)
        return leaf if keep else leaf.astype(chosen.dtype)

    return jax.tree.map_with_path(cast, params)
