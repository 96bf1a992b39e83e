"""A pipeline rank's weights: those of its own stages, from the shards of all ranks, and back.

What is stored has the model's order and is split over all devices (parallel/sharding.py). Once a
step every rank picks its layers out of every rank's shards (one all-to-all over pipe) and gathers
them over the token axes. A DualPipe rank gets both its stages so, though another rank has the same
ones; the transpose adds up the gradients of both.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import DictKey
from jaxtyping import Array, Float, Int32

from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.pipeline.stages import StageTables
from dsv3_jax.parallel.quantised_shards import quantise_shard
from dsv3_jax.parallel.sharding import VOCABULARY, Placement, add_over
from dsv3_jax.quant.scaled_array import ScaledArray

Path = tuple[str, ...]
RankWeights = dict[str, dict[Path, Any]]
"""Arrays, or FP8 `ScaledArray`s, by group and path in the layer:

    block    norms and attention, [rows, ...]               of every layer
    moe      router, experts, shared experts, [rows, ...]   of MoE layers and MTP modules
    dense    MLPs, [dense_rows, ...]                        of dense layers
    mtp      what an MTP module has beside its layer, [modules, ...]
    whole    final norm; embedding and head, this rank's part of the vocabulary
"""


def names_of(path: tuple) -> Path:
    return tuple(str(part.key) for part in path if isinstance(part, DictKey))


def group_of(names: Path) -> tuple[str, Path]:
    """The group and the path in the layer of a parameter, e.g. ("moe", ("mlp", "gate", "weight"))
    of mtp/block/mlp/gate/weight."""
    stack, *rest = names
    if stack not in ("dense_layers", "moe_layers", "mtp"):
        return "whole", names
    if stack == "mtp":
        if rest[0] != "block":
            return "mtp", tuple(rest)
        rest = rest[1:]
    if rest[0] != "mlp":
        return "block", tuple(rest)
    return "dense" if stack == "dense_layers" else "moe", tuple(rest)


@dataclass(frozen=True, eq=False)
class StageWeights:
    """Gathers and reduces inside shard_map; `placements` are those of the stored parameters."""

    tables: StageTables
    placements: nnx.State
    vocab_size: int
    quantised: frozenset[str] = frozenset()
    """Attributes whose matrices are computed with in FP8."""

    @property
    def ranks(self) -> int:
        return self.tables.kind.shape[0]

    @property
    def vocabulary_rows(self) -> int:
        """Rows of the embedding and of the head on each rank; the last rank's may be padding."""
        return -(-self.vocab_size // self.ranks)

    def gather(self, shards: nnx.State) -> RankWeights:
        """This rank's weights in the dtype of the shards, FP8 where they are quantised."""
        return self._gather(shards, self.quantised)

    def _gather(self, shards: nnx.State, quantised: frozenset[str]) -> RankWeights:
        parts: dict[tuple[str, Path], list[tuple[Array, Placement]]] = {}
        placements = jax.tree.leaves(
            self.placements, is_leaf=lambda leaf: isinstance(leaf, Placement)
        )
        leaves = jax.tree.leaves_with_path(shards)
        for (path, shard), placement in zip(leaves, placements, strict=True):
            parts.setdefault(group_of(names_of(path)), []).append((shard, placement))
        result: RankWeights = {}
        for (group, names), found in parts.items():
            gather = self._gather_whole if group == "whole" else self._gather_rows
            if not quantised.isdisjoint(names):
                gather = self._gather_quantised
            result.setdefault(group, {})[names] = gather(group, names, found)
        return result

    def _gather_rows(
        self, group: str, names: Path, found: list[tuple[Array, Placement]]
    ) -> Float[Array, "rows ..."]:
        placement = found[0][1]
        assert all(other == placement for _, other in found), (group, names)
        stacked = jnp.concatenate([shard for shard, _ in found])
        table = self._table(group, stacked.shape[0])
        if placement.pipe_dim is None:
            mine = stacked[jnp.asarray(table)[jax.lax.axis_index(PIPE_AXIS)]]
        else:
            # w[layers, ..., D/p] -> w[rows, ..., D], every rank its own rows
            picked = stacked[jnp.asarray(table)]
            dim = placement.pipe_dim + 1
            mine = jax.lax.all_to_all(picked, PIPE_AXIS, 0, dim, tiled=True)[0]
        return placement.gather_tokens(mine)

    def _gather_quantised(
        self, group: str, names: Path, found: list[tuple[Array, Placement]]
    ) -> ScaledArray:
        """What is quantised where it is stored, and sent in 8 bits."""
        placement = found[0][1]
        parts = [quantise_shard(shard, placement) for shard, _ in found]
        as_bytes = [jax.lax.bitcast_convert_type(part.values, jnp.uint8) for part in parts]
        scale = jnp.concatenate([part.scale for part in parts])
        shards = [(shard, placement) for shard in as_bytes]
        values = jax.lax.bitcast_convert_type(
            self._gather_rows(group, names, shards), parts[0].values.dtype
        )
        table = self._table(group, scale.shape[0])
        mine = scale[jnp.asarray(table)[jax.lax.axis_index(PIPE_AXIS)]]
        return ScaledArray(values, mine, parts[0].tile)

    def _table(self, group: str, count: int) -> Int32[np.ndarray, "ranks rows"]:
        """The rows of the stacked layers that each rank takes."""
        every = np.broadcast_to(np.arange(count, dtype=np.int32), (self.ranks, count))
        tables = self.tables
        return {"block": tables.block, "moe": tables.routed, "dense": tables.dense, "mtp": every}[
            group
        ]

    def _gather_whole(self, group: str, names: Path, found: list[tuple[Array, Placement]]) -> Array:
        del group
        ((shard, placement),) = found
        if names[0] not in VOCABULARY:
            return placement.gather(shard)
        whole = placement.gather_tokens(shard)
        if placement.pipe_dim is not None:
            return whole
        rows = self.vocabulary_rows
        padded = jnp.pad(whole, [(0, rows * self.ranks - whole.shape[0]), (0, 0)])
        first = jax.lax.axis_index(PIPE_AXIS) * rows
        return jax.lax.dynamic_slice_in_dim(padded, first, rows)

    def reduce(self, gradients: RankWeights, shards: nnx.State) -> nnx.State:
        """The stored shards of the gradients summed over all devices, of the shapes of `shards`."""
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shards)
        gather = partial(self._gather, quantised=frozenset())
        (transposed,) = jax.linear_transpose(gather, abstract)(gradients)

        def add(gradient, placement):
            missing = placement.axes if placement.dim is None else ()
            missing += (PIPE_AXIS,) if placement.pipe_dim is None else ()
            return add_over(missing, gradient)

        return jax.tree.map(add, transposed, self.placements)


def rows_of_state(state: nnx.State, rows: Mapping[str, Mapping[Path, Any]], stack: str) -> Any:
    """The tree of one layer of `stack`, its leaves taken from `rows` by group and path."""

    def take(path, _):
        group, names = group_of((stack, *names_of(path)))
        return rows[group][names]

    return jax.tree.map_with_path(take, state)
