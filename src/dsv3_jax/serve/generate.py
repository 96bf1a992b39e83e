"""Batched generation: one prefill in the expanded form, then absorbed decode on the latent cache.

Prompts of different lengths are padded on the right. A causal model never looks ahead, so the
padding changes nothing; decode overwrites its latents one by one and masks the rest by position.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from dsv3_jax.config.checks import require
from dsv3_jax.model.block import Block
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.inference import (
    BY_TOKEN,
    WHOLE,
    agreement_axes,
    on_mesh,
    token_shards,
    weight_specs,
)
from dsv3_jax.parallel.mesh import TOKEN_AXES
from dsv3_jax.parallel.sharding import add_over
from dsv3_jax.serve.sampler import SamplingParams, sample
from dsv3_kernels.mla_decode.op import PAGE_SIZE
from dsv3_kernels.target import is_hopper

LENGTH_STEP = 16
"""Prompt and cache lengths are rounded up to multiples of this, so that few shapes compile; for a
Hopper GPU to the pages of its kernel."""
DECODE_STEPS = 64
"""Tokens that one call of the compiled decode loop makes at most."""
UNSTACKED_LAYERS = 16
"""Up to this many layers decoding unrolls them over their own copies of the weights."""
NO_TOKEN = -1


class DecodeState(NamedTuple):
    """A batch between two decode steps."""

    cache: Float[Array, "layers batch cached latent"]
    last_token: Int[Array, " batch"]
    position: Int[Array, " batch"]
    """Where `last_token` stands; its latent is not cached yet."""
    made: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    keys: Key[Array, " batch"]


OF_STATE = DecodeState(PartitionSpec(None, TOKEN_AXES), *[BY_TOKEN] * 5)  # pyright: ignore
"""Which dim of each is split over a mesh."""


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    *,
    top_k: int = 0,
) -> list[list[int]]:
    """The new tokens of each prompt, up to and including the end-of-sequence token if it comes.

    Prompts may differ in length. Greedy (temperature 0) gives the tokens that repeated full
    forwards would. A sampled row depends on `seed` and its place in the batch only.

    Raises ValueError for an empty prompt, a token outside the vocabulary, or a length beyond
    `max_position_embeddings`.

    >>> generate(model, [[5, 6, 7], [8]], max_new_tokens=2)
    [[301, 17], [44, 90]]
    """
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    made: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(model, prompts, max_new_tokens, params, steps=DECODE_STEPS):
        for row, new in zip(made, tokens, strict=True):
            row.extend(new)
    return made


def stream(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    params: SamplingParams,
    *,
    steps: int,
) -> Iterator[list[list[int]]]:
    """The new tokens of each prompt as they come, at most `steps` of each at a time."""
    check_prompts(model, prompts, max_new_tokens)
    if not prompts or max_new_tokens == 0:
        return
    longest = max(len(prompt) for prompt in prompts)
    count = len(prompts)
    # On a mesh each device has as many; what fills them up is finished before it begins.
    filled = count if model.mesh is None else count + -count % token_shards(model.mesh)
    rows = np.zeros((filled, _round_up(longest)), np.int32)
    for row, prompt in zip(rows, prompts, strict=False):
        row[: len(prompt)] = prompt
    lengths = np.array([*map(len, prompts), *[1] * (filled - count)], np.int32)
    capacity = max(_round_up(longest + max_new_tokens), rows.shape[1])
    keys = jax.random.split(jax.random.key(params.seed), count)
    keys = jnp.concatenate([keys, jnp.repeat(keys[:1], filled - count)])
    params = replace(params, seed=0)  # static below: the programs serve every seed
    arrays = jnp.asarray(rows), jnp.asarray(lengths), jnp.arange(filled) >= count, keys
    state = _prefill(model, *arrays, params=params, capacity=capacity)
    layers = _unstack(model) if model.config.num_hidden_layers <= UNSTACKED_LAYERS else None
    yield [[token] for token in np.asarray(state.last_token)[:count].tolist()]
    left = max_new_tokens - 1
    while left > 0 and not bool(jnp.all(state.finished)):
        state, tokens = _decode(
            model, layers, state, jnp.asarray(left), params=params, steps=min(steps, DECODE_STEPS)
        )
        left -= tokens.shape[1]
        yield [[t for t in row if t != NO_TOKEN] for row in np.asarray(tokens)[:count].tolist()]


def check_prompts(
    model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raises ValueError for prompts that this model cannot continue."""
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "a number of at least 0")
    vocab, limit = model.config.vocab_size, model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        require(len(prompt) > 0, f"prompts[{index}]", list(prompt), "at least one token")
        wrong = next((t for t in prompt if not 0 <= t < vocab), None)
        require(wrong is None, f"prompts[{index}]: token", wrong, f"a token from 0 to {vocab - 1}")
        total = len(prompt) + max_new_tokens
        require(
            total <= limit,
            f"prompts[{index}]: its length plus max_new_tokens",
            total,
            f"at most max_position_embeddings = {limit}",
        )


