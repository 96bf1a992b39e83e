"""The next token from logits: one way for all rows of a batch, or each row in its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from dsv3_jax.serve.request import MAX_LOGPROBS, SamplingParams


def sample(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], params: SamplingParams
) -> Int[Array, " batch"]:
    """One token for each row, each row with its own random key."""
    if params.temperature == 0:
        return _first_largest(logits)
    kept = keep_most_likely(logits / params.temperature, params.top_k, params.top_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def keep_most_likely(
    logits: Float[Array, "batch vocab"], top_k: int, top_p: float
) -> Float[Array, "batch vocab"]:
    """Logits with everything outside the top k, then outside the nucleus of mass top_p, at -inf.

    The nucleus is the smallest set of most likely tokens whose probability reaches top_p; the most
    likely token always stays.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(descending, axis=-1)
        mass_before = jnp.cumsum(probs, axis=-1) - probs
        smallest = jnp.min(
            jnp.where(mass_before < top_p, descending, jnp.inf), axis=-1, keepdims=True
        )
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return logits


class RowParams(NamedTuple):
    """`SamplingParams` of every row."""

    temperature: Float[Array, " batch"]
    top_k: Int[Array, " batch"]
    top_p: Float[Array, " batch"]
    min_p: Float[Array, " batch"]
    keys: Key[Array, " batch"]
    """Of a row, for all of its tokens; `sample_rows` makes a token's own of it."""


class RowEdits(NamedTuple):
    """What is done to every row's logits first, and what it depends on."""

    counts: Int[Array, "batch vocab"]
    """How often each token is in the answer so far."""
    in_prompt: Bool[Array, "batch vocab"]
    bias: Float[Array, "batch vocab"]
    allowed: UInt32[Array, "batch words"]
    """A bit for each token, as `Constraint.allowed` gives it."""
    presence: Float[Array, " batch"]
    frequency: Float[Array, " batch"]
    repetition: Float[Array, " batch"]


def sample_rows(
    logits: Float[Array, "batch vocab"], made: Int[Array, " batch"], rows: RowParams
) -> Int[Array, " batch"]:
    """One token for each row, the answer's number `made` (from 0).

    It depends on the row's logits, parameters and `made` alone, and is the token that `generate`
    draws of the same logits for a prompt on its own. A guess of the same place is drawn with the
    same noise, so it is likely to be the token itself (speculative.py).
    """

    def drawn():
        scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]
        is_filtered = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        kept = jax.lax.cond(jnp.any(is_filtered), keep_most_likely_rows, _unfiltered, scaled, rows)
        keys = jax.vmap(jax.random.fold_in)(rows.keys, made)
        tokens = jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)
        return jnp.where(rows.temperature > 0, tokens, _first_largest(logits))

    is_drawn = jnp.any(rows.temperature > 0)
    return jax.lax.cond(is_drawn, drawn, lambda: _first_largest(logits))


def keep_most_likely_rows(
    logits: Float[Array, "batch vocab"], rows: RowParams
) -> Float[Array, "batch vocab"]:
    """`keep_most_likely` with each row's own top_k and top_p, then without what is less likely than
    min_p times the most likely token."""
    vocab = logits.shape[-1]
    descending = jnp.sort(logits, axis=-1, descending=True)
    count = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab), vocab)
    kth = jnp.take_along_axis(descending, count[:, None] - 1, axis=-1)
    descending = jnp.where(descending < kth, -jnp.inf, descending)
    probs = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    is_kept = (mass_before < rows.top_p[:, None]) | (rows.top_p >= 1)[:, None]
    is_kept &= (probs >= rows.min_p[:, None] * probs[:, :1]) & (descending > -jnp.inf)
    smallest = jnp.min(jnp.where(is_kept, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < smallest, -jnp.inf, logits)


def _unfiltered(logits: Float[Array, "batch vocab"], rows: RowParams):
    del rows
    return logits


def edit_logits(
    logits: Float[Array, "batch vocab"], edits: RowEdits
) -> Float[Array, "batch vocab"]:
    """The logits with penalties and biases, -inf where a row's grammar lets nothing come.

    Source: OpenAI's API reference for presence and frequency, CTRL (arXiv 1909.05858) §4.1 for
    repetition, which divides a positive logit and multiplies a negative one.
    """
    in_answer = edits.counts > 0
    repetition = edits.repetition[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(in_answer | edits.in_prompt, repeated, logits)
    logits -= edits.frequency[:, None] * edits.counts.astype(logits.dtype)
    logits -= edits.presence[:, None] * in_answer.astype(logits.dtype)
    return jnp.where(unpack_bits(edits.allowed, logits.shape[-1]), logits + edits.bias, -jnp.inf)


def unpack_bits(words: UInt32[Array, "batch words"], count: int) -> Bool[Array, "batch count"]:
    """The first `count` bits, each word from its lowest."""
    bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :count] == 1


class TopLogprobs(NamedTuple):
    """Log-probabilities of a row's chosen token and of the most likely ones."""

    chosen: Float[Array, " batch"]
    top: Float[Array, "batch alternatives"]
    top_tokens: Int[Array, "batch alternatives"]


def top_logprobs(logits: Float[Array, "batch vocab"], tokens: Int[Array, " batch"]) -> TopLogprobs:
    """Of the model's own logits."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top, top_tokens = jax.lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    return TopLogprobs(chosen, top, top_tokens)


def _first_largest(logits: Float[Array, "batch vocab"]) -> Int[Array, " batch"]:
    """argmax, as two reductions that XLA's CPU backend vectorises (its own takes 150 us for 8 rows
    of 8,192). Rows with NaN give the last token."""
    vocab = logits.shape[-1]
    is_largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    places = jnp.where(is_largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
    return jnp.min(places, axis=-1)
