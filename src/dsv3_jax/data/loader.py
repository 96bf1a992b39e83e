"""Batches: which rows come when, on which host, and how to go on from a saved position.

Sequence number n of a run is a function of (rows, weights, seed, n) alone. Each source is shuffled
anew every epoch, repeated, and mixed with the others by weight. A batch takes the next sequences,
a host takes its contiguous part of them, and the position to save is the one number n.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int32, Integer

from dsv3_jax.config import DataConfig, DataSource
from dsv3_jax.data.packing import cut_rows, document_ids, fim_ids, pack_documents
from dsv3_jax.data.sources import (
    Document,
    check_token_ids,
    expand_paths,
    open_token_array,
    read_documents,
    split_documents,
)
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

KIND_OF_SUFFIX = {".jsonl": "jsonl", ".parquet": "parquet"}
DIGEST_ROWS = 64


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of `seq_len + 1` tokens from several arrays as one list; arrays may be mapped files."""

    arrays: tuple[Integer[np.ndarray, "_ row_tokens"], ...]
    names: tuple[str, ...]
    vocab_size: int

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(array) for array in self.arrays))

    def __len__(self) -> int:
        return self._ends[-1] if self.arrays else 0

    def __getitem__(self, index: int) -> Int32[np.ndarray, " row_tokens"]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        local = index - (self._ends[part - 1] if part else 0)
        row = self.arrays[part][local]
        check_token_ids(row[None], self.vocab_size, self.names[part], local)
        return np.asarray(row, np.int32)

    def digest(self) -> str:
        """Changes when rows are added, removed or, as far as 64 samples show, changed."""
        count = min(len(self), DIGEST_ROWS)
        state = hashlib.blake2b(f"{len(self)}".encode(), digest_size=8)
        for sample in range(count):
            state.update(self[sample * len(self) // count].tobytes())
        return state.hexdigest()


@dataclass(frozen=True, eq=False)
class PreparedData:
    """What a run reads: the tokenizer, the rows of each source, and what is held out.

    `tokenizer` is None for token arrays without `data.tokenizer`; `held_out` is empty for token
    arrays; `held_out_rows` is empty if nothing is held out.
    """

    config: DataConfig
    tokenizer: Tokenizer | None
    rows: tuple[TokenRows, ...]
    held_out_rows: TokenRows
    held_out: tuple[Document, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """One host's part of a batch. `documents` is None unless `data.cross_document_mask`."""

    tokens: Int32[np.ndarray, "batch row_tokens"]
    documents: Int32[np.ndarray, "batch row_tokens"] | None


def prepare(
    config: DataConfig, vocab_size: int, seed: int = 0, tokenizer: Tokenizer | None = None
) -> PreparedData:
    """Everything of `config` read, tokenised and packed; the same on every host.

    `tokenizer`, if given, is used in place of `data.tokenizer` and of training one. `seed` decides
    the fill-in-the-middle cuts, which stay the same in every epoch; held-out text has none.
    Text is tokenised at every start, about 2 MB a second and core, and lives in memory: tokens of
    2 or 4 bytes, and while it is read the text itself. Beyond some 100 MB tokenise once into .npy
    files: `tokens` maps those and reads only the rows it needs.
    Token arrays hold out no rows by themselves, they need `data.eval_paths`.
    """
    if tokenizer is None and config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    if config.sources[0].source == "tokens":
        return _prepare_tokens(config, vocab_size, tokenizer)
    return _prepare_text(config, vocab_size, seed, tokenizer)


def _prepare_tokens(
    config: DataConfig, vocab_size: int, tokenizer: Tokenizer | None
) -> PreparedData:
    if config.cross_document_mask and (tokenizer is None or tokenizer.eos_id is None):
        raise ValueError(
            "data.cross_document_mask is True, expected data.tokenizer to name a tokenizer"
            " with an end-of-sentence token, which separates documents in token arrays"
        )
    if config.fim_rate > 0:
        raise ValueError(
            f"data.fim_rate is {config.fim_rate}, expected 0 for token arrays: fill-in-the-middle"
            " rearranges text before it becomes tokens"
        )
    held_out_paths = {file.path.resolve() for file in expand_paths(config.eval_paths)}

    def open_all(paths: Sequence[str], without: Collection[Path] = ()) -> TokenRows:
        files = [file for file in expand_paths(paths) if file.path.resolve() not in without]
        arrays = (open_token_array(file.path, config.seq_len, vocab_size) for file in files)
        return TokenRows(tuple(arrays), tuple(str(file.path) for file in files), vocab_size)

    return PreparedData(
        config=config,
        tokenizer=tokenizer,
        rows=tuple(open_all(part.paths, held_out_paths) for part in config.sources),
        held_out_rows=open_all(config.eval_paths),
        held_out=(),
    )


def _prepare_text(
    config: DataConfig, vocab_size: int, seed: int, tokenizer: Tokenizer | None
) -> PreparedData:
    training, held_out = _read_split(config)
    if tokenizer is None:
        texts = (document.text for documents in training for document in documents)
        tokenizer = train_tokenizer(texts, vocab_size)
    if config.fim_rate > 0:
        fim_ids(tokenizer)  # raises before an hour of tokenising does
    rows = []
    for part, documents in zip(config.sources, training, strict=True):
        stream = pack_documents(documents, tokenizer, config.fim_rate, seed)
        rows.append(_rows_of(stream, config.seq_len, tokenizer, _describe(part)))
    held_out_rows = TokenRows((), (), tokenizer.vocab_size)
    if held_out:
        stream = pack_documents(held_out, tokenizer)
        held_out_rows = _rows_of(stream, config.seq_len, tokenizer, "held-out documents")
    return PreparedData(config, tokenizer, tuple(rows), held_out_rows, tuple(held_out))


def _describe(part: DataSource) -> str:
    return ", ".join(part.paths) or part.source


def _rows_of(
    stream: Integer[np.ndarray, " tokens"], seq_len: int, tokenizer: Tokenizer, name: str
) -> TokenRows:
    rows = cut_rows(stream, seq_len)
    if len(rows) == 0:
        raise ValueError(
            f"{name}: {len(stream)} tokens, expected at least one row of data.seq_len + 1 ="
            f" {seq_len + 1}"
        )
    return TokenRows((rows,), (name,), tokenizer.vocab_size)


def _read_split(config: DataConfig) -> tuple[list[list[Document]], list[Document]]:
    """Training documents of each source, and the held-out documents of all.

    A file of `data.eval_paths` that a training glob matches too is not trained on.
    """
    without = {file.path.resolve() for file in expand_paths(config.eval_paths)}
    documents = [read_documents(part, config.text_field, without) for part in config.sources]
    if config.eval_paths:
        return documents, _read_eval_paths(config)
    if config.eval_fraction == 0:
        return documents, []
    splits = [split_documents(part, config.eval_fraction) for part in documents]
    held_out = [document for _, part in splits for document in part]
    training = [part for part, _ in splits]
    for part, kept in zip(config.sources, training, strict=True):
        if not kept:
            raise ValueError(
                f"data.eval_fraction is {config.eval_fraction}, which holds out every document of"
                f" {_describe(part)}; expected a smaller fraction or data.eval_paths"
            )
    if not held_out:
        total = sum(len(part) for part in documents)
        raise ValueError(
            f"data.eval_fraction is {config.eval_fraction}, which holds out none of the {total}"
            " documents; expected a larger fraction, data.eval_paths, or 0 for no evaluation"
        )
    return training, held_out


def _read_eval_paths(config: DataConfig) -> list[Document]:
    """Held-out documents: of the sources' kind if they have one, else by the file's suffix."""
    kinds = {part.source for part in config.sources} - {"python_stdlib"}
    held_out = []
    for path in config.eval_paths:
        by_suffix = KIND_OF_SUFFIX.get(Path(path).suffix, "text")
        kind = next(iter(kinds)) if len(kinds) == 1 else by_suffix
        held_out += read_documents(DataSource(source=kind, paths=(path,)), config.text_field)
    return held_out


class Loader:
    """Training batches without end, and the fixed held-out ones.

    `seed` alone decides the order, not the number of hosts: of every batch of `batch_size`
    sequences, host `process_index` of `process_count` gets its contiguous part.
    With `data.shuffle=False` rows come in file order, epoch after epoch. A mixture takes from
    each source in proportion to its weight, to within a hundredth of the weight.
    """

    def __init__(
        self,
        data: PreparedData,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        available = sum(len(rows) for rows in data.rows)
        if available < batch_size:
            raise ValueError(
                f"train.batch_size is {batch_size}, expected at most the {available} rows of"
                f" data.seq_len {data.config.seq_len} that the training data fill"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index}, expected 0 to {process_count - 1}")
        self._data = data
        self._batch_size = batch_size
        self._seed = seed
        self._process = (process_index, process_count)
        self._part_of_host(batch_size)  # raises if the hosts cannot share it
        self._sequences = _ordered(data, seed)
        self._position = 0

    def next_batch(self, batch_size: int | None = None) -> Batch:
        """This host's part of the next `batch_size` sequences, by default the Loader's."""
        size = self._batch_size if batch_size is None else batch_size
        mine = self._part_of_host(size)
        tokens = np.stack([_row(self._sequences, self._position + i) for i in mine])
        self._position += size
        return self._batch(tokens)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def eval_batches(self, count: int) -> list[Batch]:
        """This host's part of the first `count` held-out batches, the same at every call.

        In document order, whole batches only, so fewer where less is held out. ValueError if
        that is not one.
        """
        rows = self._data.held_out_rows
        whole = len(rows) // self._batch_size
        if whole == 0:
            raise ValueError(
                f"evaluation has {len(rows)} held-out rows of data.seq_len"
                f" {self._data.config.seq_len}, expected at least one batch of"
                f" {self._batch_size}: raise data.eval_fraction or set data.eval_paths"
            )
        mine = self._part_of_host(self._batch_size)
        starts = range(0, min(count, whole) * self._batch_size, self._batch_size)
        return [self._batch(np.stack([rows[start + i] for i in mine])) for start in starts]

    def get_state(self) -> dict[str, Any]:
        """The position, counted in sequences of all hosts, and what it is a position in. JSON."""
        return {"position": self._position, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken: the batches that follow are identical.

        ValueError if the data, their order or the seed differ from those of `state`.
        """
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"data position: {name} is {mine!r}, expected {state.get(name)!r} as when the"
                    " position was saved (same data, tokenizer, data section and seed)"
                )
        self._position = int(state["position"])

    @cached_property
    def _identity(self) -> dict[str, Any]:
        config = self._data.config
        return {
            "seed": self._seed,
            "shuffle": config.shuffle,
            "seq_len": config.seq_len,
            "weights": [part.weight for part in config.sources],
            "rows": [len(rows) for rows in self._data.rows],
            "digests": [rows.digest() for rows in self._data.rows],
        }

    def _part_of_host(self, batch_size: int) -> range:
        index, count = self._process
        if batch_size < count or batch_size % count:
            raise ValueError(
                f"batch size is {batch_size}, expected a multiple of the {count} processes"
            )
        size = batch_size // count
        return range(index * size, (index + 1) * size)

    def _batch(self, tokens: Int32[np.ndarray, "batch row_tokens"]) -> Batch:
        if not self._data.config.cross_document_mask:
            return Batch(tokens, None)
        tokenizer = self._data.tokenizer
        assert tokenizer is not None  # prepare() saw to it
        assert tokenizer.eos_id is not None
        return Batch(tokens, document_ids(tokens, tokenizer.eos_id))


def _ordered(data: PreparedData, seed: int) -> grain.MapDataset:
    """Every sequence of the run by its number, without end."""
    parts = []
    for index, rows in enumerate(data.rows):
        part = grain.MapDataset.source(rows)
        if data.config.shuffle:
            part = part.shuffle(_shuffle_seed(seed, index))
        parts.append(part.repeat())
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [part.weight for part in data.config.sources])


def _row(sequences: grain.MapDataset, number: int) -> Int32[np.ndarray, " row_tokens"]:
    row = sequences[number]
    assert row is not None  # only filters leave gaps
    return row


def _shuffle_seed(seed: int, source_index: int) -> int:
    """Grain shuffles epoch e with seed + e: spread, so that no run repeats another's epochs."""
    return int(np.random.SeedSequence([seed, source_index]).generate_state(1)[0])
