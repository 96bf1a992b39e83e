"""A matrix in 8 bits with a scale for each tile, as one value."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels.quantize.op import BLOCK, dequantize, quantize, quantize_transposed

Tile = tuple[int, int]


@dataclass(frozen=True)
class ScaledArray:
    """values * scale, tile by tile of the last two dims; dims before them are stacked matrices.

    `handle`, zeros of the same shape, stands for the matrix where it is differentiated: 8 bits
    cannot hold a gradient. Without one it is a constant.
    """

    values: Float[Array, "*batch rows columns"]
    scale: Float[Array, "*batch row_tiles column_tiles"]
    tile: Tile = (BLOCK, BLOCK)
    handle: Float[Array, "*batch rows columns"] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def nbytes(self) -> int:
        """Of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def __getitem__(self, index: Any) -> "ScaledArray":
        """Of the stacked matrices; `...` is all, as an nnx.Param asks for its value."""
        return jax.tree.map(lambda part: part[index], self)

    def dequantise(self, dtype: DTypeLike = jnp.float32) -> Float[Array, "*batch rows columns"]:
        """The values it stands for."""
        return dequantize(self.values, self.scale, self.tile, dtype)

    def transposed(self) -> "ScaledArray":
        """Rows and columns exchanged."""
        values, scale = (jnp.swapaxes(part, -1, -2) for part in (self.values, self.scale))
        return ScaledArray(values, scale, (self.tile[1], self.tile[0]))

    def of_rows(self) -> "ScaledArray":
        """The same in tiles of 1x128, the scale of a larger tile repeated."""
        rows, columns = self.shape[-2], -(-self.shape[-1] // BLOCK)
        scale = jnp.repeat(self.scale, self.tile[0], axis=-2)[..., :rows, :]
        scale = jnp.repeat(scale, -(-self.tile[1] // BLOCK), axis=-1)[..., :columns]
        return ScaledArray(self.values, scale, (1, BLOCK))


_PARTS = ("values", "scale", "handle")


def _flatten(scaled: ScaledArray):
    keys = (jax.tree_util.GetAttrKey(name) for name in _PARTS)
    parts = (scaled.values, scaled.scale, scaled.handle)
    return tuple(zip(keys, parts, strict=True)), scaled.tile


def _unflatten(tile: Tile, parts: Any) -> ScaledArray:
    """Of anything: JAX puts specs and markers where arrays were, which __init__ would not take."""
    scaled = object.__new__(ScaledArray)
    for name, part in (*zip(_PARTS, parts, strict=True), ("tile", tile)):
        object.__setattr__(scaled, name, part)
    return scaled


jax.tree_util.register_pytree_with_keys(ScaledArray, _flatten, _unflatten)


def quantise(
    x: Float[Array, "*batch rows columns"],
    tile: Tile | None = (BLOCK, BLOCK),
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    power_of_two: bool = False,
) -> ScaledArray:
    """`x` in 8 bits; `tile` None is one scale for a whole matrix."""
    if tile is None:
        tile = (x.shape[-2], -(-x.shape[-1] // BLOCK) * BLOCK)
    values, scale = quantize(x, tile, dtype=dtype, power_of_two=power_of_two)
    return ScaledArray(values, scale, tile)


def quantise_transposed(
    x: Float[Array, "*batch rows columns"],
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    power_of_two: bool = False,
) -> ScaledArray:
    """The transpose of `x` in tiles of 1x128: 128x1 of `x`."""
    values, scale = quantize_transposed(x, dtype=dtype, power_of_two=power_of_two)
    return ScaledArray(values, scale, (1, BLOCK))


def trained[T](tree: T) -> T:
    """`tree` with the handle of each `ScaledArray` in its place: what gradients are taken of."""
    return jax.tree.map(
        lambda leaf: leaf.handle if is_scaled(leaf) else leaf, tree, is_leaf=is_scaled
    )


def untrained(tree: Any) -> Any:
    """The rest of `tree`: each `ScaledArray` without its handle, None for an array."""

    def rest(leaf):
        return ScaledArray(leaf.values, leaf.scale, leaf.tile) if is_scaled(leaf) else None

    return jax.tree.map(rest, tree, is_leaf=is_scaled)


def with_handles[T](tree: T) -> T:
    """`tree` with a handle of FP32 zeros in each `ScaledArray`."""

    def give(leaf):
        return replace(leaf, handle=jnp.zeros(leaf.shape, jnp.float32)) if is_scaled(leaf) else leaf

    return jax.tree.map(give, tree, is_leaf=is_scaled)


def joined(rest: Any, of_trained: Any) -> Any:
    """The tree of which these are `untrained` and `trained`."""

    def join(leaf, handle):
        return handle if leaf is None else replace(leaf, handle=handle)

    return jax.tree.map(
        join, rest, of_trained, is_leaf=lambda leaf: leaf is None or is_scaled(leaf)
    )


def is_scaled(leaf: Any) -> bool:
    """Whether a leaf of a tree of weights is in 8 bits."""
    return isinstance(leaf, ScaledArray)


def scaled_spec(
    name: str, shape: tuple[int, ...], tile: Tile, spec: PartitionSpec, sizes: dict[str, int]
) -> PartitionSpec:
    """The spec of `values` and of `scale` alike, where a matrix of `shape` is split as `spec` over
    axes of these `sizes`. Raises ValueError where that would cut a tile."""
    for dim, axes in enumerate(spec):
        from_end = len(shape) - dim
        if axes is None or from_end > 2:
            continue
        names = axes if isinstance(axes, tuple) else (axes,)
        parts, height = math.prod(sizes[axis] for axis in names), tile[2 - from_end]
        if parts > 1 and shape[dim] % (parts * height):
            raise ValueError(
                f"{name} {list(shape)} split {parts} ways in dim {dim} has parts of"
                f" {shape[dim] / parts:g}, expected a multiple of {height}: a tile of"
                f" {tile[0]}x{tile[1]} with one scale is never cut"
            )
    return spec
