"""The training loss: main + lambda * MTP + alpha * balance, vocabulary cross-entropy in chunks.

Source: DeepSeek-V3 Technical Report equations 17-25.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.model.transformer import Transformer

CHUNK_TOKENS = 512
"""Tokens whose FP32 logits exist at one time."""


class Losses(NamedTuple):
    """Scalars in nats; `loss` = main_loss + mtp_weight * mtp_loss + balance_weight * balance_loss.

    `mtp_loss` is the mean over depths, `balance_loss` the sum over routed layers.
    """

    loss: Float[Array, ""]
    main_loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]


@jax.custom_vjp
def chunked_cross_entropy(
    hidden: Float[Array, "tokens hidden"],
    head: Float[Array, "vocab hidden"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
) -> tuple[Float[Array, ""], Float[Array, " tokens"]]:
    """(sum_t weight_t * nll_t, nll) with at most `CHUNK_TOKENS` rows of logits alive.

    Forward for a gradient computes each chunk's share of it at once (both are needed while the
    logits exist), so logits are never made twice. Only the sum is differentiable, with respect to
    `hidden` and `head`.
    """
    chunks = _chunks(hidden, targets, weights)

    def step(total, chunk):
        nll, _ = _chunk_nll(chunk[0], head, chunk[1])
        return total + jnp.sum(nll * chunk[2]), nll

    total, nll = jax.lax.scan(step, jnp.zeros((), jnp.float32), chunks)
    return total, nll.reshape(-1)[: hidden.shape[0]]


def _chunk_nll(x, head, targets):
    """Negative log-likelihood of each target and the probabilities of the whole vocabulary."""
    logits = jax.lax.dot_general(
        x, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    largest = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - largest)
    normaliser = jnp.sum(exponentials, axis=-1, keepdims=True)
    at_target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    nll = jnp.log(normaliser) + largest - at_target
    return nll[:, 0], exponentials / normaliser


def _chunks(hidden, targets, weights):
    """The three arrays cut into chunks, padded with weightless rows."""
    tokens = hidden.shape[0]
    size = min(CHUNK_TOKENS, tokens)
    count = -(-tokens // size)

    def cut(a):
        padded = jnp.pad(a, [(0, count * size - tokens)] + [(0, 0)] * (a.ndim - 1))
        return padded.reshape(count, size, *a.shape[1:])

    return jax.tree.map(cut, (hidden, targets, weights))


def _forward(hidden, head, targets, weights):
    def step(carry, chunk):
        total, d_head = carry
        x, target, weight = chunk
        nll, probs = _chunk_nll(x, head, target)
        is_target = target[:, None] == jnp.arange(head.shape[0], dtype=target.dtype)
        d_logits = (jnp.where(is_target, probs - 1, probs) * weight[:, None]).astype(x.dtype)
        d_x = d_logits @ head
        d_head += jax.lax.dot_general(
            d_logits, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return (total + jnp.sum(nll * weight), d_head), (nll, d_x)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head.shape, jnp.float32))
    (total, d_head), (nll, d_x) = jax.lax.scan(step, start, _chunks(hidden, targets, weights))
    tokens = hidden.shape[0]
    residuals = (d_x.reshape(-1, hidden.shape[1])[:tokens], d_head.astype(head.dtype))
    return (total, nll.reshape(-1)[:tokens]), residuals


def _backward(residuals, cotangents):
    d_hidden, d_head = residuals
    scale = cotangents[0]
    return scale.astype(d_hidden.dtype) * d_hidden, scale.astype(d_head.dtype) * d_head, None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def loss_mask(documents: Int[Array, "batch seq_and_one"]) -> Float[Array, "batch seq"]:
    """1 where a token's successor belongs to its own document, else 0."""
    return (documents[:, 1:] == documents[:, :-1]).astype(jnp.float32)


