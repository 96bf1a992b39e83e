"""Where each parameter lies: on which axes, along which dim, and how it is gathered and reduced.

A stored parameter (FP32 master weight, with its moments) is a shard: experts are split by expert
over (node, gpu) and along another dim over data; everything else along one dim over (data, node,
gpu). In a pipeline every tensor is split over pipe as well, along any of its dims, whichever stage
computes with it: so what is stored has the model's own order and does not depend on the pipeline. A
tensor none of whose dims divides is stored whole. Computing needs whole tensors (of experts the
device's own): `gather` before, `reduce` for the gradients after; a pipeline has its own way
(train/pipeline_weights.py).
"""

import math
from dataclasses import dataclass

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float

from dsv3_jax.parallel.mesh import EXPERT_AXES, PIPE_AXIS, TOKEN_AXES, used_axes

STACKS = ("dense_layers", "moe_layers", "mtp")
"""Attributes of the model whose arrays have the layer as their first dim."""

VOCABULARY = ("embed_tokens", "lm_head")
"""Attributes of the model whose arrays have the vocabulary as their first dim."""

EXPERT_DIM = 1
"""Of a stacked expert tensor: [layer, expert, ...]."""


@dataclass(frozen=True)
class Placement:
    """One parameter's. Axes are those with more than one device; none where there is one device.

    `axes` are those whose devices saw other tokens of the tensor; over them `dim` is split, or
    nothing if it is None. An expert tensor's expert dim is split over `expert_axes`. In a pipeline
    `pipe_dim` is split over pipe, after `axes` where both are one dim, or nothing if it is None.
    """

    dim: int | None
    axes: tuple[str, ...]
    expert_axes: tuple[str, ...]
    pipe_dim: int | None = None

    def spec(self) -> PartitionSpec:
        """As stored."""
        parts: dict[int, tuple[str, ...]] = {}
        if self.expert_axes:
            parts[EXPERT_DIM] = self.expert_axes
        if self.dim is not None:
            parts[self.dim] = self.axes
        if self.pipe_dim is not None:
            parts[self.pipe_dim] = (*parts.get(self.pipe_dim, ()), PIPE_AXIS)
        return PartitionSpec(*(parts.get(dim) for dim in range(max(parts, default=-1) + 1)))

    def gather(self, shard: Float[Array, "..."], *, first_dim: int = 0) -> Float[Array, "..."]:
        """The whole tensor (of experts, this device's) from its shards.

        `first_dim` is 1 for one layer of a stack. The transpose adds up and splits gradients.
        """
        if self.pipe_dim is not None:
            # w[..., D/pn] -> w[..., D/n]
            dim = self.pipe_dim - first_dim
            shard = jax.lax.all_gather(shard, PIPE_AXIS, axis=dim, tiled=True)
        return self.gather_tokens(shard, first_dim=first_dim)

    def gather_tokens(
        self, shard: Float[Array, "..."], *, first_dim: int = 0
    ) -> Float[Array, "..."]:
        """`gather` over `axes` alone."""
        if self.dim is None:
            return shard
        # w[..., D/n] -> w[..., D]
        return jax.lax.all_gather(shard, self.axes, axis=self.dim - first_dim, tiled=True)

    def reduce(self, gradient: Float[Array, "..."]) -> Float[Array, "..."]:
        """This device's shard of the gradient summed over all devices; without a pipeline."""
        if self.dim is not None:
            # g[..., D]{U_axes} -> g[..., D/n]
            return jax.lax.psum_scatter(gradient, self.axes, scatter_dimension=self.dim, tiled=True)
        return add_over(self.axes, gradient)

    @property
    def shard_axes(self) -> tuple[str, ...]:
        """The axes whose devices hold different shards."""
        over_tokens = self.axes if self.dim is not None else ()
        return self.expert_axes + over_tokens + ((PIPE_AXIS,) if self.pipe_dim is not None else ())


def add_over[T](axes: tuple[str, ...], values: T) -> T:
    """psum, and nothing where there are no axes."""
    return jax.lax.psum(values, axes) if axes else values


def place(path: tuple, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> Placement:
    """The placement of the parameter at `path`, whose first dim is the layer if it is a stack's.

    Of the dims that the devices divide the largest is split, of equals the last; in a pipeline the
    vocabulary is the first choice for pipe and left to it alone.
    """
    names = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    is_expert, is_stack = "experts" in names, names[0] in STACKS
    expert_axes = used_axes(mesh, EXPERT_AXES) if is_expert else ()
    axes = tuple(axis for axis in used_axes(mesh, TOKEN_AXES) if axis not in expert_axes)
    count, stages = math.prod(mesh.shape[axis] for axis in axes), mesh.shape[PIPE_AXIS]
    first = 2 if is_expert else 1 if is_stack else 0
    dims = range(first, len(shape))
    of_vocabulary = stages > 1 and names[0] in VOCABULARY
    for_tokens = [d for d in dims if shape[d] % count == 0 and not (of_vocabulary and d == 0)]
    dim = max(for_tokens, key=lambda d: (shape[d], d)) if for_tokens and axes else None
    if stages == 1:
        return Placement(dim, axes, expert_axes)
    left = {d: shape[d] // (count if d == dim else 1) for d in dims}
    for_pipe = [d for d in ((0,) if of_vocabulary else dims) if left[d] % stages == 0]
    return Placement(dim, axes, expert_axes, max(for_pipe, key=lambda d: left[d], default=None))
