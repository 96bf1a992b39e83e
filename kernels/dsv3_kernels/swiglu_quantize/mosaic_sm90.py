"""SwiGLU and quantisation on Hopper: one tile, one program, and a is never in memory.

    rows         h [m, 2f]    -> values [m, f]    scales [m, f/128]      tile  64 x 128 of a
    transposed   h [m, 2f]    -> values [f, m]    scales [f, m/128]      tile 128 x  64 of a
    backward     h, d_a       -> d_h [m, 2f]      d_weights [m]          tile  64 x 128 of d_a

                 column j           f + j             one of m/64 rows of f/128 tiles of a
           +------+------+------+------+------+------+
      h    |      | gate |      |      |  up  |      |
           +------+------+------+------+------+------+

    program: one warpgroup
      TMA      tiles of gate and up, and of d_a -> shared memory, zeros past the last row; each
               arrives at the one barrier. Meanwhile the rows' weights -> registers
      pieces   64 x 64 values at a time, 32 of a thread:
                 e = 2^(-gate log2 e), gate / (1 + e) * up * weight, in h's dtype over gate
                 backward: d_gate over gate, d_up over up, a part of d_weight for each row
      read     all of a as `quantize` does, transposed on the way; a row lies in 4 threads of a warp
               scale, values in 8 bits
      TMA      values, scales -> memory, or d_gate, d_up

    A program whose rows are not filled reads nothing, and writes zeros; one that has a few of them
    puts zeros over h first.

Each row's weight gradient leaves as a part for each tile, [f/128, m], which XLA adds up.

Bound: memory, whose share of an SM is 14.5 bytes a cycle (`quantize`). Of a value of a, in BF16:

    rows, transposed    4 bytes in, 1.03 out    2.9 values a cycle    44 instructions of a thread
    backward            6 bytes in, 4 out       1.5 values a cycle    88 instructions of a thread

The kernels take 25 to 33, and 23 to 36 backward. Exponential and reciprocal are 2 of 16 a cycle:
8 values. Without the pieces a thread holds gate, up and a of a whole tile in up to 219 registers,
and two programs share an SM, not three or four; backward, with 166 to 183, two or three do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from dsv3_kernels.quantize.mosaic_sm90 import (
    buffer,
    load,
    magnitude,
    quantised,
    reciprocal,
    scale_of,
)
from dsv3_kernels.quantize.reference import BLOCK, E4M3
from dsv3_kernels.swiglu_quantize import tiles as sizes
from dsv3_kernels.swiglu_quantize.plan import Plan, unsupported
from dsv3_kernels.swiglu_quantize.reference import silu, silu_and_slope

__all__ = ["swiglu_backward", "swiglu_quantize", "swiglu_quantize_transposed", "unsupported"]
PIECE = plgpu.Layout.WGMMA
"""Of the 64 x 64 values that are computed at once: 32 registers of a thread a matrix."""


def swiglu_quantize(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch rows width"], Float[Array, "*batch rows width_tiles"]]:
    """As the reference but for last places of exp and quotient; NotImplementedError: `unsupported`.

    An F that is no multiple of 128, or rows that are none, cost a copy.
    """
    plan = Plan.of("swiglu_quantize", h, weights, filled, power_of_two)
    *batch, rows, _ = h.shape
    values, scales = _quantize(plan, h, weights, filled)
    values, scales = values[:, :rows, : plan.width], scales[:, :rows]
    return values.reshape(*batch, *values.shape[1:]), scales.reshape(*batch, *scales.shape[1:])


def swiglu_quantize_transposed(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch width rows"], Float[Array, "*batch width row_tiles"]]:
    """As above, of the transpose of a."""
    plan = Plan.of("swiglu_quantize_transposed", h, weights, filled, power_of_two)
    *batch, rows, _ = h.shape
    values, scales = _quantize(plan, h, weights, filled)
    values, scales = values[:, : plan.width, :rows], scales[:, : plan.width]
    return values.reshape(*batch, *values.shape[1:]), scales.reshape(*batch, *scales.shape[1:])


def swiglu_backward(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None,
    d_a: Float[Array, "*batch rows width"],
    filled: Int[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch rows double_width"], Float[Array, "*batch rows"] | None]:
    """As the reference but for last places; NotImplementedError: see `unsupported`."""
    plan = Plan.of("swiglu_backward", h, weights, filled, d_a=d_a)
    rows, width = plan.rows, plan.width
    d_h, *parts = _backward(plan, h, weights, d_a, filled)
    if plan.filled_width != width:
        d_h = d_h.reshape(*d_h.shape[:2], 2, -1)[..., :width].reshape(*d_h.shape[:2], -1)
    d_h = d_h[:, :rows].reshape(h.shape)
    if weights is None:
        return d_h, None
    return d_h, jnp.sum(parts[0], axis=1)[:, :rows].reshape(weights.shape)


def _quantize(
    plan: Plan, h: Array, weights: Array | None, filled: Array | None
) -> tuple[Array, Array]:
    """Values [batch, m, k] and scales [batch, m, k/128] of a, or of its transpose."""
    m, k = plan.filled_rows, plan.filled_width
    if plan.is_transposed:
        m, k = k, m
    tile = (BLOCK, sizes.M) if plan.is_transposed else (sizes.M, BLOCK)
    values, scales = _kernel(
        plan,
        _quantize_kernel,
        (k // BLOCK, m // sizes.M),
        out_type=(
            jax.ShapeDtypeStruct((plan.batch, m, k), E4M3),
            jax.ShapeDtypeStruct((plan.batch, k // BLOCK, m), jnp.float32),
        ),
        scratch=dict(
            gate_smem=buffer(tile, plan.dtype),
            up_smem=buffer(tile, plan.dtype),
            values_smem=buffer((sizes.M, BLOCK), E4M3),
            scale_smem=plgpu.SMEM((sizes.M,), jnp.float32),
            arrived=plgpu.Barrier(num_arrivals=2),
        ),
    )(plan.matrices(h, parts=2), *plan.of_rows(weights, filled))
    return values, jnp.swapaxes(scales, -1, -2)


def _backward(
    plan: Plan, h: Array, weights: Array | None, d_a: Array, filled: Array | None
) -> tuple[Array, ...]:
    """d_h [batch, rows, 2 filled_width], and the parts of d_weights [batch, tiles, filled_rows]."""
    tile = sizes.M, BLOCK
    tiles = plan.filled_width // BLOCK
    out_type = [jax.ShapeDtypeStruct((plan.batch, plan.rows, 2 * plan.filled_width), h.dtype)]
    if plan.has_weights:
        parts = plan.batch, tiles, plan.filled_rows
        out_type += [jax.ShapeDtypeStruct(parts, jnp.float32)]
    return _kernel(
        plan,
        _backward_kernel,
        (tiles, -(-plan.rows // sizes.M)),
        out_type=tuple(out_type),
        scratch=dict(
            gate_smem=buffer(tile, plan.dtype),
            up_smem=buffer(tile, plan.dtype),
            d_a_smem=buffer(tile, d_a.dtype),
            arrived=plgpu.Barrier(num_arrivals=3),
        ),
    )(plan.matrices(h, parts=2), plan.matrices(d_a), *plan.of_rows(weights, filled))


def _kernel(plan: Plan, body: Any, grid: tuple[int, int], out_type: Any, scratch: dict) -> Any:
    return plgpu.kernel(
        functools.partial(body, plan),
        out_type=out_type,
        grid=(*grid, plan.batch),
        grid_names=("k", "m", "batch"),
        kernel_name=plan.name,
        scratch_types=scratch,
        cost_estimate=plan.cost,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )


def _quantize_kernel(plan, h, *refs, gate_smem, up_smem, values_smem, scale_smem, arrived):
    weights, filled, (values, scales) = plan.split(refs)
    e, i, j = (lax.axis_index(axis) for axis in ("batch", "m", "k"))
    tile = pl.ds(i * sizes.M, sizes.M), pl.ds(j * BLOCK, BLOCK)
    rows, columns = tile[::-1] if plan.is_transposed else tile
    # 8 bits leave the registers 4 at a time where 4 values may lie side by side in a thread; two
    # are what LDSM transposes.
    layout = plgpu.Layout.WGMMA if plan.is_transposed else plgpu.Layout.WGMMA_8BIT

    def compute():
        up_columns = pl.ds(columns.start + plan.filled_width, columns.size)
        plgpu.copy_gmem_to_smem(h.at[e, rows, columns], gate_smem, arrived)
        plgpu.copy_gmem_to_smem(h.at[e, rows, up_columns], up_smem, arrived)
        weight_of = _weights(weights, filled, e, rows)
        plgpu.barrier_wait(arrived)
        _clear_rows((gate_smem, up_smem), filled, e, rows)
        for piece in _pieces(gate_smem):
            gate, up = (load(smem.at[piece], PIECE) for smem in (gate_smem, up_smem))
            a = silu(gate) * up
            if weights is not None:
                a *= lax.broadcast_in_dim(weight_of[piece[0].start], a.shape, (0,))
            gate_smem[piece] = a.astype(plan.dtype)
        a = load(gate_smem.transpose((1, 0)) if plan.is_transposed else gate_smem, layout)
        scale = scale_of(jnp.max(magnitude(a), axis=1), plan.power_of_two)
        inverse = reciprocal(scale, plan.power_of_two)
        values_smem[...] = quantised(a, lax.broadcast_in_dim(inverse, a.shape, (0,)))
        scale_smem[...] = scale

    def leave_empty():
        values_smem[...] = _constant(0, values_smem.shape, layout).astype(E4M3)
        scale_smem[...] = _constant(1, scale_smem.shape, layout.reduce(1))

    _if_any(filled, e, rows, compute, leave_empty)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(values_smem, values.at[e, *tile])
    # Becomes a plain copy, which would not stop at the end of a row: m is a multiple of 128 here.
    plgpu.copy_smem_to_gmem(scale_smem, scales.at[e, j, tile[0]])
    plgpu.wait_smem_to_gmem(0)


def _backward_kernel(plan, h, d_a, *refs, gate_smem, up_smem, d_a_smem, arrived):
    weights, filled, (d_h, *parts) = plan.split(refs)
    e, i, j = (lax.axis_index(axis) for axis in ("batch", "m", "k"))
    rows, columns = pl.ds(i * sizes.M, sizes.M), pl.ds(j * BLOCK, BLOCK)
    up_columns = pl.ds(columns.start + plan.filled_width, BLOCK)

    def compute():
        plgpu.copy_gmem_to_smem(h.at[e, rows, columns], gate_smem, arrived)
        plgpu.copy_gmem_to_smem(h.at[e, rows, up_columns], up_smem, arrived)
        plgpu.copy_gmem_to_smem(d_a.at[e, rows, columns], d_a_smem, arrived)
        weight_of = _weights(weights, filled, e, rows)
        plgpu.barrier_wait(arrived)
        _clear_rows((gate_smem, up_smem, d_a_smem), filled, e, rows)
        sums = []
        for piece in _pieces(gate_smem):
            gate, up, d_product = (
                load(smem.at[piece], PIECE) for smem in (gate_smem, up_smem, d_a_smem)
            )
            swish, slope = silu_and_slope(gate)
            if weights is not None:
                sums += [jnp.sum(swish * up * d_product, axis=1)]
                d_product *= lax.broadcast_in_dim(weight_of[0], gate.shape, (0,))
            gate_smem[piece] = (d_product * up * slope).astype(plan.dtype)
            up_smem[piece] = (d_product * swish).astype(plan.dtype)
        if weights is not None:
            parts[0][e, j, rows] = sum(sums)

    def leave_empty():
        for smem in (gate_smem, up_smem):
            smem[...] = _constant(0, smem.shape, PIECE).astype(plan.dtype)
        if weights is not None:
            parts[0][e, j, rows] = _constant(0, (sizes.M,), PIECE.reduce(1))

    _if_any(filled, e, rows, compute, leave_empty)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(gate_smem, d_h.at[e, rows, columns])
    plgpu.copy_smem_to_gmem(up_smem, d_h.at[e, rows, up_columns])
    plgpu.wait_smem_to_gmem(0)


def _pieces(smem) -> list[tuple[Any, Any]]:
    rows, columns = smem.shape
    return [
        (pl.ds(row, sizes.M), pl.ds(column, sizes.M))
        for row in range(0, rows, sizes.M)
        for column in range(0, columns, sizes.M)
    ]


def _weights(weights, filled, e, rows) -> dict[int, Array]:
    """Of 64 rows each, by the first of them in the tile; 0 for rows that are not there."""
    if weights is None:
        return {}
    layout, of_pieces = PIECE.reduce(1), {}
    for start in range(0, rows.size, sizes.M):
        place = weights.at[e, pl.ds(rows.start + start, sizes.M)]
        of_rows = plgpu.load(place, layout=layout, optimized=False)
        if filled is not None:
            row = plgpu.broadcasted_iota(jnp.int32, (sizes.M,), 0, layout=layout)
            is_there = row < filled[e] - rows.start - start
            of_rows = jnp.where(is_there, of_rows, jnp.float32(0))
        of_pieces[start] = of_rows
    return of_pieces


def _clear_rows(tiles, filled, e, rows) -> None:
    """Zeros in the rows that are not there. All else follows: no gradient, a scale of 1."""
    if filled is None:
        return
    count = filled[e] - rows.start

    @pl.when(count < rows.size)
    def _():
        for smem in tiles:
            for piece in _pieces(smem):
                values = plgpu.load(smem.at[piece], layout=PIECE, optimized=False)
                row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=PIECE)
                is_there = row + piece[0].start < count
                smem[piece] = jnp.where(is_there, values, jnp.zeros((), values.dtype))


def _if_any(filled, e, rows, compute, leave_empty) -> None:
    """`compute` for a tile of which a row is there, else `leave_empty`."""
    if filled is None:
        compute()
        return
    is_any = rows.start < filled[e]
    pl.when(is_any)(compute)
    pl.when(~is_any)(leave_empty)


def _constant(value, shape, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
