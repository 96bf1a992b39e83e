"""The device's side of an engine: weights, pages, and the compiled programs over them."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from dsv3_jax.config import ServeConfig
from dsv3_jax.model.cache import (
    copy_pages,
    empty_pool,
    read_pages,
    row_bytes,
    write_pages,
)
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.pages import CopyPage, DropHost, FromHost, Move, ToHost
from dsv3_jax.serve.programs import (
    STOP_TOKENS,
    ChunkRows,
    Decoded,
    DecodeProgram,
    DecodeRows,
    EditRows,
    EditState,
    Weights,
    read_chunks,
    set_edit_row,
)

UNSTACKED_LAYERS = 16
"""Up to this many layers have their own arrays and are unrolled: quicker, on CPU twice, but the
program grows with them."""
MOVED_PAGES = 4
"""Pages that one call moves."""


class Runner:
    """Runs chunks and decode steps of one model, in shapes that `compile_all` was told."""

    def __init__(
        self,
        model: Transformer,
        serve: ServeConfig,
        *,
        guesses: bool,
        compiler_options: dict[str, Any] | None = None,
    ):
        config = model.config
        self.config, self.serve, self.guesses = config, serve, guesses
        longest = config.max_position_embeddings
        self.max_pages = serve.pages_per_request(longest)
        self.pages = serve.num_pages(longest)
        self.layers = model.cached_layers
        self.cache_dtype = serve.cache_dtype or _cache_dtype(model)
        self.compilations = 0
        self._compiler_options = dict(compiler_options or {})
        self._leaves, self._structure = jax.tree.flatten(_parts(model, guesses))
        sizes = self.layers, self.pages, serve.page_size
        self._pool = empty_pool(config, self.cache_dtype, *sizes)
        self._programs: dict[Any, Callable] = {}
        self._lowered: dict[Any, jax.stages.Lowered] = {}
        self._edit_state: EditState | None = None
        self._host: dict[bytes, np.ndarray] = {}

    @property
    def cache_bytes_per_token(self) -> int:
        """Over all layers."""
        return self.layers * row_bytes(self.config, self.cache_dtype)

    # What runs

    def decode(
        self, rows: DecodeRows, steps: int, guesses: bool, edit_rows: EditRows | None
    ) -> tuple[Decoded, float]:
        """What up to `steps` steps made, in host memory, and the seconds they took."""
        key = "decode", rows.token.shape[0], guesses, edit_rows is not None
        started = time.perf_counter()
        arguments = rows, np.int32(steps), self._edits(edit_rows), edit_rows
        self._pool, decoded, state = self._programs[key](self._leaves, self._pool, *arguments)
        if state is not None:
            self._edit_state = state
        decoded = jax.tree.map(np.asarray, decoded)
        return decoded, time.perf_counter() - started

    def read(self, rows: ChunkRows) -> tuple[np.ndarray | None, float]:
        """Reads chunks: the experts' load, and the seconds it took."""
        key = "read", *rows.tokens.shape
        started = time.perf_counter()
        self._pool, load = self._programs[key](self._leaves, self._pool, rows)
        jax.block_until_ready(self._pool)
        seconds = time.perf_counter() - started
        return None if load is None else np.asarray(load), seconds

    def move(self, moves: Sequence[Move]) -> None:
        """Carries out moves in their order."""
        for move in moves:
            match move:
                case CopyPage(source, target):
                    numbers = np.array([source], np.int32), np.array([target], np.int32)
                    self._pool = self._programs["copy_page"](self._pool, *numbers)
                case ToHost(page, key):
                    self._host[key] = self.read_pages([page])[:, 0]
                case FromHost(key, page):
                    self.write_pages([page], self._host[key][:, None])
                case DropHost(key):
                    del self._host[key]

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """Content of pages, [layers, pages, page_size, row]."""
        parts = []
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = np.zeros((MOVED_PAGES,), np.int32)
            numbers[: len(some)] = some
            content = self._programs["read_pages"](self._pool, numbers)
            parts.append(np.asarray(content)[:, : len(some)])
        return np.concatenate(parts, axis=1)

    def write_pages(self, pages: Sequence[int], content: np.ndarray) -> None:
        """Puts content, as `read_pages` gives it, into pages."""
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = np.full((MOVED_PAGES,), self.pages, np.int32)
            numbers[: len(some)] = some
            part = np.zeros((self.layers, MOVED_PAGES, *self._pool.shape[1:]), content.dtype)
            part[:, : len(some)] = content[:, first : first + len(some)]
            self._pool = self._programs["write_pages"](self._pool, numbers, part)

    def set_edits(
        self,
        row: int,
        counts: Int[np.ndarray, " vocab"],
        in_prompt: Bool[np.ndarray, " vocab"],
        bias: Float[np.ndarray, " vocab"],
    ) -> None:
        """What edits a row's logits from now on."""
        state, number = self._edits(True), np.int32(row)
        self._edit_state = self._programs["set_edits"](state, number, counts, in_prompt, bias)

    # Compiling

    def compile_all(
        self, decode_rows: Sequence[int], chunk_shapes: Sequence[tuple[int, int]]
    ) -> None:
        """Makes the programs: decoding for each number of rows, if any, reading for each (rows,
        tokens)."""
        for count in decode_rows:
            for guesses in sorted({False, self.guesses}):
                self._lower_decode(count, guesses, has_edits=False)
        if decode_rows:
            self._lower_decode(self.serve.slots, guesses=False, has_edits=True)
        for rows, tokens in chunk_shapes:
            function = partial(read_chunks, guesses=self.guesses)
            self._lower_model(("read", rows, tokens), function, self.empty_chunks(rows, tokens))
        self._lower_moves()
        # XLA compiles one program on one core for the most part, and does not hold Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = threads.map(lambda lowered: lowered.compile(), self._lowered.values())
            self._programs |= dict(zip(self._lowered, made, strict=True))
        self.compilations += len(self._lowered)
        self._lowered = {}

    def _lower_decode(self, count: int, guesses: bool, has_edits: bool) -> None:
        program = DecodeProgram(self.serve.decode_steps, guesses, has_edits)
        of_edits = (self._edits(True), self.empty_edits(count)) if has_edits else (None, None)
        key = "decode", count, guesses, has_edits
        self._lower_model(key, program, self.empty_rows(count), np.int32(1), *of_edits)

    def _lower_model(self, key: tuple, function: Callable, *arguments: Any) -> None:
        """A program of the weights, the pages and more; the pages are updated in place."""
        structure = self._structure

        def call(leaves, pool, *rest):
            return function(jax.tree.unflatten(structure, leaves), pool, *rest)

        self._lower(key, call, self._leaves, self._pool, *arguments, donate=1)

    def _lower_moves(self) -> None:
        pool, layers, pages = self._pool, self.layers, np.zeros((MOVED_PAGES,), np.int32)
        one, vocab = pages[:1], self.config.vocab_size
        content = jax.ShapeDtypeStruct((layers, MOVED_PAGES, *pool.shape[1:]), pool.dtype)
        row = np.zeros((vocab,), np.int32), np.zeros((vocab,), bool), np.zeros((vocab,), np.float32)
        self._lower("copy_page", partial(copy_pages, layers=layers), pool, one, one, donate=0)
        self._lower("read_pages", partial(read_pages, layers=layers), pool, pages)
        self._lower("write_pages", write_pages, pool, pages, content, donate=0)
        self._lower("set_edits", set_edit_row, self._edits(True), np.int32(0), *row, donate=0)

    def _lower(
        self, key: Any, function: Callable, *arguments: Any, donate: int | None = None
    ) -> None:
        options = self._compiler_options
        jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
        self._lowered[key] = jitted.lower(*arguments)

    # Shapes

    def empty_rows(self, rows: int) -> DecodeRows:
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
            table=ints((rows, self.max_pages)),
            temperature=floats(rows),
            top_k=ints(rows),
            top_p=floats(rows) + 1,
            min_p=floats(rows),
            key_data=np.zeros((rows, 2), np.uint32),
        )

    def empty_chunks(self, rows: int, tokens: int) -> ChunkRows:
        """Rows without a prompt."""
        ints = partial(np.zeros, dtype=np.int32)
        shape = rows, tokens
        return ChunkRows(
            ints(shape), ints(shape), ints(rows), ints(rows), ints((rows, self.max_pages))
        )

    def empty_edits(self, rows: int) -> EditRows:
        """Nothing is edited."""
        words = -(-self.config.vocab_size // 32)
        allowed = np.full((rows, words), 2**32 - 1, np.uint32)
        presence, frequency = np.zeros((2, rows), np.float32)
        return EditRows(allowed, presence, frequency, np.ones((rows,), np.float32))

    def _edits(self, wanted: Any) -> EditState | None:
        """The state of the edits, made when first needed."""
        if wanted is None:
            return None
        if self._edit_state is None:
            shape = self.serve.slots, self.config.vocab_size
            dtypes = jnp.int32, jnp.bool_, jnp.float32
            self._edit_state = EditState(*(jnp.zeros(shape, dtype) for dtype in dtypes))
        return self._edit_state


def _cache_dtype(model: Transformer) -> str:
    """What holds the model's own latents."""
    return "bf16" if model.norm.weight[...].dtype == jnp.bfloat16 else "fp32"


def _parts(model: Transformer, guesses: bool) -> Weights:
    """The model's parts; where layers are taken out of their stacks, without the stacks."""
    if model.config.num_hidden_layers > UNSTACKED_LAYERS:
        return Weights(model, None, None)
    mtp = model.layers("mtp")[0] if guesses else None
    layers = model.unstacked_layers()
    rest = nnx.merge(*nnx.split(model))
    for name in ("dense_layers", "moe_layers", "mtp"):
        if name in vars(rest):
            delattr(rest, name)
    return Weights(rest, layers, mtp)
