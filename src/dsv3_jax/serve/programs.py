"""The programs an engine runs: reading chunks of prompts, decoding steps, moving pages.

Every shape is compiled before the first request; a call with another shape raises, so nothing is
compiled while requests run. Small arrays come from the host at each call, for the host keeps the
requests' state; only the pages, and what edits logits, stay on the device.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from dsv3_jax.model.block import Block
from dsv3_jax.model.cache import NewTokens, Pool
from dsv3_jax.model.mtp import MultiTokenPredictor
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.sharding import add_over
from dsv3_jax.serve.request import MAX_LOGPROBS
from dsv3_jax.serve.sampler import RowEdits, RowParams, edit_logits, sample_rows, top_logprobs

Either = Array | np.ndarray
"""The host makes these, the device reads them."""
NO_TOKEN = -1
STOP_TOKENS = 8
"""Of a request at most."""


class Weights(NamedTuple):
    """A model's parts as the programs take them."""

    model: Transformer
    layers: list[Block] | None
    """Its layers one by one, None to scan the stacks."""
    mtp: MultiTokenPredictor | None
    """The module that guesses, likewise."""


class DecodeRows(NamedTuple):
    """Requests to be decoded; a row without one has `is_active` False."""

    is_active: Bool[Either, " rows"]
    token: Int[Either, " rows"]
    """The last one of each, not cached yet."""
    position: Int[Either, " rows"]
    """Where it stands."""
    guess: Int[Either, " rows"]
    """Of the token after the next; `NO_TOKEN` if there is none."""
    made: Int[Either, " rows"]
    limit: Int[Either, " rows"]
    """Tokens to be made in all."""
    stop_tokens: Int[Either, "rows stop_tokens"]
    table: Int[Either, "rows max_pages"]
    temperature: Float[Either, " rows"]
    top_k: Int[Either, " rows"]
    top_p: Float[Either, " rows"]
    min_p: Float[Either, " rows"]
    key_data: UInt32[Either, "rows words"]


class EditState(NamedTuple):
    """What stays on the device of the rows' `RowEdits`."""

    counts: Int[Array, "rows vocab"]
    in_prompt: Bool[Array, "rows vocab"]
    bias: Float[Array, "rows vocab"]


class EditRows(NamedTuple):
    """What comes with each call of it."""

    allowed: UInt32[Either, "rows words"]
    presence: Float[Either, " rows"]
    frequency: Float[Either, " rows"]
    repetition: Float[Either, " rows"]


class Decoded(NamedTuple):
    """What some decode steps made."""

    tokens: Int[Array, "rows most"]
    """`NO_TOKEN` behind each row's last."""
    guess: Int[Array, " rows"]
    guessed: Int[Array, ""]
    """Guesses that were looked at, of all rows and steps."""
    right: Int[Array, ""]
    steps: Int[Array, ""]
    load: Float[Array, "moe_layers experts"] | None
    logprobs: Float[Array, "rows most"] | None
    top_logprobs: Float[Array, "rows most alternatives"] | None
    top_tokens: Int[Array, "rows most alternatives"] | None


