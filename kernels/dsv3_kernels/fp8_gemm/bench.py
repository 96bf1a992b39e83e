"""The Hopper kernel at the model's shapes."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, loop_shares
from dsv3_kernels.fp8_gemm import mosaic_sm90, reference, shapes, tiles
from dsv3_kernels.quantize.reference import BLOCK, quantize
from dsv3_kernels.sass import Kernel


def cases() -> list[Case]:
    """All of `shapes`."""
    every = shapes.FORWARD + shapes.INPUT_GRADIENT + shapes.WEIGHT_GRADIENT
    return [_case(shape) for shape in every]


def _case(shape: shapes.Shape) -> Case:
    m, n, k, b_in_rows = shape.m, shape.n, shape.k, shape.b_in_rows
    chosen = tiles.choose(1, m, n, b_in_rows)

    def make(key: Array) -> tuple[Array, ...]:
        keys = jax.random.split(key)
        a, b = jax.random.normal(keys[0], (m, k)), jax.random.normal(keys[1], (n, k))
        return *quantize(a), *quantize(b, (1 if b_in_rows else BLOCK, BLOCK))

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        out_bytes = jnp.dtype(shape.out_dtype).itemsize
        return loop_shares(kernel, 2, (tiles.M + chosen.n) * tiles.K / 4) | {
            "tiles": chosen.share_of_peak(1, m, n, b_in_rows),
            "tiles' costs": chosen.share_with_tile_costs(1, m, n, k, b_in_rows, out_bytes),
        }

    return Case(
        op="fp8_gemm",
        name=shape.name,
        run=partial(mosaic_sm90.gemm, out_dtype=shape.out_dtype),
        make=make,
        unit="fp8",
        work=2 * m * n * k,
        predict=predict,
        reference=partial(reference.gemm_dequantised, out_dtype=shape.out_dtype),
    )
