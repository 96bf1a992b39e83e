"""Byte-level BPE: trained on documents, or loaded from any tokenizer.json.

Text is cut before merging as DeepSeek-V3 does it (what llama.cpp calls `deepseek-v3`): numbers by
up to three digits, Han and kana runs, words with the one character before them, punctuation with
the line breaks after it, white space. A line break always ends a token, so a prompt may end in one.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, FIM_BEGIN, FIM_HOLE, FIM_END)  # ids 0 to 5

SPLITS = (
    r"\p{N}{1,3}",
    r"[\u4e00-\u9fa5\u3040-\u30ff]+",
    "|".join(
        (
            r"[!-/:-@\[-`{-~][A-Za-z]+",  # .split _name "word
            r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",  # a word and the space before it
            r" ?[\p{P}\p{S}]+[\r\n]*",  # ): and the end of the line
            r"\s*[\r\n]+",  # empty lines
            r"\s+(?!\S)",  # indentation, all but its last space
            r"\s+",
        )
    ),
)

# How other tokenizers call the tokens we need, if no tokenizer_config.json beside them says so.
ROLE_NAMES = {
    "bos": (BOS, "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"),
    "eos": (EOS, "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[EOS]"),
    "pad": (PAD, "<pad>", "[PAD]", "<|pad|>"),
    "fim_begin": (FIM_BEGIN, "<|fim_prefix|>", "<fim_prefix>"),
    "fim_hole": (FIM_HOLE, "<|fim_suffix|>", "<fim_suffix>"),
    "fim_end": (FIM_END, "<|fim_middle|>", "<fim_middle>"),
}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bytes that are no character
TRAINING_BYTES = 2**26  # a vocabulary needs no more text: 64 MiB, about 20 s on two cores
PIECE_CHARS = 2**16
LINE_START = re.compile(r"\n(?=[A-Za-z])")


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back. An id that the vocabulary lacks is None.

    `vocab_size` is the largest id + 1. Text never turns into special tokens, even where it spells
    their names: who wants one puts its id.
    """

    backend: Backend = field(repr=False)
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fim_begin_id: int | None
    fim_hole_id: int | None
    fim_end_id: int | None
    prompt_begins_with_bos: bool = False
    """`add_bos_token` of tokenizer_config.json: the model was trained on texts that begin so."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to be continued, bos put first if the tokenizer asks for it."""
        bos = [self.bos_id] if self.prompt_begins_with_bos and self.bos_id is not None else []
        return bos + self.encode(text)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that form no character become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> Int32[np.ndarray, " vocab"]:
        """UTF-8 bytes that each id stands for, 0 for special tokens and ids without a token.

        Exact for byte-level vocabularies and for SentencePiece's; a WordPiece token counts
        without the space that decoding puts before it.
        """
        sizes = np.zeros(self.vocab_size, np.int32)
        size_of = _byte_level_size if self._is_byte_level else _piece_size
        for token, index in self.backend.get_vocab(with_added_tokens=False).items():
            sizes[index] = size_of(token)
        for index, added in self.backend.get_added_tokens_decoder().items():
            sizes[index] = 0 if added.special else len(added.content.encode("utf-8"))
        return sizes

    @cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.backend.to_str())["decoder"])

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json; a reader sees the old file or the whole new one, never a part."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            partial.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


class StreamDecoder:
    """Text from ids that come one at a time, never half a character.

    If é is two tokens, steps over the ids of "né" give "n", "" and "é".
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._given: list[int] = []  # the last ids whose text went out: some decoders look back
        self._held: list[int] = []

    def step(self, token: int) -> str:
        """The text that `token` completes, often empty: incomplete bytes wait for the next."""
        self._held.append(token)
        text = self._held_text()
        if text.endswith(REPLACEMENT):
            return ""
        if text:
            self._given, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What is still held; bytes that never became a character come out as U+FFFD."""
        text = self._held_text()
        self._given, self._held = [], []
        return text

    def _held_text(self) -> str:
        before = self._tokenizer.decode(self._given, self._skip)
        return self._tokenizer.decode(self._given + self._held, self._skip)[len(before) :]


