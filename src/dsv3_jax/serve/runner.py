"""The devices' side of an engine: weights, pages, and the compiled programs over them."""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int

from dsv3_jax.config import ParallelConfig, ServeConfig
from dsv3_jax.model.cache import row_bytes, row_shape
from dsv3_jax.model.expert_slots import slot_tables
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel.expert_placement import Placement
from dsv3_jax.parallel.inference import BY_TOKEN, inference_mesh, one_device_mesh, token_shards
from dsv3_jax.parallel.wire import Wire
from dsv3_jax.serve.pages import CopyPage, DropHost, FromHost, Move, ToHost
from dsv3_jax.serve.placed import SLOTS, Program, arrange_model
from dsv3_jax.serve.programs import (
    ChunkRows,
    Decoded,
    DecodeRows,
    EditRows,
    EditState,
    empty_chunk_rows,
    empty_decode_rows,
    empty_edit_rows,
)

MOVED_PAGES = 4
"""Pages that one call moves."""


class Runner:
    """Runs chunks and decode steps of one model, in shapes that `compile_all` was told.

    Every device of the mesh has the rows of its own requests and its own pages; arrays of rows have
    those of the first device first.
    """

    def __init__(
        self,
        model: Transformer,
        serve: ServeConfig,
        *,
        guesses: bool,
        mesh: Mesh | None = None,
        how: ParallelConfig | None = None,
        wire: Wire | None = None,
        compiler_options: dict[str, Any] | None = None,
    ):
        """On `mesh`, or where the model is. `how` has the dispatcher and its buffers, `wire` what
        rows travel in to the experts and back (None: as the model has it)."""
        config = model.config
        self.config, self.serve, self.guesses = config, serve, guesses
        longest = config.max_position_embeddings
        self.max_pages = serve.pages_per_request(longest)
        self.pages = serve.num_pages(longest)
        self.cache_dtype = serve.cache_dtype or _cache_dtype(model)
        self.compilations = 0
        self.mesh = _mesh_of(model) if mesh is None else inference_mesh(mesh)
        self.devices = token_shards(self.mesh)
        self._compiler_options = dict(compiler_options or {})
        arranged = arrange_model(model, self.mesh, serve, how, wire, guesses)
        self._placed, self.placement = arranged.placed, arranged.placement
        self.layers = arranged.placed.layers
        leaves, shardings = jax.tree.leaves(arranged.weights), self._placed.weight_shardings
        self._leaves = [jax.device_put(*of) for of in zip(leaves, shardings, strict=True)]
        self._by_token = NamedSharding(self.mesh, BY_TOKEN)
        values, dtype = row_shape(config, self.cache_dtype)
        shape = self.devices * self.layers * self.pages, serve.page_size, values
        self._pool = jnp.zeros(shape, dtype, device=self._by_token)
        self._programs: dict[Any, Callable] = {}
        self._lowered: dict[Any, jax.stages.Lowered] = {}
        self._edit_state: EditState | None = None
        self._host: dict[tuple[int, bytes], np.ndarray] = {}

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

    def move(self, moves: Sequence[Sequence[Move]]) -> None:
        """Carries out each device's moves in their order."""
        for device, of_device in enumerate(moves):
            for move in of_device:
                match move:
                    case CopyPage(source, target):
                        numbers = self._for_device(device, [source], 0, size=1)
                        targets = self._for_device(device, [target], self.pages, size=1)
                        self._pool = self._programs["copy_page"](self._pool, numbers, targets)
                    case ToHost(page, key):
                        self._host[device, key] = self.read_pages([page], device)[:, 0]
                    case FromHost(key, page):
                        self.write_pages([page], self._host[device, key][:, None], device)
                    case DropHost(key):
                        del self._host[device, key]

    def read_pages(self, pages: Sequence[int], device: int = 0) -> np.ndarray:
        """Content of a device's pages, [layers, pages, page_size, row]."""
        parts = []
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = self._for_device(device, some, 0)
            content = self._programs["read_pages"](self._pool, numbers)
            shards = content.addressable_shards
            here = next(s for s in shards if s.index[0].start in (None, device * self.layers))
            parts.append(np.asarray(here.data)[:, : len(some)])
        return np.concatenate(parts, axis=1)

    def write_pages(self, pages: Sequence[int], content: np.ndarray, device: int = 0) -> None:
        """Puts content, as `read_pages` gives it, into a device's pages."""
        for first in range(0, len(pages), MOVED_PAGES):
            some = pages[first : first + MOVED_PAGES]
            numbers = self._for_device(device, some, self.pages)
            part = np.zeros((self.layers, MOVED_PAGES, *self._pool.shape[1:]), content.dtype)
            part[:, : len(some)] = content[:, first : first + len(some)]
            self._pool = self._programs["write_pages"](self._pool, numbers, part)

    def _for_device(
        self, device: int, pages: Sequence[int], others: int, size: int = MOVED_PAGES
    ) -> Int[np.ndarray, " numbers"]:
        """Numbers of pages for one device; `others`, of which none counts, for all else."""
        numbers = np.full((self.devices, size), others, np.int32)
        numbers[device, : len(pages)] = pages
        return numbers.reshape(-1)

    def set_edits(
        self,
        row: int,
        counts: Int[np.ndarray, " vocab"],
        in_prompt: Bool[np.ndarray, " vocab"],
        bias: Float[np.ndarray, " vocab"],
    ) -> None:
        """What edits a row's logits from now on."""
        device, here = divmod(row, self.serve.slots)
        rows = self._for_device(device, [here], self.serve.slots, size=1)
        values = counts, in_prompt, bias
        self._edit_state = self._programs["set_edits"](self._edits(True), rows, *values)

    def place_experts(self, layer: int, placement: Placement) -> None:
        """Moves the experts of a MoE layer to where the one layer of `placement` has them."""
        assert self.placement is not None
        placed, is_stacked = self._placed, self._placed.is_stacked
        numbers = placed.expert_leaves(layer)
        leaves = [self._leaves[number] for number in numbers]
        source = _sources(self.placement, layer, placement)
        moved = self._programs["move_experts"](leaves, source, *[np.int32(layer)] * is_stacked)
        for number, leaf in zip(numbers, moved, strict=True):
            self._leaves[number] = leaf
        for number in placed.expert_leaves(layer, SLOTS):
            leaf = self._leaves[number]
            is_counts = "replicas" in placed.paths[number]
            slots, replicas = slot_tables(placement, 0 if is_counts else leaf.shape[-1])
            table = np.array(leaf)
            table[layer if is_stacked else ...] = (replicas if is_counts else slots)[0]
            self._leaves[number] = jax.device_put(table, leaf.sharding)
        self.placement = self.placement.with_layer(layer, placement)

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
            key = "read", self.devices * rows, tokens
            chunks = self.empty_chunks(rows, tokens)
            self._lower(key, self._placed.read(), self._leaves, self._pool, chunks)
        self._lower_moves()
        # XLA compiles one program on one core for the most part, and does not hold Python's lock.
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            made = threads.map(lambda lowered: lowered.compile(), self._lowered.values())
            self._programs |= dict(zip(self._lowered, made, strict=True))
        self.compilations += len(self._lowered)
        self._lowered = {}

    def _lower_decode(self, count: int, guesses: bool, has_edits: bool) -> None:
        of_edits = (self._edits(True), self.empty_edits(count)) if has_edits else (None, None)
        rows, program = self.empty_rows(count), self._placed.decode(guesses, has_edits)
        key = "decode", self.devices * count, guesses, has_edits
        self._lower(key, program, self._leaves, self._pool, rows, np.int32(1), *of_edits)

    def _lower_moves(self) -> None:
        placed, pool, vocab = self._placed, self._pool, self.config.vocab_size
        pages, one = (self._for_device(0, [], 0, size=size) for size in (MOVED_PAGES, 1))
        content = jax.ShapeDtypeStruct((self.layers, MOVED_PAGES, *pool.shape[1:]), pool.dtype)
        row = np.zeros((vocab,), np.int32), np.zeros((vocab,), bool), np.zeros((vocab,), np.float32)
        self._lower("copy_page", placed.copy_page(), pool, one, one)
        self._lower("read_pages", placed.read_pages(), pool, pages)
        self._lower("write_pages", placed.write_pages(), pool, pages, content)
        self._lower("set_edits", placed.set_edits(), self._edits(True), one, *row)
        if self.placement is not None:
            leaves = [self._leaves[number] for number in placed.expert_leaves(0)]
            source = np.zeros((self.placement.expert_of_slot.shape[1],), np.int32)
            which = (np.int32(0),) if placed.is_stacked else ()
            program = placed.move_experts(placed.is_stacked)
            self._lower("move_experts", program, leaves, source, *which)

    def _lower(self, key: Any, program: Program, *arguments: Any) -> None:
        jitted = self._placed.jit(program, self._compiler_options)
        self._lowered[key] = jitted.lower(*arguments)

    # Shapes

    def empty_rows(self, rows: int) -> DecodeRows:
        """Rows without a request, as many on each device."""
        return empty_decode_rows(self.devices * rows, self.max_pages)

    def empty_chunks(self, rows: int, tokens: int) -> ChunkRows:
        """Rows without a prompt, as many on each device."""
        return empty_chunk_rows(self.devices * rows, tokens, self.max_pages)

    def empty_edits(self, rows: int) -> EditRows:
        """Nothing is edited in as many rows of each device."""
        return empty_edit_rows(self.devices * rows, self.config.vocab_size)

    def _edits(self, wanted: Any) -> EditState | None:
        """The state of the edits, made when first needed."""
        if wanted is None:
            return None
        if self._edit_state is None:
            shape = self.devices * self.serve.slots, self.config.vocab_size
            dtypes, device = (jnp.int32, jnp.bool_, jnp.float32), self._by_token
            self._edit_state = EditState(*(jnp.zeros(shape, d, device=device) for d in dtypes))
        return self._edit_state


def _cache_dtype(model: Transformer) -> str:
    """What holds the model's own latents."""
    return "bf16" if model.norm.weight[...].dtype == jnp.bfloat16 else "fp32"


def _mesh_of(model: Transformer) -> Mesh:
    if model.mesh is not None:
        return model.mesh
    (device,) = model.norm.weight[...].devices()
    return one_device_mesh(device)


def _sources(before: Placement, layer: int, after: Placement) -> Int[np.ndarray, " slots"]:
    """For each slot one that has now the expert which is to be there: itself, if it has it."""
    old, new = before.expert_of_slot[layer], after.expert_of_slot[0]
    first = before.slots_of()[layer, :, 0]
    return np.where(old == new, np.arange(old.size), first[new]).astype(np.int32)
