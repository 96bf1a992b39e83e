"""The Hopper kernel at the model's shapes, of groups of the same size."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, loop_shares
from dsv3_kernels.grouped_gemm import mosaic_sm90, reference, shapes
from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.quantize.reference import BLOCK, quantize
from dsv3_kernels.sass import Kernel


def cases() -> list[Case]:
    """All of `shapes`."""
    return [_case(shape) for shape in (*shapes.FP8, *shapes.BF16)]


def chosen_tiles(shape: shapes.Shape) -> sizes.Tiles:
    """What the kernel takes for `shape`."""
    b_in_rows = shape.form == "ragged_k" and shape.is_fp8
    rows, n = group_rows(shape), shape.n
    return sizes.choose(rows, shape.groups, n, is_fp8=shape.is_fp8, b_in_rows=b_in_rows)


def group_rows(shape: shapes.Shape) -> int:
    """Of a group's result."""
    if shape.form == "ragged_k":
        return shape.k
    return shape.rows if shape.form == "masked_rows" else shape.rows // shape.groups


def _case(shape: shapes.Shape) -> Case:
    is_masked = shape.form == "masked_rows"
    rows = shape.rows * (shape.groups if is_masked else 1)

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        tiles, of_group = chosen_tiles(shape), (group_rows(shape), shape.groups, shape.n)
        b_in_rows = shape.form == "ragged_k" and shape.is_fp8
        k = rows // shape.groups if shape.form == "ragged_k" else shape.k
        k_bytes, out_bytes = k * (1 if shape.is_fp8 else 2), jnp.dtype(shape.out_dtype).itemsize
        copied = (sizes.M + tiles.n) * sizes.K_BYTES / 4
        return loop_shares(kernel, 2, copied) | {
            "tiles": tiles.share_of_peak(*of_group, b_in_rows),
            "tiles' costs": tiles.share_with_tile_costs(*of_group, k_bytes, b_in_rows, out_bytes),
        }

    run, expected = _functions(shape)
    return Case(
        op="grouped_gemm",
        name=f"{'FP8' if shape.is_fp8 else 'BF16'} {shape.name}",
        run=run,
        make=partial(_make, shape),
        unit="fp8" if shape.is_fp8 else "bf16",
        work=2 * rows * shape.n * shape.k,
        predict=predict,
        reference=expected,
    )


def _functions(shape: shapes.Shape) -> tuple[Any, Any]:
    """The kernel and the reference, of arrays alone."""
    form, options = shape.form, {}
    if form != "masked_rows":
        options["alignment"] = shape.alignment
    if shape.transpose_b:
        options["transpose_b"] = True

    def run(a, b, group_sizes, *scales):
        kernel = getattr(mosaic_sm90, form)
        return kernel(a, b, group_sizes, scales or None, shape.out_dtype, **options)

    def expected(a, b, group_sizes, *scales):
        if shape.transpose_b:
            b = jnp.swapaxes(b, 1, 2)
        if form == "ragged_k" and not scales:
            a, b = a.T, b.T
        return getattr(reference, form)(a, b, group_sizes, scales or None, shape.out_dtype)

    return run, expected


def _make(shape: shapes.Shape, key: Array) -> tuple[Array, ...]:
    groups, rows, n, k = shape.groups, shape.rows, shape.n, shape.k
    is_masked, is_of_k = shape.form == "masked_rows", shape.form == "ragged_k"
    sizes_of = jnp.full((groups,), rows if is_masked else rows // groups, jnp.int32)
    a, b = (rows, k), (groups, *((k, n) if shape.transpose_b else (n, k)))
    if is_masked:
        a = (groups, rows, k)
    if is_of_k:
        a, b = ((k, rows), (n, rows)) if shape.is_fp8 else ((rows, k), (rows, n))
    keys = jax.random.split(key)
    a, b = jax.random.normal(keys[0], a), jax.random.normal(keys[1], b)
    if not shape.is_fp8:
        return a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), sizes_of
    (a, a_scale), (b, b_scale) = quantize(a), quantize(b, (1 if is_of_k else BLOCK, BLOCK))
    return a, b, sizes_of, a_scale, b_scale
