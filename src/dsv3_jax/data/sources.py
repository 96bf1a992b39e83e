"""Documents from every kind of source, token arrays, and the split into training and held-out.

Everything a file can do wrong raises a ValueError of one line that names the file, the place in
it, what was found there and what was expected.
"""

import glob
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int32, Integer

from dsv3_jax.config import DataSource

# Folders that are no reading matter: other people's packages, tests (some are broken on purpose),
# and the generated tables of encodings, near copies of each other on both sides of the split.
STDLIB_LEFT_OUT = {
    "encodings",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib-dynload",
    "test",
    "tests",
    "idle_test",
}
CHECKED_AT_ONCE = 2**28  # tokens of an array read when it is opened: 1 GiB, under a second


@dataclass(frozen=True)
class Document:
    """A text and its name, which is the same on every machine: the hold-out split hashes it."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and its name relative to the fixed part of the glob that found it."""

    path: Path
    name: str


def read_documents(
    source: DataSource, text_field: str = "text", without: Collection[Path] = ()
) -> list[Document]:
    """The documents of a text source in a fixed order, without the empty ones.

    Files whose resolved path is in `without` are left out.
    python_stdlib and text: one a file, files sorted by path. jsonl: one a line; parquet: one a
    row; both named FILE:NUMBER, lines counted from 1 and rows from 0.
    """
    files = stdlib_files() if source.source == "python_stdlib" else expand_paths(source.paths)
    read = DOCUMENT_READERS[source.source]
    files = [file for file in files if file.path.resolve() not in without]
    documents = [doc for file in files for doc in read(file, text_field) if doc.text]
    if not documents:
        found = ", ".join(source.paths) or source.source
        raise ValueError(f"{found}: no text, expected at least one document that is not empty")
    return documents


