"""Quantisation in tiles on Hopper: one tile, one program.

    rows       x [m, k]     -> values [m, k]     scales [m, k/128]         tile  64 x 128 of x
    columns    x [k, m]     -> values [m, k]     scales [m, k/128]         tile 128 x  64 of x
    blocks     x [m, k]     -> values [m, k]     scales [m/128, k/128]     tile 128 x 128 of x

    program: one warpgroup
      TMA      tile of x  -> shared memory, zeros past the edges        arrives at a barrier
      read     64 x 128 values as a wgmma has them, columns transposed on the way (LDSM.T for BF16):
               a row lies in 4 threads of a warp, so its largest magnitude takes 2 shuffles
      compute  scale, values in 8 bits
      TMA      values, scales -> memory, which drops what is past the edges

      Blocks read their tile twice, 64 rows at a time: for the largest magnitude of all four warps,
      which they exchange through shared memory, and for the values.

Four or more programs share an SM, so that one's loads run beside another's arithmetic; 64 KB and
more are then under way, where memory's latency of about 1,000 cycles asks for 15 KB.

Bound: memory. BF16 in, 8 bits and 1/32 of a scale out: 3.03 bytes a value, of 3.35 TB/s / 132 SMs /
1.755 GHz = 14.5 bytes a cycle: 4.8 values a cycle. The four schedulers start 128 threads'
instructions in it: 26 a value, of which the kernels take 10 to 14.

Scales of rows leave as [k/128, m], a tile's side by side, and are transposed outside. `fp8_gemm` on
Hopper reads them as they left: of its transposition and this one the compiler makes none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels.quantize import tiles as sizes
from dsv3_kernels.quantize.reference import BLOCK, E4M3, MOST

LARGEST = float(jnp.finfo(E4M3).max)
ONE = 0x3F800000
"""The bits of 1.0."""
IN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
TILES = ((1, BLOCK), (BLOCK, BLOCK))


def quantize(
    x: Float[Array, "*batch rows columns"],
    tile: tuple[int, int] = (1, BLOCK),
    *,
    dtype: DTypeLike = E4M3,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch rows columns"], Float[Array, "*batch row_tiles column_tiles"]]:
    """As the reference, bit by bit. NotImplementedError: see `unsupported`."""
    if reason := unsupported(x, tile, dtype):
        raise NotImplementedError(f"quantize on Hopper: {reason}")
    *batch, rows, _ = x.shape
    if tile == (1, BLOCK):
        values, scale = _quantize_rows(x, power_of_two, transposed=False)
        return values.reshape(x.shape), scale.reshape(*batch, rows, scale.shape[-1])
    values, scale = _quantize_blocks(x, power_of_two)
    return values.reshape(x.shape), scale.reshape(*batch, *scale.shape[1:])


def quantize_transposed(
    x: Float[Array, "*batch rows columns"],
    *,
    dtype: DTypeLike = E4M3,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch columns rows"], Float[Array, "*batch columns row_tiles"]]:
    """The transpose of `x` in tiles of 1x128. NotImplementedError: see `unsupported`."""
    if reason := unsupported(x, (1, BLOCK), dtype):
        raise NotImplementedError(f"quantize_transposed on Hopper: {reason}")
    *batch, rows, columns = x.shape
    values, scale = _quantize_rows(x, power_of_two, transposed=True)
    return values.reshape(*batch, columns, rows), scale.reshape(*batch, columns, scale.shape[-1])


def unsupported(
    x: Float[Array, "*batch rows columns"], tile: tuple[int, int], dtype: DTypeLike
) -> str:
    """Why the kernels will not take these, or an empty string. Looks at shape and dtype only."""
    if x.dtype not in IN_DTYPES:
        return f"x is {x.dtype}, expected bfloat16 or float32"
    if x.size == 0:
        return f"x is {list(x.shape)}, expected at least one value"
    if tile not in TILES:
        return f"tile is {tile}, expected one of {TILES}"
    if jnp.dtype(dtype) != E4M3:
        return f"dtype is {jnp.dtype(dtype)}, expected {jnp.dtype(E4M3)}"
    return ""


def _quantize_rows(x: Array, power_of_two: bool, transposed: bool) -> tuple[Array, Array]:
    """Values [batch, m, k] and scales [batch, m, k/128] of rows of x, or of its transpose."""
    m, k = x.shape[:-3:-1] if transposed else x.shape[-2:]
    x = _fill_up(x)
    batch, m_filled, k_filled = x.shape[0], *(x.shape[:0:-1] if transposed else x.shape[1:])
    assert m_filled % sizes.M == 0
    k_tiles = -(-k // BLOCK)
    values, scale = plgpu.kernel(
        functools.partial(_rows_kernel, power_of_two, transposed),
        out_type=(
            jax.ShapeDtypeStruct((batch, m_filled, k_filled), E4M3),
            jax.ShapeDtypeStruct((batch, k_tiles, m_filled), jnp.float32),
        ),
        grid=(k_tiles, -(-m // sizes.M), batch),
        grid_names=("k", "m", "batch"),
        kernel_name="quantize_columns" if transposed else "quantize_rows",
        scratch_types=dict(
            x_smem=buffer((BLOCK, sizes.M) if transposed else (sizes.M, BLOCK), x.dtype),
            values_smem=buffer((sizes.M, BLOCK), E4M3, k_filled),
            scale_smem=plgpu.SMEM((sizes.M,), jnp.float32),
            arrived=plgpu.Barrier(),
        ),
        cost_estimate=_cost(x),
    )(x)
    return values[:, :m, :k], jnp.swapaxes(scale, -1, -2)[:, :m]


def _quantize_blocks(x: Array, power_of_two: bool) -> tuple[Array, Array]:
    """Values [batch, m, k] and scales [batch, m/128, k/128]."""
    m, k = x.shape[-2:]
    x = _fill_up(x)
    grid = -(-k // BLOCK), -(-m // BLOCK), x.shape[0]
    values, scale = plgpu.kernel(
        functools.partial(_blocks_kernel, power_of_two),
        out_type=(
            jax.ShapeDtypeStruct(x.shape, E4M3),
            jax.ShapeDtypeStruct(grid[::-1], jnp.float32),
        ),
        grid=grid,
        grid_names=("k", "m", "batch"),
        kernel_name="quantize_blocks",
        scratch_types=dict(
            x_smem=buffer((BLOCK, BLOCK), x.dtype),
            values_smem=buffer((BLOCK, BLOCK), E4M3, x.shape[-1]),
            arrived=plgpu.Barrier(),
        ),
        cost_estimate=_cost(x),
    )(x)
    return values[:, :m, :k], scale


def _rows_kernel(
    power_of_two, transposed, x, values, scales, *, x_smem, values_smem, scale_smem, arrived
):
    e, i, j = (lax.axis_index(axis) for axis in ("batch", "m", "k"))
    rows, columns = pl.ds(i * sizes.M, sizes.M), pl.ds(j * BLOCK, BLOCK)
    source = x.at[e, columns, rows] if transposed else x.at[e, rows, columns]
    plgpu.copy_gmem_to_smem(source, x_smem, arrived)
    plgpu.barrier_wait(arrived)
    # 8 bits leave the registers 4 at a time where 4 values may lie side by side in a thread; two
    # are what LDSM transposes.
    layout = plgpu.Layout.WGMMA if transposed else plgpu.Layout.WGMMA_8BIT
    tile = load(x_smem.transpose((1, 0)) if transposed else x_smem, layout)
    scale = scale_of(jnp.max(magnitude(tile), axis=1), power_of_two)
    inverse = reciprocal(scale, power_of_two)
    values_smem[...] = quantised(tile, lax.broadcast_in_dim(inverse, tile.shape, (0,)))
    scale_smem[...] = scale
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values.at[e, rows, columns])
    # Becomes a plain copy, which would not stop at the end of a row: m is a multiple of 64 here.
    plgpu.copy_smem_to_gmem(scale_smem, scales.at[e, j, rows])
    plgpu.wait_smem_to_gmem(0)


def _blocks_kernel(power_of_two, x, values, scales, *, x_smem, values_smem, arrived):
    e, i, j = (lax.axis_index(axis) for axis in ("batch", "m", "k"))
    block = pl.ds(i * BLOCK, BLOCK), pl.ds(j * BLOCK, BLOCK)
    plgpu.copy_gmem_to_smem(x.at[e, *block], x_smem, arrived)
    plgpu.barrier_wait(arrived)
    layout = plgpu.Layout.WGMMA_8BIT
    halves = [pl.ds(start, sizes.M) for start in range(0, BLOCK, sizes.M)]
    of_rows = [jnp.max(magnitude(load(x_smem.at[half], layout)), axis=1) for half in halves]
    # One number, computed as the scales of 64 rows are.
    amax = lax.broadcast(jnp.max(jnp.maximum(*of_rows)), (sizes.M,))
    scale = scale_of(plgpu.layout_cast(amax, layout.reduce(1)), power_of_two)
    inverse = lax.broadcast_in_dim(reciprocal(scale, power_of_two), (sizes.M, BLOCK), (0,))
    for half in halves:
        values_smem[half] = quantised(load(x_smem.at[half], layout), inverse)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values.at[e, *block])
    scales[e, i, j] = jnp.max(scale)
    plgpu.wait_smem_to_gmem(0)


def load(ref: Any, layout: plgpu.Layout) -> Array:
    return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)


def magnitude(tile: Array) -> Array:
    return jnp.where(tile == tile, jnp.abs(tile), jnp.float32(0))  # NaN counts as 0


def scale_of(amax: Array, power_of_two: bool) -> Array:
    """The reference's `scale_of`, whose division by a constant XLA makes this product."""
    finfo = jnp.finfo(jnp.float32)
    scale = jnp.maximum(jnp.minimum(amax, MOST) * jnp.float32(1 / LARGEST), finfo.tiny)
    if power_of_two:
        scale = _float((_bits(scale) + 0x7FFFFF) & 0x7F800000)
    return jnp.where(amax == 0, jnp.float32(1), scale)


