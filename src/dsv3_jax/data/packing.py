"""Documents to rows: fill-in-the-middle, concatenation, cutting. Pure functions.

A stream is every document's tokens and an end-of-document token after each. Row r holds tokens
[r * seq_len, r * seq_len + seq_len + 1), so neighbours share one token: it is the last target of
one and the first input of the next, and every token but the stream's first is predicted once.

    stream   a b c $ d e f g $ h i $        seq_len 4
    row 0    a b c $ d                      inputs a b c $   targets b c $ d
    row 1            d e f g $              inputs d e f g   targets e f g $
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Int32, Integer

from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import FIM_BEGIN, Tokenizer, cut_text

CHUNK_CHARS = 2**20  # encoded at a time: tokenizers keeps strings and offsets of them all


def pack_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, fim_rate: float = 0.0, seed: int = 0
) -> Integer[np.ndarray, " tokens"]:
    """The stream of `documents` (module docstring), uint16 where the vocabulary fits.

    A share `fim_rate` of the documents is rearranged to prefix-suffix-middle first. No bos token
    is put in: as in pre-training, what starts a document is the eos before it.
    """
    eos = _required(tokenizer.eos_id, "end-of-sentence token", "one to put between documents")
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    cuts = [
        [cut_text(part) for part in fim_parts(document.text, fim_rate, seed, document.name)]
        for document in documents
    ]
    pieces = (piece for parts in cuts for part in parts for piece in part)
    encoded = _encode(pieces, tokenizer, dtype)
    stream = [np.zeros(0, dtype)]
    for parts in cuts:
        ids = [np.concatenate(list(islice(encoded, len(part)))) for part in parts]
        stream.append(ids[0] if len(ids) == 1 else fim_join(ids[0], ids[1], ids[2], tokenizer))
        stream.append(np.array([eos], dtype))
    return np.concatenate(stream)


def _encode(
    pieces: Iterable[str], tokenizer: Tokenizer, dtype: type[np.integer]
) -> Iterator[np.ndarray]:
    """The tokens of each piece, encoded about `CHUNK_CHARS` characters at a time."""
    chunk: list[str] = []
    chars = 0
    for piece in pieces:
        chunk.append(piece)
        chars += len(piece)
        if chars >= CHUNK_CHARS:
            yield from (np.array(ids, dtype) for ids in tokenizer.encode_batch(chunk))
            chunk, chars = [], 0
    yield from (np.array(ids, dtype) for ids in tokenizer.encode_batch(chunk))


def fim_parts(text: str, rate: float, seed: int, name: str) -> tuple[str, ...]:
    """`(text,)`, or for a share `rate` of the names `(prefix, middle, suffix)` of `text`.

    Which documents and where they are cut follows from `seed` and `name` alone, so adding a file
    changes no other. Cuts are uniform over characters, not tokens: an editor's cursor stands
    anywhere, also inside what would have been one token. Parts may be empty.

    Source: DeepSeek-V3 Technical Report §4.1 (PSM at document level, rate 0.1).
    """
    content = f"{seed}:{name}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(content, digest_size=24, person=b"dsv3 fim").digest()
    choice, first, second = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    if choice >= rate * 2**64:
        return (text,)
    start, end = sorted((first % (len(text) + 1), second % (len(text) + 1)))
    return text[:start], text[start:end], text[end:]


def fim_join(
    prefix: Integer[np.ndarray, " prefix"],
    middle: Integer[np.ndarray, " middle"],
    suffix: Integer[np.ndarray, " suffix"],
    tokenizer: Tokenizer,
) -> Integer[np.ndarray, " tokens"]:
    """`begin prefix hole suffix end middle`: the middle comes last, where it can be generated."""
    begin, hole, end = (np.array([index], prefix.dtype) for index in fim_ids(tokenizer))
    return np.concatenate([begin, prefix, hole, suffix, end, middle])


def fim_restore(
    tokens: Integer[np.ndarray, " tokens"], tokenizer: Tokenizer
) -> Integer[np.ndarray, " text_tokens"]:
    """`prefix middle suffix` of one document as `fim_join` made it, eos excluded."""
    marks = fim_ids(tokenizer)
    places = np.flatnonzero(np.isin(tokens, marks))
    if tuple(tokens[places].tolist()) != marks or places[0] != 0:
        begin, hole, end = marks
        raise ValueError(
            f"{len(tokens)} tokens that are no prefix-suffix-middle document, expected"
            f" {begin} prefix {hole} suffix {end} middle"
        )
    _, prefix, suffix, middle = np.split(tokens, places)
    return np.concatenate([prefix[1:], middle[1:], suffix[1:]])


def fim_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """The ids of the begin, hole and end tokens; ValueError if the tokenizer has none."""
    missing, expected = "fill-in-the-middle tokens", f"{FIM_BEGIN} and its like for data.fim_rate"
    return (
        _required(tokenizer.fim_begin_id, missing, expected),
        _required(tokenizer.fim_hole_id, missing, expected),
        _required(tokenizer.fim_end_id, missing, expected),
    )


def _required(index: int | None, missing: str, expected: str) -> int:
    if index is None:
        raise ValueError(f"data.tokenizer has no {missing}, expected {expected}")
    return index


def cut_rows(
    stream: Integer[np.ndarray, " tokens"], seq_len: int
) -> Integer[np.ndarray, "rows row_tokens"]:
    """Every whole row of `seq_len + 1` tokens, a view; up to `seq_len` tokens at the end are left.

    >>> cut_rows(np.arange(8), 3)
    array([[0, 1, 2, 3],
           [3, 4, 5, 6]])
    """
    if len(stream) < seq_len + 1:
        return np.zeros((0, seq_len + 1), stream.dtype)
    return np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[::seq_len]


def document_ids(
    rows: Integer[np.ndarray, "rows row_tokens"], eos_id: int
) -> Int32[np.ndarray, "rows row_tokens"]:
    """The document of each position, counted from 0 in each row; an eos ends its own document.

    >>> document_ids(np.array([[7, 1, 8, 9, 1, 5]]), eos_id=1)
    array([[0, 0, 1, 1, 1, 2]], dtype=int32)
    """
    ends = rows == eos_id
    return np.cumsum(ends, axis=1, dtype=np.int32) - ends.astype(np.int32)