def stdlib_files() -> list[SourceFile]:
    """The .py files of the running interpreter's standard library, sorted: 10 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path for path in paths if STDLIB_LEFT_OUT.isdisjoint(path.parts[:-1]))
    if not kept:
        raise ValueError(
            f"data.source 'python_stdlib': no .py file under {root}, expected the standard"
            " library's source (an interpreter that keeps it in a zip has none)"
        )
    return [SourceFile(root / path, path.as_posix()) for path in kept]


def expand_paths(patterns: Iterable[str]) -> list[SourceFile]:
    """The files that paths and globs name: in the order given, sorted inside a glob, each once."""
    files: dict[Path, SourceFile] = {}
    for pattern in patterns:
        for file in _expand(pattern):
            files.setdefault(file.path, file)
    return list(files.values())


def _expand(pattern: str) -> list[SourceFile]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        raise ValueError(f"{pattern}: is a folder, expected a file or a glob like {pattern}/**/*")
    if not glob.has_magic(str(path)):
        raise ValueError(f"{pattern}: no such file, expected a file or a glob")
    fixed = next(i for i, part in enumerate(path.parts) if glob.has_magic(part))
    root = Path(*path.parts[:fixed])
    matches = (Path(match) for match in glob.glob(str(path), recursive=True))
    found = sorted(match for match in matches if match.is_file())
    if not found:
        raise ValueError(f"{pattern}: matches no file, expected a glob that matches at least one")
    return [SourceFile(match, match.relative_to(root).as_posix()) for match in found]


def _read_text(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        content = file.path.read_bytes()
    except OSError as error:
        raise ValueError(f"{file.path}: {error.strerror}, expected a readable file") from error
    yield Document(file.name, _decode(content, f"{file.path}"))


def _decode(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start} is 0x{content[error.start]:02x}, expected UTF-8 text"
        ) from error


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        with file.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    text = _json_text(line, text_field, f"{file.path}: line {number}")
                    yield Document(f"{file.name}:{number}", text)
    except OSError as error:
        raise ValueError(f"{file.path}: {error.strerror}, expected a readable file") from error


def _json_text(line: bytes, text_field: str, where: str) -> str:
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not JSON ({error.msg} at column {error.colno}), expected one object a line"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: found a {type(record).__name__}, expected a JSON object")
    if text_field not in record:
        raise ValueError(_missing_field(where, text_field, record))
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: {text_field!r} is {text!r}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {text_field!r} has half a surrogate pair at character {error.start},"
            " expected text that UTF-8 can hold"
        ) from error
    return text


def _missing_field(where: str, text_field: str, found: Iterable[str]) -> str:
    names = ", ".join(repr(name) for name in found)
    return (
        f"{where}: no field {text_field!r}, found {names or 'none'};"
        " expected data.text_field to name one of them"
    )


def _read_parquet(file: SourceFile, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow  # 0.2 s and 100 MB that no other source needs
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("data.source 'parquet' needs pyarrow: pip install pyarrow") from error
    row = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_parquet_field(table.schema_arrow, text_field, file.path)
            for batch in table.iter_batches(columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    if text is None:
                        raise ValueError(
                            f"{file.path}: row {row}: {text_field!r} is null, expected a string"
                        )
                    yield Document(f"{file.name}:{row}", text)
                    row += 1
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.path}: row {row} or soon after: {text_field!r} is not UTF-8, expected text"
        ) from error
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file.path}: {reason}, expected a complete Parquet file") from error


def _check_parquet_field(schema, text_field: str, path: Path) -> None:
    if text_field not in schema.names:
        raise ValueError(_missing_field(f"{path}", text_field, schema.names))
    kind = str(schema.field(text_field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"{path}: field {text_field!r} is {kind}, expected string")


DOCUMENT_READERS: dict[str, Callable[[SourceFile, str], Iterator[Document]]] = {
    "python_stdlib": _read_text,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
}


def open_token_array(
    path: Path, seq_len: int, vocab_size: int
) -> Int32[np.ndarray, "rows row_tokens"]:
    """The rows of a .npy file, mapped from disk, not read.

    Arrays of up to `CHECKED_AT_ONCE` tokens are searched for ids outside the vocabulary here;
    rows of larger ones are checked when they are used.
    """
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: {reason}, expected a complete .npy file") from error
    if not isinstance(rows, np.ndarray):  # .npz opens as an archive of arrays
        raise ValueError(f"{path}: is an .npz archive, expected a .npy file")
    if rows.dtype != np.dtype("int32"):
        raise ValueError(f"{path}: dtype is {rows.dtype.str} ({rows.dtype}), expected int32")
    if rows.ndim != 2 or rows.shape[1] != seq_len + 1 or len(rows) == 0:
        raise ValueError(
            f"{path}: shape is {list(rows.shape)}, expected [n, {seq_len + 1}]"
            f" with n at least 1 (data.seq_len {seq_len} + 1)"
        )
    if rows.size <= CHECKED_AT_ONCE:
        for start in range(0, len(rows), 4096):
            check_token_ids(rows[start : start + 4096], vocab_size, f"{path}", start)
    return rows


def check_token_ids(
    rows: Integer[np.ndarray, "rows row_tokens"], vocab_size: int, name: str, first_row: int = 0
) -> None:
    """Raises ValueError that names the first row with a token outside [0, vocab_size)."""
    outside = (rows < 0) | (rows >= vocab_size)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise ValueError(
            f"{name}: row {first_row + row}, column {column}: token {rows[row, column]},"
            f" expected 0 to {vocab_size - 1} (model.vocab_size {vocab_size})"
        )


def is_held_out(name: str, eval_fraction: float) -> bool:
    """Whether the document of this name is held out: the same on every machine and run."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < eval_fraction * 2**64


def split_documents(
    documents: Iterable[Document], eval_fraction: float
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, order kept."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document.name, eval_fraction) else training).append(document)
    return training, held_out


def gzip_bits_per_byte(documents: Iterable[Document]) -> float:
    """Bits a byte that `gzip -9` needs, each document compressed alone."""
    packed_bytes = text_bytes = 0
    for document in documents:
        content = document.text.encode("utf-8")
        packed_bytes += len(gzip.compress(content, 9, mtime=0))
        text_bytes += len(content)
    if text_bytes == 0:
        raise ValueError("no text to compress, expected at least one document")
    return 8 * packed_bytes / text_bytes
