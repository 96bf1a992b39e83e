"""Where each parameter lies: on which axes, along which dim, and how it is gathered and reduced.

A stored parameter (FP32 master weight, with its moments) is a shard: experts are split by expert
over (node, gpu) and along another dim over data; everything else along one dim over (data, node,
gpu). A tensor none of whose dims divides is stored whole. Computing needs whole tensors (of experts
the device's own): `gather` before, `reduce` for the gradients after.
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.parallel.mesh import EXPERT_AXES, TOKEN_AXES, used_axes

STACKS = ("dense_layers", "moe_layers", "mtp")
"""Attributes of the model whose arrays have the layer as their first dim."""

EXPERT_DIM = 1
"""Of a stacked expert tensor: [layer, expert, ...]."""


@dataclass(frozen=True)
class Placement:
    """One parameter's. Axes are those with more than one device; none where there is one device.

    `axes` are those whose devices saw other tokens of the tensor; over them `dim` is split, or
    nothing if it is None. An expert tensor's expert dim is split over `expert_axes`.
    """

    dim: int | None
    axes: tuple[str, ...]
    expert_axes: tuple[str, ...]

    def spec(self) -> PartitionSpec:
        """As stored."""
        parts: dict[int, tuple[str, ...]] = {}
        if self.expert_axes:
            parts[EXPERT_DIM] = self.expert_axes
        if self.dim is not None:
            parts[self.dim] = self.axes
        return PartitionSpec(*(parts.get(dim) for dim in range(max(parts, default=-1) + 1)))

    def gather(self, shard: Float[Array, "..."], *, first_dim: int = 0) -> Float[Array, "..."]:
        """The whole tensor (of experts, this device's) from its shards.

        `first_dim` is 1 for one layer of a stack. The transpose adds up and splits gradients.
        """
        if self.dim is None:
            return shard
        # w[..., D/n] -> w[..., D]
        return jax.lax.all_gather(shard, self.axes, axis=self.dim - first_dim, tiled=True)

    def reduce(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        """This device's shard of the gradient summed over all devices."""
        if self.dim is not None:
            # g[..., D]{U_axes} -> g[..., D/n]
            return jax.lax.psum_scatter(gradient, self.axes, scatter_dimension=self.dim, tiled=True)
        return add_over(self.axes, gradient)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes whose devices hold different shards."""
        return self.expert_axes + (self.axes if self.dim is not None else ())


def add_over[T](axes: tuple[str, ...], values: T) -> T:
    """psum, and nothing where there are no axes."""
    return jax.lax.psum(values, axes) if axes else values


def place(path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> Placement:
    """The placement of the parameter at `path`, whose first dim is the layer if it is a stack's.

    Of the dims that the devices divide the largest is split, of equals the last.
    """
    names = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    is_expert, is_stack = "experts" in names, names[0] in STACKS
    expert_axes = used_axes(mesh, EXPERT_AXES) if is_expert else ()
    axes = tuple(axis for axis in used_axes(mesh, TOKEN_AXES) if axis not in expert_axes)
    count = math.prod(mesh.shape[axis] for axis in axes)
    first = 2 if is_expert else 1 if is_stack else 0
    fitting = [dim for dim in range(first, len(shape)) if shape[dim] % count == 0]
    dim = max(fitting, key=lambda d: (shape[d], d)) if fitting and axes else None
    return Placement(dim, axes, expert_axes)
