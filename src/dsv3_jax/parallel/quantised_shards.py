"""Quantising a matrix of which every device stores a part, without gathering it first.

A block's scale needs the largest magnitude of the whole block, and a part may hold a fraction of
one. So devices exchange the largest magnitudes of pieces that are in one part and in one block
(1/1024 of the matrix and less), and each quantises its own part: what is gathered then is 8 bits
wide, and no block is ever cut.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.parallel.mesh import PIPE_AXIS
from dsv3_jax.parallel.sharding import Placement
from dsv3_jax.quant.formats import E4M3, E4M3_MAX
from dsv3_jax.quant.scaled_array import ScaledArray
from dsv3_kernels.quantize.op import BLOCK
from dsv3_kernels.quantize.reference import in_tiles, scale_of


def quantise_shard(
    shard: Float[Array, "*stack rows_local columns_local"], placement: Placement
) -> ScaledArray:
    """This device's part of the values, and the scales of all 128x128 blocks of its matrices.

    Inside shard_map. Experts that are split over devices stay so.
    """
    rows, columns = shard.ndim - 2, shard.ndim - 1
    piece = _piece(shard, placement, rows), _piece(shard, placement, columns)
    magnitude = jnp.abs(shard.astype(jnp.float32))
    magnitude = jnp.where(jnp.isnan(magnitude), 0, magnitude)
    pieces = jnp.max(in_tiles(magnitude, piece), axis=(-3, -1))
    whole = _gather(pieces, placement)
    in_block = (BLOCK // piece[0], BLOCK // piece[1])
    amax = jnp.max(in_tiles(whole, in_block), axis=(-3, -1))
    scale = scale_of(amax, jnp.float32(E4M3_MAX), power_of_two=False)
    inverse = _own_part(1 / scale, in_block, pieces.shape, placement)
    tiles = in_tiles(shard.astype(jnp.float32), piece) * inverse[..., :, None, :, None]
    values = jnp.clip(tiles, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    whole_values = values.reshape(*values.shape[:-4], pieces.shape[-2] * piece[0], -1)
    return ScaledArray(whole_values[..., : shard.shape[-2], : shard.shape[-1]], scale)


def _piece(shard: Array, placement: Placement, dim: int) -> int:
    """Along `dim`, what fits into parts and blocks alike."""
    is_split = dim in (placement.dim, placement.pipe_dim)
    return math.gcd(BLOCK, shard.shape[dim]) if is_split else BLOCK


def _gather(pieces: Float[Array, "*stack rows columns"], placement: Placement) -> Array:
    """The pieces of whole matrices, of all pipeline ranks too."""
    if placement.pipe_dim is not None:
        pieces = jax.lax.all_gather(pieces, PIPE_AXIS, axis=placement.pipe_dim, tiled=True)
    return placement.gather_tokens(pieces)


def _own_part(
    of_blocks: Float[Array, "*stack row_blocks column_blocks"],
    in_block: tuple[int, int],
    shape: tuple[int, ...],
    placement: Placement,
) -> Float[Array, "*stack rows columns"]:
    """The value of its block for each piece of this device, `shape` of them."""
    part = of_blocks
    for dim in range(part.ndim):
        if dim >= part.ndim - 2:
            part = jnp.repeat(part, in_block[dim - part.ndim], axis=dim)
        # As `Placement.spec` has it: over the token axes first, over pipe within.
        index = jnp.int32(0)
        if dim == placement.dim:
            index = jax.lax.axis_index(placement.axes)
        if dim == placement.pipe_dim:
            ranks = jax.lax.axis_size(PIPE_AXIS)
            index = index * ranks + jax.lax.axis_index(PIPE_AXIS)
        part = jax.lax.dynamic_slice_in_dim(part, index * shape[dim], shape[dim], dim)
    return part
