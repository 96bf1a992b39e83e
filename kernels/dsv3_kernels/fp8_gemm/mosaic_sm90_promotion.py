"""What the FP8 products on Hopper share, `fp8_gemm` and `grouped_gemm`: their operands in shared
memory, and sums that are promoted to FP32 every 128 of k."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Shaped

from dsv3_kernels.fp8_gemm import tiles as sizes

ROWS = sizes.M // 2
"""Of a warpgroup, and of a wgmma."""
GROUP = 64
"""Columns for which one scale of b in blocks holds, wherever a tile begins."""
BLOCK_SCALES = 32
"""Scales of b in blocks that are copied for a step, of which two are used: TMA writes to multiples
of 128 bytes."""
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""Of a thread. A program starts with 168 for each; more than 3 x 168 in all would wait for ever."""


def fill_up(
    x: Shaped[Array, "*batch rows columns"], multiples: tuple[int, int]
) -> Shaped[Array, "*batch more_rows more_columns"]:
    """`x`, its last two dims filled up with zeros."""
    rows, columns = (-size % of for size, of in zip(x.shape[-2:], multiples, strict=True))
    widths = [(0, 0)] * (x.ndim - 2) + [(0, rows), (0, columns)]
    return jnp.pad(x, widths) if rows or columns else x


def swizzled(width: int, itemsize: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Transforms of rows in pieces of `width` bytes."""
    tiling = plgpu.TilingTransform((8, width // itemsize))  # pyright: ignore[reportAbstractUsage]
    return tiling, plgpu.SwizzleTransform(width)  # pyright: ignore[reportAbstractUsage]


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What a warpgroup reads and signals while it sums up a tile, [64, columns]."""

    columns: int
    rows: Any
    """Its own, of the tile's."""
    half: Any
    """`GROUP`s of a block of b before the tile: one of 192 columns may begin in the midst."""
    is_b_in_rows: bool
    """Each row of b has scales of its own."""
    a_scale_smem: Any
    b_scale_smem: Any
    empty: Any
    scales_read: Any

    def zero(self) -> tuple[Any, ...]:
        """Sums of nothing, in pieces of 64 columns."""
        zero = plgpu.layout_cast(jnp.zeros((ROWS, GROUP), jnp.float32), plgpu.Layout.WGMMA)
        return (zero,) * (self.columns // GROUP)

    def add(
        self, sums: tuple[Any, ...], stage: Any, multiply: Callable[[Any], None]
    ) -> tuple[Any, ...]:
        """`sums` and a step's products, which `multiply` puts into an accumulator of its own."""

        def with_part(part):
            multiply(part)
            layout = plgpu.Layout.WGMMA.reduce(1)
            scale = plgpu.load(self.a_scale_smem.at[stage, self.rows], layout=layout)
            blocks = range(0 if self.is_b_in_rows else len(sums))
            scales = [scale * self.b_scale_smem[stage, lax.div(self.half + i, 2)] for i in blocks]
            return scale, scales, part[...]

        accumulator = plgpu.ACC((ROWS, self.columns), jnp.float32)
        scale, scales, part = pl.run_scoped(with_part, accumulator)
        plgpu.barrier_arrive(self.empty.at[stage])
        if not self.is_b_in_rows:
            plgpu.barrier_arrive(self.scales_read.at[stage])
        added = []
        for i, total in enumerate(sums):
            piece = part[:, i * GROUP : (i + 1) * GROUP]
            if self.is_b_in_rows:  # read as late as can be: there are no registers to keep them
                layout, columns = plgpu.Layout.WGMMA.reduce(0), pl.ds(i * GROUP, GROUP)
                column_scale = plgpu.load(self.b_scale_smem.at[stage, columns], layout=layout)
                piece = piece * lax.broadcast_in_dim(column_scale, piece.shape, (1,))
            row_scale = scale if self.is_b_in_rows else scales[i]
            added.append(total + piece * lax.broadcast_in_dim(row_scale, piece.shape, (0,)))
        if self.is_b_in_rows:
            plgpu.barrier_arrive(self.scales_read.at[stage])
        return tuple(added)
