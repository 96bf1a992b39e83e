"""A model over a mesh for inference: experts spread over (node, gpu), all else on every device.

Tokens are split over (data, node, gpu), as in training; weights are whole, or of experts the
device's own, so nothing is gathered: no transfers but those to the experts and back.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config.checks import require
from dsv3_jax.parallel.mesh import AXES, EXPERT_AXES, PIPE_AXIS, TOKEN_AXES, used_axes
from dsv3_jax.parallel.sharding import EXPERT_DIM

EXPERTS = "experts"
"""Attribute of the model whose arrays have the expert as a dim."""
BY_TOKEN = PartitionSpec(TOKEN_AXES)
WHOLE = PartitionSpec()


def inference_mesh(mesh: Mesh) -> Mesh:
    """The devices of `mesh` on the axes `pipe data node gpu`.

    Raises ValueError for axes other than data, node and gpu, and for a pipe of several.

    >>> inference_mesh(jax.make_mesh((2, 4), ("node", "gpu"))).shape
    OrderedDict({'pipe': 1, 'data': 1, 'node': 2, 'gpu': 4})
    """
    is_mesh = isinstance(mesh, Mesh)
    require(is_mesh, "mesh", mesh, "a jax.sharding.Mesh with axes among data, node and gpu")
    sizes = {axis: int(size) for axis, size in mesh.shape.items()}
    for axis, size in sizes.items():
        known = axis in TOKEN_AXES or (axis == PIPE_AXIS and size == 1)
        require(known, f"mesh axis {axis!r} of size", size, "data, node and gpu, pipe only of 1")
    order = [axis for axis in AXES if axis in sizes]
    devices = mesh.devices.transpose([mesh.axis_names.index(axis) for axis in order])
    grid = devices.reshape([sizes.get(axis, 1) for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device_mesh(device: Any) -> Mesh:
    """The mesh of one device."""
    return inference_mesh(Mesh(np.array([device]), (EXPERT_AXES[-1],)))


def token_shards(mesh: Mesh) -> int:
    """Devices that requests are spread over: all of them."""
    return mesh.devices.size


def expert_devices(mesh: Mesh) -> int:
    """Devices over which the experts are spread."""
    return int(np.prod([mesh.shape[axis] for axis in EXPERT_AXES]))


def weight_spec(names: Sequence[str], expert_dim: int = EXPERT_DIM) -> PartitionSpec:
    """Where the array lies that these attributes lead to; experts are split along `expert_dim`, 1
    where layers are stacked."""
    return PartitionSpec(*[None] * expert_dim, EXPERT_AXES) if EXPERTS in names else WHOLE


def weight_specs(tree: Any, expert_dim: int = EXPERT_DIM) -> Any:
    """`weight_spec` of each array in a tree of modules."""

    def spec(path: tuple, _: Any) -> PartitionSpec:
        names = [jax.tree_util.keystr((key,), simple=True) for key in path]
        return weight_spec(names, expert_dim)

    return jax.tree_util.tree_map_with_path(spec, tree)


def place_weights(tree: Any, mesh: Mesh, expert_dim: int = EXPERT_DIM) -> Any:
    """The tree with its arrays on the mesh."""

    def place(leaf: Any, spec: PartitionSpec) -> Any:
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, weight_specs(tree, expert_dim))


def abstract_weights(tree: Any, mesh: Mesh, expert_dim: int = EXPERT_DIM) -> Any:
    """The shapes of a tree with the places where its arrays are to be."""

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, weight_specs(tree, expert_dim))


def check_division(experts: int, mesh: Mesh, name: str = "experts") -> None:
    """ValueError for experts that the devices of `mesh` do not divide."""
    count = expert_devices(mesh)
    require(experts % count == 0, name, experts, f"a multiple of the mesh's node x gpu = {count}")


def on_mesh(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """`function` on every device's own parts."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def agreement_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes over which devices have to agree on what they do next."""
    return used_axes(mesh, TOKEN_AXES)
