"""How pages come to shared memory on Hopper, in BF16 or in 8 bits: a warpgroup's work.

Both give `load(b, first, end, step)`: blocks `first` to `end` of request b into the ring of stages,
of which `step` counts those filled before; and what it counts then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from dsv3_kernels.mla_decode.reference import packed_bytes
from dsv3_kernels.mla_decode.tiles import BLOCK, ROPE_DIM, STAGES, V_DIM
from dsv3_kernels.quantize.reference import BLOCK as SCALED
from dsv3_kernels.quantize.reference import E4M3

Load = Callable[[Any, Any, Any, Any], Any]
PIECE = 64
"""Columns that are converted at once: 128 bytes of BF16, the widest swizzle."""
EIGHTS = plgpu.Layout.TILED(
    plgpu.Tiling(((BLOCK, PIECE), (16, PIECE), (4, PIECE), (8,))),
    warp_dims=(-7,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
"""8 values of a row side by side in a thread, 8 threads a row. In BF16 these are 16 bytes, and 8
threads write 128 bytes of all banks."""


def views_of(pages: Array) -> tuple[Array, ...]:
    """The arrays that a loader takes: the pages, or what is in them by dtype. Nothing is copied."""
    if pages.dtype != jnp.uint8:
        return (pages,)
    values = lax.bitcast_convert_type(pages, E4M3)
    scales = lax.bitcast_convert_type(pages.reshape(*pages.shape[:2], -1, 4), jnp.float32)
    ropes = lax.bitcast_convert_type(pages.reshape(*pages.shape[:2], -1, 2), jnp.bfloat16)
    return values, scales, ropes


def bf16(views: Sequence[Any], page_table: Any, k_smem: Any, k_full: Any, k_free: Any) -> Load:
    """By TMA, a page at once."""
    [pages] = views

    def load(b, first, end, step):
        def fill(j, step):
            stage, page = lax.rem(step, STAGES), page_table[b, j]
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(k_free.at[stage]))
            plgpu.copy_gmem_to_smem(pages.at[page], k_smem.at[stage], k_full.at[stage])
            return step + 1

        return lax.fori_loop(first, end, fill, step)

    return load


def fp8(views: Sequence[Any], page_table: Any, k_smem: Any, k_full: Any, k_free: Any) -> Load:
    """Through registers, as BF16. A page's bytes are asked for while the one before is converted,
    piece by piece: half of a page or more, 16 KB, is always under way."""
    values, scales, ropes = views
    scale_start = V_DIM // 4
    rope_columns = pl.ds(packed_bytes(V_DIM) // 2, ROPE_DIM)
    pieces = range(V_DIM // PIECE)

    def read(source):
        return plgpu.load(source, layout=EIGHTS, optimized=False)

    def read_piece(page, i):
        return read(values.at[page, :, pl.ds(i * PIECE, PIECE)])

    def read_scale(page, i):
        source = scales.at[page, :, scale_start + i]
        return plgpu.load(source, layout=EIGHTS.reduce(1), optimized=False)

    def load(b, first, end, step):
        def fill(j, carry):
            step, page, *raw = carry
            stage = lax.rem(step, STAGES)
            following = page_table[b, lax.min(j + 1, end - 1)]
            rope = read(ropes.at[page, :, rope_columns])
            of_rows = [read_scale(page, i) for i in range(V_DIM // SCALED)]
            pl.when(step >= STAGES)(lambda: plgpu.barrier_wait(k_free.at[stage]))
            k_smem[stage, :, pl.ds(V_DIM, ROPE_DIM)] = rope
            for i in pieces:
                scale = lax.broadcast_in_dim(of_rows[i * PIECE // SCALED], (BLOCK, PIECE), (0,))
                latents = raw[i].astype(jnp.float32) * scale
                k_smem[stage, :, pl.ds(i * PIECE, PIECE)] = latents.astype(jnp.bfloat16)
                raw[i] = read_piece(following, i)
            plgpu.commit_smem()
            plgpu.barrier_arrive(k_full.at[stage])
            return step + 1, following, *raw

        page = page_table[b, first]
        start = step, page, *(read_piece(page, i) for i in pieces)
        return lax.fori_loop(first, end, fill, start)[0]

    return load