def reciprocal(scale: Array, power_of_two: bool) -> Array:
    """1 / scale to the nearest. Mosaic's own division is off by up to 2 units of the last place."""
    if power_of_two:
        return _float(2 * ONE - _bits(scale))
    mantissa = _float((_bits(scale) & 0x7FFFFF) | ONE)
    inverse = refine_reciprocal(mantissa, 1 / mantissa)
    return _float(_bits(inverse) - ((_bits(scale) & 0x7F800000) - ONE))


def refine_reciprocal(x: Array, rough: Array) -> Array:
    """1 / x to the nearest for x in [1, 2), from a value up to 3 units of the last place off.

    A step of Newton's, which is at most a unit off, and a choice between neighbours.
    """
    inverse = rough + rough * _one_minus_product(x, rough)
    off, half_unit = _one_minus_product(x, inverse), x * jnp.float32(2**-25)
    up = jnp.where(off > half_unit, jnp.int32(1), jnp.int32(0))
    down = jnp.where(off < -half_unit, jnp.int32(1), jnp.int32(0))
    return _float(_bits(inverse) + up - down)


def _one_minus_product(x: Array, y: Array) -> Array:
    (x_high, x_low), (y_high, y_low) = _halves(x), _halves(y)
    return (((1 - x_high * y_high) - x_low * y_high) - x_high * y_low) - x_low * y_low