def stream_decode(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` in non-empty pieces of complete characters, as the ids arrive."""
    stream = StreamDecoder(tokenizer)
    for token in ids:
        if text := stream.step(token):
            yield text
    if text := stream.finish():
        yield text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the same texts give the same bytes.

    Small texts give fewer. Of more than `TRAINING_BYTES` of text every n-th piece is used.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"model.vocab_size is {vocab_size}, expected at least {smallest} to train a"
            f" tokenizer: 256 bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    backend = Backend(models.BPE())
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = [piece for text in texts for piece in cut_text(text)]
    stride = -(-sum(len(piece.encode("utf-8")) for piece in pieces) // TRAINING_BYTES)
    backend.train_from_iterator(pieces[:: max(stride, 1)], trainer)
    return _wrap(backend, {})


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder that holds one.

    A tokenizer_config.json beside it names the bos, eos and pad tokens; without it the usual
    names are tried. Raises ValueError that names the file when it is missing, cut short or damaged,
    or has ids from `vocab_size` on.
    """
    path = Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    text = _read_json(path)[1]
    try:
        backend = Backend.from_str(text)
    except Exception as error:  # tokenizers raises the bare class
        raise ValueError(f"{path}: {error}, expected a tokenizer.json of `tokenizers`") from error
    settings_path = path.with_name("tokenizer_config.json")
    settings = _read_json(settings_path)[0] if settings_path.is_file() else {}
    tokenizer = replace(
        _wrap(backend, _named_tokens(backend, settings, settings_path)),
        prompt_begins_with_bos=settings.get("add_bos_token") is True,
    )
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: has token ids up to {tokenizer.vocab_size - 1},"
            f" expected at most {vocab_size - 1} (model.vocab_size {vocab_size})"
        )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer, model_max_length: int) -> dict[str, Any]:
    """What tokenizer_config.json holds for `transformers` to load the tokenizer.json beside it."""
    name_of = tokenizer.backend.id_to_token
    named = {
        f"{role}_token": name_of(index)
        for role, index in (
            ("bos", tokenizer.bos_id),
            ("eos", tokenizer.eos_id),
            ("pad", tokenizer.pad_id),
        )
        if index is not None
    }
    fim = (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": tokenizer.prompt_begins_with_bos,
        "add_eos_token": False,
        **named,
        "additional_special_tokens": [name_of(index) for index in fim if index is not None],
    }


def cut_text(text: str, limit: int = PIECE_CHARS) -> list[str]:
    """`text` in pieces of at most `limit` characters that encode like the whole.

    Pieces begin after a line break, before a letter, where `SPLITS` cuts anyway; a text without
    such a place near the limit is cut there, which may cost a token. It keeps one huge document
    from using one core and hundreds of bytes of memory a character.
    """
    pieces = []
    start = 0
    while len(text) - start > limit:
        found = LINE_START.search(text, start + limit // 2, start + limit)
        end = found.end() if found else start + limit
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}, expected a tokenizer.json") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: JSON breaks at character {error.pos} of {len(text)} ({error.msg}),"
            " expected a complete file"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8, expected JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: found a {type(content).__name__}, expected a JSON object")
    return content, text


def _named_tokens(backend: Backend, settings: dict[str, Any], path: Path) -> dict[str, int]:
    """Ids of the bos, eos and pad tokens that a tokenizer_config.json names."""
    named = {}
    for role in ("bos", "eos", "pad"):
        value = settings.get(f"{role}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            continue
        index = backend.token_to_id(name)
        if index is None:
            raise ValueError(
                f"{path}: {role}_token is {name!r}, expected a token of tokenizer.json"
            )
        named[role] = index
    return named


def _wrap(backend: Backend, named: dict[str, int]) -> Tokenizer:
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text that spells a special token stays text
    ids = {
        role: next((i for n in names if (i := backend.token_to_id(n)) is not None), None)
        for role, names in ROLE_NAMES.items()
    }
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    by_role = {f"{role}_id": index for role, index in {**ids, **named}.items()}
    return Tokenizer(backend=backend, vocab_size=vocab_size, **by_role)


def _byte_level_size(token: str) -> int:
    """Byte-level tokens write each byte as one character."""
    return len(token)


def _piece_size(token: str) -> int:
    """SentencePiece writes a space as U+2581 and a lone byte as <0x0A>."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return 1
    return len(token.replace("\u2581", " ").removeprefix("##").encode("utf-8"))
