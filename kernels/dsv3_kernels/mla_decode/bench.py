"""The Hopper kernels at the model's shapes."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import BEST_OF_MEMORY, Case, Unit
from dsv3_kernels.mla_decode import mosaic_sm90, reference, shapes
from dsv3_kernels.mla_decode.tiles import BLOCK, QK_DIM, Cycles
from dsv3_kernels.sass import Kernel


def cases() -> list[Case]:
    """All of `shapes`."""
    return [_case(shape) for shape in shapes.BF16 + shapes.FP8]


def cycles_of(shape: shapes.Shape) -> Cycles:
    """Predicted."""
    return Cycles(
        batch=shape.batch,
        rows=shape.queries * shape.heads,
        tokens=shape.tokens,
        row_bytes=reference.packed_bytes(QK_DIM) if shape.is_packed else 2 * QK_DIM,
    )


def _case(shape: shapes.Shape) -> Case:
    cycles = cycles_of(shape)
    unit: Unit = "memory" if cycles.shares["memory"] > cycles.shares["bf16"] else "bf16"

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        del kernels
        shares = {"parts and waits": cycles.shares[unit]}
        return shares | ({"memory at its best": BEST_OF_MEMORY} if unit == "memory" else {})

    return Case(
        op="mla_decode",
        name=shape.name,
        run=partial(mosaic_sm90.attend, scale=shapes.SCALE),
        make=partial(_make, shape),
        unit=unit,
        work=cycles.needed_bytes if unit == "memory" else cycles.needed_flops,
        predict=predict,
        reference=partial(reference.attend, scale=shapes.SCALE),
    )


def _make(shape: shapes.Shape, key: Array) -> tuple[Array, ...]:
    keys = jax.random.split(key, 3)
    max_pages = -(-shape.tokens // BLOCK)
    q = jax.random.normal(keys[0], (shape.batch, shape.queries, shape.heads, QK_DIM), jnp.bfloat16)
    pages = jax.random.normal(keys[1], (shape.batch * max_pages, BLOCK, QK_DIM), jnp.bfloat16)
    page_table = jax.random.permutation(keys[2], pages.shape[0]).reshape(shape.batch, max_pages)
    lengths = shape.tokens - jnp.arange(shape.batch) % BLOCK
    pages = reference.pack_fp8(pages) if shape.is_packed else pages
    return q, pages, page_table.astype(jnp.int32), lengths.astype(jnp.int32)