@partial(jax.jit, static_argnames=("params", "capacity"))
def _prefill(
    model: Transformer,
    rows: Int[Array, "batch padded"],
    lengths: Int[Array, " batch"],
    finished: Bool[Array, " batch"],
    keys: Key[Array, " batch"],
    *,
    params: SamplingParams,
    capacity: int,
) -> DecodeState:
    """The cache of the prompts and the first new token of each."""

    def prefill(model, rows, lengths, finished, keys):
        hidden, latents, _ = model.main_hidden(rows)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        cache = jnp.pad(latents, ((0, 0), (0, 0), (0, capacity - rows.shape[1]), (0, 0)))
        made = jnp.zeros_like(lengths)
        token = sample(model.logits(last)[:, 0], _step_keys(keys, made), params)
        return DecodeState(cache, token, lengths, made + 1, finished | _is_end(model, token), keys)

    if model.mesh is not None:
        in_specs = weight_specs(model), *[BY_TOKEN] * 4
        prefill = on_mesh(prefill, model.mesh, in_specs, OF_STATE)
    return prefill(model, rows, lengths, finished, keys)


@partial(jax.jit, static_argnames=("params", "steps"), donate_argnames=("state",))
def _decode(
    model: Transformer,
    layers: list[Block] | None,
    state: DecodeState,
    left: Int[Array, ""],
    *,
    params: SamplingParams,
    steps: int,
) -> tuple[DecodeState, Int[Array, "batch steps"]]:
    """Up to min(steps, left) more tokens of every unfinished row; NO_TOKEN where there is none."""
    decode = partial(_decode_rows, params, steps)
    if model.mesh is not None:
        of_weights = weight_specs(model), weight_specs(layers, expert_dim=0)
        in_specs, out_specs = (*of_weights, OF_STATE, WHOLE), (OF_STATE, BY_TOKEN)
        decode = on_mesh(decode, model.mesh, in_specs, out_specs)
    return decode(model, layers, state, left)


def _decode_rows(params, steps, model, layers, state, left):
    """`_decode` of one device's rows."""
    axes = () if model.mesh is None else agreement_axes(model.mesh)

    def any_unfinished(state):
        return add_over(axes, jnp.sum(~state.finished, dtype=jnp.int32)) > 0

    def step(carry):
        count, state, tokens, _ = carry
        hidden, cache = model.decode(
            state.last_token[:, None], state.position[:, None], state.cache, layers
        )
        token = sample(model.logits(hidden)[:, 0], _step_keys(state.keys, state.made), params)
        tokens = tokens.at[:, count].set(jnp.where(state.finished, NO_TOKEN, token))
        state = DecodeState(
            cache,
            token,
            state.position + 1,
            state.made + 1,
            state.finished | _is_end(model, token),
            state.keys,
        )
        return count + 1, state, tokens, any_unfinished(state)

    def goes_on(carry):
        count, _, _, unfinished = carry
        return (count < jnp.minimum(steps, left)) & unfinished

    tokens = jnp.full((state.position.shape[0], steps), NO_TOKEN, jnp.int32)
    start = jnp.int32(0), state, tokens, any_unfinished(state)
    _, state, tokens, _ = jax.lax.while_loop(goes_on, step, start)
    return state, tokens


@jax.jit
def _unstack(model: Transformer) -> list[Block]:
    return model.unstacked_layers()


def _step_keys(keys: Key[Array, " batch"], made: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """A fresh key for each row and token."""
    return jax.vmap(jax.random.fold_in)(keys, made)


def _is_end(model: Transformer, token: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    return jnp.isin(token, jnp.asarray(model.config.end_tokens, token.dtype))


def _round_up(length: int) -> int:
    step = PAGE_SIZE if is_hopper() else LENGTH_STEP
    return -(-length // step) * step
