"""Embedding, head and loss of a pipeline: the vocabulary split over `pipe`, on every rank a part.

So no rank pays for all of it, and the last stage takes no longer than the others. A micro-batch's
final hidden states go to all ranks, each makes the logits of its own part and, at once, their share
of the gradients; maximum, normaliser and hidden gradients are put together over `pipe`. All
functions here run inside shard_map, on all pipe ranks together.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.mesh import PIPE_AXIS


class HeadResult(NamedTuple):
    """Of one micro-batch: each position's loss, and gradients of the weighted sum of them."""

    nll: Float[Array, " tokens"]
    d_hidden: Float[Array, "tokens hidden"]
    d_head: Float[Array, "rows hidden"]
    """This rank's part, FP32."""


def _first_row(rows: int) -> Int[Array, ""]:
    return jax.lax.axis_index(PIPE_AXIS) * rows


def from_rank(rank: int, value: Array) -> Array:
    """`value` of that pipe rank, on all of them."""
    is_source = jax.lax.axis_index(PIPE_AXIS) == rank
    return jax.lax.psum(jnp.where(is_source, value, jnp.zeros_like(value)), PIPE_AXIS)


def embed(
    part: Float[Array, "rows hidden"], tokens: Int[Array, "*batch"], dtype: DTypeLike
) -> Float[Array, "*batch hidden"]:
    """Token embeddings, on all ranks."""
    row = tokens - _first_row(part.shape[0])
    is_mine = (row >= 0) & (row < part.shape[0])
    mine = jnp.where(is_mine[..., None], part[jnp.where(is_mine, row, 0)], 0).astype(dtype)
    return jax.lax.psum(mine, PIPE_AXIS)  # one rank's row and zeros: exact


def add_embedding_gradient(
    total: Float[Array, "rows hidden"],
    tokens: Int[Array, "*batch"],
    gradient: Float[Array, "*batch hidden"],
) -> Float[Array, "rows hidden"]:
    """`total` plus the gradient of this rank's rows, both FP32."""
    rows = total.shape[0]
    row = (tokens - _first_row(rows)).reshape(-1)
    row = jnp.where((row >= 0) & (row < rows), row, rows)  # out of range: dropped
    flat = gradient.reshape(-1, gradient.shape[-1]).astype(total.dtype)
    return total.at[row].add(flat, mode="drop")


def head_loss(
    hidden: Float[Array, "tokens hidden"],
    head: Float[Array, "rows hidden"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    vocab_size: int,
    chunk_tokens: int,
) -> HeadResult:
    """Cross-entropy of `hidden`, the same on all ranks, and the gradients of sum_t weight_t nll_t.

    `head` is this rank's part of the vocabulary. `chunk_tokens` rows of its logits exist at a time.
    """
    tokens, rows = hidden.shape[0], head.shape[0]
    size = min(chunk_tokens, tokens)
    count = -(-tokens // size)
    first = _first_row(rows)
    exists = first + jnp.arange(rows) < vocab_size

    def cut(a):
        padded = jnp.pad(a, [(0, count * size - tokens)] + [(0, 0)] * (a.ndim - 1))
        return padded.reshape(count, size, *a.shape[1:])

    def step(d_head, chunk):
        x, target, weight = chunk
        logits = jax.lax.dot_general(
            x, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits = jnp.where(exists, logits, -jnp.inf)
        largest = jax.lax.pmax(jnp.max(logits, axis=-1, keepdims=True), PIPE_AXIS)
        exponentials = jnp.exp(logits - largest)
        is_target = (target - first)[:, None] == jnp.arange(rows, dtype=target.dtype)
        sums = (exponentials, jnp.where(is_target, logits, 0))
        normaliser, at_target = (
            jax.lax.psum(jnp.sum(a, axis=-1, keepdims=True), PIPE_AXIS) for a in sums
        )
        probs = exponentials / normaliser
        d_logits = (jnp.where(is_target, probs - 1, probs) * weight[:, None]).astype(x.dtype)
        d_head += jax.lax.dot_general(
            d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return d_head, ((jnp.log(normaliser) + largest - at_target)[:, 0], d_logits @ head)

    start = jnp.zeros(head.shape, jnp.float32)
    d_head, (nll, d_hidden) = jax.lax.scan(
        step, start, jax.tree.map(cut, (hidden, targets, weights))
    )
    d_hidden = jax.lax.psum(d_hidden.reshape(-1, hidden.shape[1])[:tokens], PIPE_AXIS)
    return HeadResult(nll.reshape(-1)[:tokens], d_hidden, d_head)