@dataclass(frozen=True)
class DecodeProgram:
    """Up to `most_steps` decode steps in one call.

    With `guesses` each step also checks a guess of the MTP module, and makes two tokens of a row
    where it was right. With `edits` logits are edited and log-probabilities given.
    """

    most_steps: int
    guesses: bool = False
    edits: bool = False
    axes: tuple[str, ...] = ()
    """Of the mesh whose devices, each with rows of its own, take every step together."""

    def __call__(
        self,
        weights: Weights,
        pool: Pool,
        rows: DecodeRows,
        steps: Int[Array, ""],
        state: EditState | None = None,
        edit_rows: EditRows | None = None,
    ) -> tuple[Pool, Decoded, EditState | None]:
        """The cache, what was made, and the state of the edits."""
        count = rows.token.shape[0]
        most = self.most_steps * (1 + self.guesses)
        model = weights.model
        made = _Made(
            tokens=jnp.full((count, most), NO_TOKEN, jnp.int32),
            logprobs=jnp.zeros((count, most), jnp.float32) if self.edits else None,
            top=jnp.zeros((count, most, _alternatives(model)), jnp.float32) if self.edits else None,
            top_tokens=jnp.zeros((count, most, _alternatives(model)), jnp.int32)
            if self.edits
            else None,
        )
        config = model.config
        load = jnp.zeros((config.num_moe_layers, config.n_routed_experts), jnp.float32)
        start = _Carry(
            rows=rows,
            first=rows.made,
            pool=pool,
            made=made,
            counts=None if state is None else state.counts,
            load=load if config.num_moe_layers else None,
            guessed=jnp.int32(0),
            right=jnp.int32(0),
            step=jnp.int32(0),
            goes_on=self._any(jnp.asarray(rows.is_active)),
        )
        keys: Any = jax.random.wrap_key_data(jnp.asarray(rows.key_data))
        sampling: Any = rows.temperature, rows.top_k, rows.top_p, rows.min_p
        params = RowParams(*sampling, keys=keys)

        def body(carry: _Carry) -> _Carry:
            return self._step(weights, params, state, edit_rows, carry)

        def goes_on(carry: _Carry) -> Bool[Array, ""]:
            return carry.goes_on & (carry.step < jnp.minimum(steps, self.most_steps))

        end = jax.lax.while_loop(goes_on, body, start)
        decoded = Decoded(
            end.made.tokens,
            end.rows.guess,
            *add_over(self.axes, (end.guessed, end.right)),
            end.step,
            add_over(self.axes, end.load),
            end.made.logprobs,
            end.made.top,
            end.made.top_tokens,
        )
        if state is not None:
            assert end.counts is not None
            state = state._replace(counts=end.counts)
        return end.pool, decoded, state

    def _step(self, weights, params, state, edit_rows, carry: "_Carry") -> "_Carry":
        rows, model = carry.rows, weights.model
        tokens, positions = rows.token[:, None], rows.position[:, None]
        valid = rows.is_active[:, None]
        if self.guesses:
            tokens = jnp.stack([rows.token, jnp.maximum(rows.guess, 0)], axis=1)
            positions = positions + jnp.arange(2, dtype=positions.dtype)
            # The guess's own place would be beyond the request's last token.
            has_room = rows.made + 1 < rows.limit
            valid = jnp.stack([rows.is_active, rows.is_active & has_room], axis=1)
        new = NewTokens(positions, valid, rows.table)
        hidden, pool, load = model.extend(tokens, carry.pool, new, weights.layers)
        logits = model.logits(hidden)
        edited = logits[:, 0]
        if self.edits:
            edits = RowEdits(carry.counts, state.in_prompt, state.bias, *edit_rows)
            edited = edit_logits(edited, edits)
        chosen = sample_rows(edited, rows.made, params)
        ends = self._ends(rows, chosen, 1)
        made = _add(carry.made, carry.rows.made - carry.first, rows.is_active, chosen)
        is_right = jnp.zeros_like(ends)
        token, guess = chosen, jnp.full_like(chosen, NO_TOKEN)  # one of before is of another place
        if self.guesses:
            after = sample_rows(logits[:, 1], rows.made + 1, params)
            is_right = rows.is_active & (rows.guess == chosen) & ~ends
            made = _add(made, rows.made - carry.first + 1, is_right, after)
            ends = jnp.where(is_right, self._ends(rows, after, 2), ends)
            token = jnp.where(is_right, after, chosen)
            following = jnp.stack([chosen, after], axis=1)
            guesses, pool = model.extend_mtp(hidden, following, pool, new, weights.mtp)
            last = jnp.where(is_right[:, None], guesses[:, 1], guesses[:, 0])
            number = rows.made + 1 + is_right.astype(jnp.int32)
            guess = sample_rows(model.logits(last[:, None])[:, 0], number, params)
        counts = carry.counts
        if self.edits:
            row = jnp.arange(chosen.shape[0])
            counts = counts.at[row, chosen].add(rows.is_active.astype(counts.dtype))
            alternatives = top_logprobs(logits[:, 0], chosen)
            place = rows.made - carry.first
            made = made._replace(
                logprobs=made.logprobs.at[row, place].set(alternatives.chosen),
                top=made.top.at[row, place].set(alternatives.top),
                top_tokens=made.top_tokens.at[row, place].set(alternatives.top_tokens),
            )
        advance = jnp.where(rows.is_active, 1 + is_right.astype(jnp.int32), 0)
        looked_at = rows.is_active & (rows.guess != NO_TOKEN) & jnp.bool_(self.guesses)
        is_active = rows.is_active & ~ends
        return _Carry(
            rows=rows._replace(
                is_active=is_active,
                token=jnp.where(rows.is_active, token, rows.token),
                position=rows.position + advance,
                guess=jnp.where(rows.is_active, guess, rows.guess),
                made=rows.made + advance,
            ),
            first=carry.first,
            pool=pool,
            made=made,
            counts=counts,
            load=None if load is None else carry.load + load,
            guessed=carry.guessed + jnp.sum(looked_at, dtype=jnp.int32),
            right=carry.right + jnp.sum(is_right, dtype=jnp.int32),
            step=carry.step + 1,
            goes_on=self._any(is_active),
        )

    def _any(self, is_active: Bool[Array, " rows"]) -> Bool[Array, ""]:
        """Whether a row of any device is active."""
        return add_over(self.axes, jnp.sum(is_active, dtype=jnp.int32)) > 0

    def _ends(self, rows: Any, token: Int[Array, " rows"], number: int):
        """Whether a row's token, the `number`-th of this step, is its last."""
        is_stop = jnp.any(rows.stop_tokens == token[:, None], axis=1)
        return is_stop | (rows.made + number >= rows.limit)


