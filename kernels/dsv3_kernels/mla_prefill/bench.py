"""The Hopper kernels at the model's shapes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, loop_shares
from dsv3_kernels.mla_prefill import mosaic_sm90, mosaic_sm90_backward, reference, shapes, tiles
from dsv3_kernels.mla_prefill.tiles import NOPE_DIM, ROPE_DIM, V_DIM
from dsv3_kernels.sass import Kernel

QK_DIM = NOPE_DIM + ROPE_DIM
FORWARD_PRODUCTS = QK_DIM + V_DIM
"""A score."""
BACKWARD_PRODUCTS = 3 * QK_DIM + 2 * V_DIM
"""A score, with its recomputation."""
QUERY_CHUNKS = 16
"""Of the reference, so that not all scores are in memory at once."""
MOST_KEYS = 8192
"""That the reference has room for even so."""


def cases() -> list[Case]:
    """All of `shapes`; backward, of both kernels, for training."""
    forward = [_forward(shape) for shape in shapes.TRAINING + shapes.PREFILL]
    return forward + [_backward(shape) for shape in shapes.TRAINING]


def _forward(shape: shapes.Shape) -> Case:
    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        copied = tiles.FORWARD.block * (QK_DIM + V_DIM) * 2 / _mmas(kernel)
        whole = tiles.share_of_peak(
            [tiles.FORWARD], shape.batch, shape.heads, shape.seq, products=FORWARD_PRODUCTS
        )
        return loop_shares(kernel, 2, copied) | {"tiles and waits": whole}

    expected = partial(reference.attend, scale=shapes.SCALE, chunks=QUERY_CHUNKS)
    return Case(
        op="mla_prefill",
        name=f"{shape.name}, forward",
        run=partial(mosaic_sm90.attend, scale=shapes.SCALE),
        make=partial(_make, shape),
        unit="bf16",
        work=_flops(shape, FORWARD_PRODUCTS),
        predict=predict,
        reference=expected if shape.seq <= MOST_KEYS else None,
    )


def _backward(shape: shapes.Shape) -> Case:
    def make(key: Array) -> tuple[Any, ...]:
        keys = jax.random.split(key)
        q, kv, k_rope, first_keys = inputs = _make(shape, keys[0])
        out, lse = reference.attend(q, kv, k_rope, first_keys, shapes.SCALE, chunks=QUERY_CHUNKS)
        d_out = jax.random.normal(keys[1], out.shape, out.dtype)
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        return *inputs, lse, d_out, jnp.swapaxes(delta, 1, 2)

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        of_one = (shape.batch, shape.heads, shape.seq)
        pair = [tiles.D_Q, tiles.D_KV]
        return {"tiles and waits": tiles.share_of_peak(pair, *of_one, products=BACKWARD_PRODUCTS)}

    return Case(
        op="mla_prefill",
        name=f"{shape.name}, backward",
        run=partial(mosaic_sm90_backward.gradients, scale=shapes.SCALE),
        make=make,
        unit="bf16",
        work=_flops(shape, BACKWARD_PRODUCTS),
        predict=predict,
        reference=partial(reference.gradients, scale=shapes.SCALE, chunks=QUERY_CHUNKS),
    )


def _flops(shape: shapes.Shape, products: int) -> int:
    scores = shape.batch * shape.heads * shape.seq * (shape.seq + 1) // 2
    return 2 * scores * products


def _mmas(kernel: Kernel) -> int:
    assert kernel.main_loop is not None
    return kernel.main_loop.instructions["HGMMA"]


def _make(shape: shapes.Shape, key: Array) -> tuple[Any, ...]:
    keys = jax.random.split(key, 4)
    rows = shape.batch, shape.seq
    q, kv, k_rope = (
        jax.random.normal(key, (*rows, *dims), jnp.bfloat16)
        for key, dims in zip(
            keys,
            ((shape.heads, QK_DIM), (shape.heads, NOPE_DIM + V_DIM), (ROPE_DIM,)),
            strict=False,
        )
    )
    if not shape.documents:
        return q, kv, k_rope, None
    documents = jnp.cumsum(jax.random.bernoulli(keys[3], 4 / shape.seq, rows), axis=1)
    return q, kv, k_rope, reference.first_keys_of(documents.astype(jnp.int32))