def training_loss(
    model: Transformer,
    rows: Int[Array, "batch seq_and_one"],
    documents: Int[Array, "batch seq_and_one"] | None,
    *,
    predictions: Float[Array, ""],
    sequences: Float[Array, ""],
    mtp_weight: Float[Array, ""],
    balance_weight: float,
) -> tuple[Float[Array, ""], tuple[Losses, Float[Array, "routed_layers experts"]]]:
    """This part of the batch's share of the loss, its terms, and the load of every routed layer.

    `predictions` is the number of next-token targets of the whole batch and `sequences` its number
    of rows, so that the parts of an accumulated batch add up to the batch's means. With `documents`
    attention stays inside a document and targets in another one do not count. An MTP loss has
    fewer terms but the same divisor (equation 24).
    """
    hidden = model.hidden_states(rows, None if documents is None else documents[:, :-1])
    depths = len(hidden.mtp)
    targets = make_targets(rows, documents, depths)
    weights = targets.masks * term_weights(depths, mtp_weight, predictions)[:, None, None]
    with jax.named_scope("cross_entropy"):
        predicted, nll = chunked_cross_entropy(
            jnp.concatenate([hidden.main, *hidden.mtp]).reshape(-1, hidden.main.shape[-1]),
            model.lm_head.weight[...],
            targets.tokens.reshape(-1),
            weights.reshape(-1),
        )
    means = masked_sums(nll, targets.masks) / predictions
    balance = jnp.sum(hidden.balance_loss) * (rows.shape[0] / sequences)
    loss = predicted + balance_weight * balance
    mtp = jnp.mean(means[1:]) if depths else jnp.zeros(())
    return loss, (Losses(loss, means[0], mtp, balance), hidden.load)


class Targets(NamedTuple):
    """What the main model (first) and each MTP depth predict, and which positions count."""

    tokens: Int[Array, "streams batch seq"]
    masks: Float[Array, "streams batch seq"]


def make_targets(
    rows: Int[Array, "batch seq_and_one"],
    documents: Int[Array, "batch seq_and_one"] | None,
    depths: int,
) -> Targets:
    """Depth k predicts the token k + 1 ahead, where it exists in the same document."""
    batch, seq = rows.shape[0], rows.shape[1] - 1
    mask = jnp.ones((batch, seq), jnp.float32) if documents is None else loss_mask(documents)
    tokens, masks = [rows[:, 1:]], [mask]
    for depth in range(1, depths + 1):
        tokens.append(jnp.pad(rows[:, 1 + depth :], ((0, 0), (0, depth))))
        masks.append(_mtp_mask(documents, batch, seq, depth))
    return Targets(jnp.stack(tokens), jnp.stack(masks))


def term_weights(
    depths: int, mtp_weight: Float[Array, ""], predictions: Float[Array, ""]
) -> Float[Array, " streams"]:
    """What a position's loss counts for, by stream: 1 / predictions, an MTP depth's mtp_weight /
    depths of it."""
    mtp = jnp.full((depths,), mtp_weight / max(depths, 1), jnp.float32)
    return jnp.concatenate([jnp.ones((1,), jnp.float32), mtp]) / predictions


def masked_sums(
    nll: Float[Array, " positions"], masks: Float[Array, "streams batch seq"]
) -> Float[Array, " streams"]:
    """The losses of each stream's positions that count, added up."""
    streams = masks.shape[0]
    return jnp.sum(nll.reshape(streams, -1) * masks.reshape(streams, -1), axis=1)


def _mtp_mask(documents, batch, seq, depth):
    """Positions whose target `depth + 1` ahead exists (and lies in the same document)."""
    exists = jnp.broadcast_to(jnp.arange(seq) < seq - depth, (batch, seq)).astype(jnp.float32)
    if documents is None:
        return exists
    ahead = jnp.pad(documents[:, 1 + depth :], ((0, 0), (0, depth)), constant_values=-1)
    return exists * (ahead == documents[:, :-1]).astype(jnp.float32)


@partial(jax.jit, static_argnames=())
def evaluation_sums(
    model: Transformer,
    rows: Int[Array, "batch seq_and_one"],
    documents: Int[Array, "batch seq_and_one"] | None,
    token_bytes: Int[Array, " vocab"],
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(summed next-token nll in nats, number of targets, bytes the targets stand for)."""
    hidden = model.main_hidden(rows[:, :-1], None if documents is None else documents[:, :-1])[0]
    mask = jnp.ones(hidden.shape[:2], jnp.float32) if documents is None else loss_mask(documents)
    total, _ = chunked_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        model.lm_head.weight[...],
        rows[:, 1:].reshape(-1),
        mask.reshape(-1),
    )
    return total, jnp.sum(mask), jnp.sum(token_bytes[rows[:, 1:]].astype(jnp.float32) * mask)