def _halves(x: Array) -> tuple[Array, Array]:
    """x as a sum of two numbers of 12 bits."""
    high = _float(_bits(x) & -0x1000)
    return high, x - high


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def quantised(tile: Array, inverse: Array) -> Array:
    return jnp.clip(tile * inverse, -LARGEST, LARGEST).astype(E4M3)


def _fill_up(x: Array) -> Array:
    """`x` as [batch, ...], its last two dims filled up with zeros to what TMA can tile."""
    x = x.reshape(-1, *x.shape[-2:])
    rows, columns = (-size % sizes.MULTIPLE for size in x.shape[1:])
    return jnp.pad(x, [(0, 0), (0, rows), (0, columns)]) if rows or columns else x


def buffer(shape: tuple[int, int], dtype: DTypeLike, columns: int = 0) -> Any:
    """A tile for TMA, in pieces of 128 bytes of a row, or less if they do not divide `columns`."""
    itemsize = jnp.dtype(dtype).itemsize
    width = 128 if columns * itemsize % 128 == 0 else 64
    pieces = plgpu.TilingTransform((8, width // itemsize))  # pyright: ignore[reportAbstractUsage]
    swizzle = plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(shape, dtype, transforms=(pieces, swizzle))


def _cost(x: Array) -> pl.CostEstimate:
    read_and_written = x.size * (x.dtype.itemsize + 1)
    return pl.CostEstimate(flops=4 * x.size, bytes_accessed=read_and_written, transcendentals=0)