class _Made(NamedTuple):
    tokens: Any
    logprobs: Any
    top: Any
    top_tokens: Any


class _Carry(NamedTuple):
    rows: Any
    """`DecodeRows` of device arrays."""
    first: Any
    """`made` of the rows before the first step."""
    pool: Any
    made: _Made
    counts: Any
    load: Any
    guessed: Any
    right: Any
    step: Any
    goes_on: Any


def _add(made: _Made, place, is_made, tokens) -> _Made:
    """Puts a token of each row that has one into its place."""
    row = jnp.arange(tokens.shape[0])
    place = jnp.where(is_made, place, made.tokens.shape[1])
    return made._replace(tokens=made.tokens.at[row, place].set(tokens, mode="drop"))


def _alternatives(model: Transformer) -> int:
    return min(MAX_LOGPROBS, model.config.vocab_size)


class ChunkRows(NamedTuple):
    """Parts of prompts to be read, of up to as many tokens as the arrays are long."""

    tokens: Int[Either, "rows tokens"]
    next_tokens: Int[Either, "rows tokens"]
    """The one after each, which is the prompt's too."""
    start: Int[Either, " rows"]
    count: Int[Either, " rows"]
    """0 in a row without a prompt."""
    table: Int[Either, "rows max_pages"]


def read_chunks(
    weights: Weights,
    pool: Pool,
    rows: ChunkRows,
    *,
    guesses: bool,
    axes: tuple[str, ...] = (),
) -> tuple[Pool, Float[Array, "moe_layers experts"] | None]:
    """The cache with the chunks' latents, if it `guesses` the MTP module's too, and the experts'
    load over the devices of `axes`."""
    tokens, next_tokens, start, count, table = (jnp.asarray(array) for array in rows)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    new = NewTokens(start[:, None] + offsets, offsets < count[:, None], table)
    hidden, pool, load = weights.model.extend(tokens, pool, new, weights.layers)
    if guesses:
        _, pool = weights.model.extend_mtp(hidden, next_tokens, pool, new, weights.mtp)
    return pool, add_over(axes, load)


def set_edit_row(
    state: EditState,
    row: Int[Array, ""],
    counts: Int[Array, " vocab"],
    in_prompt: Bool[Array, " vocab"],
    bias: Float[Array, " vocab"],
) -> EditState:
    """The state with one row set, none where there is no such row."""
    return EditState(
        state.counts.at[row].set(counts, mode="drop"),
        state.in_prompt.at[row].set(in_prompt, mode="drop"),
        state.bias.at[row].set(bias, mode="drop"),
    )


def empty_decode_rows(rows: int, max_pages: int) -> DecodeRows:
    """Rows without a request."""
    ints = partial(np.zeros, dtype=np.int32)
    floats = partial(np.zeros, dtype=np.float32)
    return DecodeRows(
        is_active=np.zeros((rows,), bool),
        token=ints(rows),
        position=ints(rows),
        guess=ints(rows) - 1,
        made=ints(rows),
        limit=ints(rows),
        stop_tokens=ints((rows, STOP_TOKENS)) - 1,
        table=ints((rows, max_pages)),
        temperature=floats(rows),
        top_k=ints(rows),
        top_p=floats(rows) + 1,
        min_p=floats(rows),
        key_data=np.zeros((rows, 2), np.uint32),
    )


def empty_chunk_rows(rows: int, tokens: int, max_pages: int) -> ChunkRows:
    """Rows without a prompt."""
    ints = partial(np.zeros, dtype=np.int32)
    shape = rows, tokens
    return ChunkRows(ints(shape), ints(shape), ints(rows), ints(rows), ints((rows, max_pages)))


def empty_edit_rows(rows: int, vocab: int) -> EditRows:
    """Nothing is edited."""
    allowed = np.full((rows, -(-vocab // 32)), 2**32 - 1, np.uint32)
    presence, frequency = np.zeros((2, rows), np.float32)
    return EditRows(allowed, presence, frequency, np.ones((rows,), np.float32))
