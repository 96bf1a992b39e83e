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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ServeConfig
from dsv3_jax.model.cache import (
    copy_pages,
    empty_pool,
    read_pages,
    row_bytes,
    write_pages,
)
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.mesh import TOKEN_AXES, used_axes
from dsv3_jax.parallel.mesh import compiler_options as gpu_options
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
ROWS = PartitionSpec(TOKEN_AXES)
WHOLE = PartitionSpec()
CACHE_DTYPE_OF = {"float32": "fp32", "bfloat16": "bf16"}


class Runner:
    """Runs chunks and decode steps of `Programs`, all shapes of which `compile_all` makes.

    Arrays of rows are those of all devices of the mesh, one device's after the other's.
    """

    def __init__(
        self,
        model: Transformer,
        serve: ServeConfig,
        *,
        guesses: bool,
        mesh: Mesh | None = None,
        specs: Any = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        config = model.config
        self.config, self.serve, self.mesh = config, serve, mesh
        self.devices = 1 if mesh is None else mesh.size
        self.guesses = guesses
        longest = config.max_position_embeddings
        self.max_pages = serve.pages_per_request(longest)
        self.pages = serve.num_pages(longest)
        self.layers = model.cached_layers
        self.cache_dtype = serve.cache_dtype or _cache_dtype(model)
        self.compilations = 0
        self._compiler_options = dict(compiler_options or {})
        self._axes = () if mesh is None else used_axes(mesh, TOKEN_AXES)
        weights = _parts(model, guesses, is_whole=mesh is None)
        self._leaves, self._structure = jax.tree.flatten(weights)
        self._specs = [WHOLE] * len(self._leaves) if specs is None else jax.tree.leaves(specs)
        self._pool = self._new_pool()
        self._programs: dict[Any, Callable] = {}
        self._lowered: dict[Any, jax.stages.Lowered] = {}
        self._edit_state: EditState | None = None
        self._host: list[dict[bytes, np.ndarray]] = [{} for _ in range(self.devices)]

    @property
    def cache_bytes_per_token(self) -> int:
        """Over all layers."""
        return self.layers * row_bytes(self.config, self.cache_dtype)

    # What runs

    def decode(
        self, rows: DecodeRows, steps: int, guesses: bool, edit_rows: EditRows | None
    ) -> tuple[Decoded, float]:
        """What up to `steps` steps made, in host memory, and the seconds they took."""
        key = "decode", rows.token.shape[0] // self.devices, guesses, edit_rows is not None
        started = time.perf_counter()
        arguments = rows, np.int32(steps), self._edits(edit_rows), edit_rows
        self._pool, decoded, state = self._programs[key](self._leaves, self._pool, *arguments)
        if state is not None:
            self._edit_state = state
        decoded = jax.tree.map(np.asarray, decoded)
        return decoded, time.perf_counter() - started

    def read(self, rows: ChunkRows) -> tuple[np.ndarray | None, float]:
        """Reads chunks: the experts' load, and the seconds it took."""
        key = "read", rows.tokens.shape[0] // self.devices, rows.tokens.shape[1]
        started = time.perf_counter()
        self._pool, load = self._programs[key](self._leaves, self._pool, rows)
        jax.block_until_ready(self._pool)
        seconds = time.perf_counter() - started
        return None if load is None else np.asarray(load), seconds

    def move(self, moves: Sequence[Sequence[Move]]) -> None:
        """Carries out each device's moves in their order."""
        for device, of_device in enumerate(moves):
            host = self._host[device]
            for move in of_device:
                match move:
                    case CopyPage(source, target):
                        self._copy(device, source, target)
                    case ToHost(page, key):
                        host[key] = self.read_pages(device, [page])[:, 0]
                    case FromHost(key, page):
                        self.write_pages(device, [page], host[key][:, None])
                    case DropHost(key):
                        del host[key]

    def read_pages(self, device: int, pages: Sequence[int]) -> np.ndarray:
        """Content of a device's pages, [layers, pages, page_size, row]."""
        parts = []
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = np.zeros((self.devices, MOVED_PAGES), np.int32)
            numbers[device, : len(some)] = some
            content = self._programs["read_pages"](self._pool, numbers.reshape(-1))
            of_device = np.asarray(content).reshape(self.devices, self.layers, MOVED_PAGES, -1)
            shape = (self.layers, len(some), *self._pool.shape[1:])
            parts.append(of_device[device, :, : len(some)].reshape(shape))
        return np.concatenate(parts, axis=1)

    def write_pages(self, device: int, pages: Sequence[int], content: np.ndarray) -> None:
        """Puts content, as `read_pages` gives it, into a device's pages."""
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = np.full((self.devices, MOVED_PAGES), self.pages, np.int32)
            numbers[device, : len(some)] = some
            part = np.zeros(
                (self.devices, self.layers, MOVED_PAGES, *self._pool.shape[1:]), content.dtype
            )
            part[device, :, : len(some)] = content[:, first : first + len(some)]
            part = part.reshape(-1, *part.shape[2:])
            self._pool = self._programs["write_pages"](self._pool, numbers.reshape(-1), part)

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

    def _copy(self, device: int, source: int, target: int) -> None:
        numbers = np.full((2, self.devices), self.pages, np.int32)
        numbers[:, device] = source, target
        self._pool = self._programs["copy_page"](self._pool, numbers[0], numbers[1])

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
            function = partial(read_chunks, guesses=self.guesses, axes=self._axes)
            key, example = ("read", rows, tokens), self.empty_chunks(rows, tokens)
            self._lower_model(key, function, (example,), (ROWS,), (ROWS, WHOLE))
        self._lower_moves()
        # XLA compiles one program on one core for the most part, and does not hold Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = threads.map(lambda lowered: lowered.compile(), self._lowered.values())
            self._programs |= dict(zip(self._lowered, made, strict=True))
        self.compilations += len(self._lowered)
        self._lowered = {}

    def _lower_decode(self, count: int, guesses: bool, has_edits: bool) -> None:
        program = DecodeProgram(self.serve.decode_steps, guesses, has_edits, self._axes)

        def decode(weights, pool, rows, steps, state, edit_rows):
            return program(weights, pool, rows, steps, state, edit_rows)

        of_edits = (self._edits(True), self.empty_edits(count)) if has_edits else (None, None)
        arguments = self.empty_rows(count), np.int32(1), *of_edits
        results: Any = Decoded  # its fields hold arrays elsewhere
        results = results(*(ROWS, ROWS, WHOLE, WHOLE, WHOLE, WHOLE, ROWS, ROWS, ROWS))
        key = "decode", count, guesses, has_edits
        self._lower_model(key, decode, arguments, (ROWS, WHOLE, ROWS, ROWS), (ROWS, results, ROWS))

    def _lower_model(self, key, function, arguments, in_specs, out_specs) -> None:
        """A program of the weights, the pages and more; the pages are updated in place."""
        structure = self._structure

        def call(leaves, pool, *rest):
            return function(jax.tree.unflatten(structure, leaves), pool, *rest)

        specs = (self._specs, ROWS, *in_specs)
        self._lower(key, call, (self._leaves, self._pool, *arguments), specs, out_specs, (1,))

    def _lower_moves(self) -> None:
        layers, pages = self.layers, np.zeros((self.devices * MOVED_PAGES,), np.int32)
        one = pages[: self.devices]
        content = jax.ShapeDtypeStruct(
            (self.devices * layers, MOVED_PAGES, *self._pool.shape[1:]), self._pool.dtype
        )
        self._lower(
            "copy_page",
            lambda pool, source, target: copy_pages(pool, source, target, layers),
            (self._pool, one, one),
            (ROWS, ROWS, ROWS),
            ROWS,
            (0,),
        )
        self._lower(
            "read_pages",
            lambda pool, numbers: read_pages(pool, numbers, layers),
            (self._pool, pages),
            (ROWS, ROWS),
            ROWS,
        )
        self._lower(
            "write_pages", write_pages, (self._pool, pages, content), (ROWS, ROWS, ROWS), ROWS, (0,)
        )
        if self.mesh is None:
            state, vocab = self._edits(True), self.config.vocab_size
            row = np.zeros((vocab,), np.int32), np.zeros((vocab,), bool), np.zeros((vocab,), "f4")
            specs = (ROWS, WHOLE, WHOLE, WHOLE, WHOLE)
            self._lower("set_edits", set_edit_row, (state, np.int32(0), *row), specs, ROWS, (0,))

    def _lower(self, key, function, arguments, in_specs, out_specs, donate=()) -> None:
        options = dict(self._compiler_options)
        if self.mesh is not None:
            function = jax.shard_map(
                function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
            )
            options |= gpu_options(self.mesh) or {}
        jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
        self._lowered[key] = jitted.lower(*arguments)

    # Shapes

    def empty_rows(self, count: int) -> DecodeRows:
        """Rows without a request, of `count` for each device."""
        rows = count * self.devices
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
        rows *= self.devices
        shape = rows, tokens
        return ChunkRows(
            ints(shape), ints(shape), ints(rows), ints(rows), ints((rows, self.max_pages))
        )

    def empty_edits(self, count: int) -> EditRows:
        """Nothing is edited."""
        rows, words = count * self.devices, -(-self.config.vocab_size // 32)
        allowed = np.full((rows, words), 2**32 - 1, np.uint32)
        presence, frequency = np.zeros((2, rows), np.float32)
        return EditRows(allowed, presence, frequency, np.ones((rows,), np.float32))

    def _edits(self, wanted: Any) -> EditState | None:
        """The state of the edits, made when first needed."""
        if wanted is None:
            return None
        if self._edit_state is None:
            shape = self.serve.slots * self.devices, self.config.vocab_size
            dtypes = jnp.int32, jnp.bool_, jnp.float32
            self._edit_state = EditState(*(self._placed(jnp.zeros(shape, d)) for d in dtypes))
        return self._edit_state

    def _new_pool(self) -> Array:
        sizes = self.cache_dtype, self.layers * self.devices, self.pages, self.serve.page_size
        return self._placed(empty_pool(self.config, *sizes))

    def _placed(self, array: Array) -> Array:
        return array if self.mesh is None else jax.device_put(array, NamedSharding(self.mesh, ROWS))


def _cache_dtype(model: Transformer) -> str:
    """What holds the model's own latents."""
    dtype = model.norm.weight[...].dtype
    return CACHE_DTYPE_OF.get(str(dtype), "bf16")


def _parts(model: Transformer, guesses: bool, is_whole: bool) -> Weights:
    """The model's parts; where layers are taken out of their stacks, without the stacks."""
    if model.config.num_hidden_layers > UNSTACKED_LAYERS or not is_whole:
        return Weights(model, None, None)
    mtp = model.layers("mtp")[0] if guesses else None
    layers = model.unstacked_layers()
    rest = nnx.merge(*nnx.split(model))
    for name in ("dense_layers", "moe_layers", "mtp"):
        if name in vars(rest):
            delattr(rest, name)
    return Weights(rest, layers, mtp)
