"""Documents of each kind, their names and order, the hold-out split, and every file error."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from dsv3_jax.config import DataSource
from dsv3_jax.data import sources
from dsv3_jax.data.sources import (
    Document,
    expand_paths,
    gzip_bits_per_byte,
    is_held_out,
    open_token_array,
    read_documents,
    split_documents,
)


def read(kind: str, *paths: Path | str, field: str = "text") -> list[Document]:
    source = DataSource(source=kind, paths=tuple(str(path) for path in paths))
    return read_documents(source, field)


def write_parquet(path: Path, column: list, name: str = "text", kind=None) -> Path:
    parquet.write_table(pyarrow.table({name: pyarrow.array(column, kind)}), path)
    return path


def error_of(kind: str, path: Path, field: str = "text") -> str:
    """The one line that reading `path` raises, which names it."""
    with pytest.raises(ValueError) as caught:
        read(kind, path, field=field)
    message = str(caught.value)
    assert str(path) in message and "expected" in message and "\n" not in message
    return message


def test_stdlib_is_the_running_interpreters_source():
    documents = read("python_stdlib")
    names = [document.name for document in documents]
    assert "json/decoder.py" in names and "argparse.py" in names
    assert len(set(names)) == len(names)
    assert names == [document.name for document in read("python_stdlib")]
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"site-packages", "test", "tests", "__pycache__", "encodings"}
    assert sum(len(document.text.encode()) for document in documents) > 8e6
    decoder = next(document for document in documents if document.name == "json/decoder.py")
    assert decoder.text == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_stdlib_without_source_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=f"no .py file under {tmp_path}"):
        read("python_stdlib")


def test_text_files_come_in_the_order_of_the_paths_then_sorted_each_once(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "b/deep/3.txt", "a.txt", "b/skip.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}\r\n", encoding="utf-8", newline="")
    documents = read("text", f"{tmp_path}/b/**/*.txt", f"{tmp_path}/a.txt", f"{tmp_path}/b/1.txt")
    assert [d.name for d in documents] == ["1.txt", "2.txt", "deep/3.txt", "a.txt"]
    assert documents[0].text == "text of b/1.txt\r\n"


def test_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    for root in ("here", "there/deeper"):
        (tmp_path / root / "x").mkdir(parents=True)
        (tmp_path / root / "x" / "1.txt").write_text("one")
    names = [
        [d.name for d in read("text", f"{tmp_path}/{root}/*/*.txt")]
        for root in ("here", "there/deeper")
    ]
    assert names == [["x/1.txt"], ["x/1.txt"]]


def test_a_path_with_magic_characters_that_exists_is_that_file(tmp_path):
    (tmp_path / "[1].txt").write_text("bracket")
    assert [d.text for d in read("text", tmp_path / "[1].txt")] == ["bracket"]


def test_jsonl_lines_are_documents_named_by_line(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"body": "é"}\n\n{"body": ""}\n{"body": "two\\n", "id": 1}', encoding="utf-8")
    documents = read("jsonl", path, field="body")
    assert documents == [Document("some.jsonl:1", "é"), Document("some.jsonl:4", "two\n")]


def test_parquet_rows_are_documents_named_by_row(tmp_path):
    path = write_parquet(tmp_path / "some.parquet", ["zero", "", "zwei é"], "body")
    documents = read("parquet", path, field="body")
    assert documents == [Document("some.parquet:0", "zero"), Document("some.parquet:2", "zwei é")]
    path = write_parquet(tmp_path / "large.parquet", ["x"] * 70000, "text", pyarrow.large_string())
    assert read("parquet", path)[-1].name == "large.parquet:69999"


def test_missing_paths_folders_and_empty_globs(tmp_path):
    assert "no such file" in error_of("text", tmp_path / "absent.txt")
    assert "matches no file" in error_of("jsonl", tmp_path / "*.jsonl")
    assert "is a folder" in error_of("text", tmp_path)


def test_only_empty_documents(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    assert "no text" in error_of("text", path)


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"abc\xe9 def")
    assert "byte 3 is 0xe9" in error_of("text", path)
    path.write_bytes("cut é".encode()[:-1])
    assert "byte 4 is 0xc3" in error_of("text", path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut', "line 2: not JSON (Unterminated string starting at at column 10)"),
        (b'["text"]', "line 2: found a list"),
        (b'{"body": "x", "id": 1}', "line 2: no field 'text', found 'body', 'id'"),
        (b"{}", "line 2: no field 'text', found none"),
        (b'{"text": 3}', "line 2: 'text' is 3"),
        (b'{"text": "\xe9"}', "line 2: byte 10 is 0xe9"),
        (b'{"text": "a\\ud800"}', "line 2: 'text' has half a surrogate pair at character 1"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    assert said in error_of("jsonl", path)


def test_bad_parquet_names_the_field_or_row(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", ["x"], "body")
    assert "no field 'text', found 'body'" in error_of("parquet", path)
    path = write_parquet(tmp_path / "q.parquet", [1, 2])
    assert "field 'text' is int64" in error_of("parquet", path)
    path = write_parquet(tmp_path / "r.parquet", ["x", None])
    assert "row 1: 'text' is null" in error_of("parquet", path)


def test_damaged_parquet(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", [f"row {i}" for i in range(1000)])
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no parquet at all", content[:-8]):
        path.write_bytes(damaged)
        assert "complete Parquet file" in error_of("parquet", path)
    path = tmp_path / "latin.parquet"
    latin = pyarrow.array([b"\xe9\xe9"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": latin}), path)
    assert "is not UTF-8" in error_of("parquet", path)


def save_rows(path: Path, rows) -> Path:
    np.save(path, rows)
    return path


def test_token_arrays_are_mapped_not_read(tmp_path):
    rows = np.arange(12, dtype=np.int32).reshape(3, 4)
    opened = open_token_array(save_rows(tmp_path / "t.npy", rows), seq_len=3, vocab_size=12)
    assert isinstance(opened, np.memmap)
    np.testing.assert_array_equal(opened, rows)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (np.zeros((2, 4), np.int64), "dtype is <i8 (int64), expected int32"),
        (np.zeros((2, 4), np.float32), "dtype is <f4 (float32), expected int32"),
        (np.zeros((2, 4), ">i4"), "dtype is >i4"),
        (np.zeros(4, np.int32), "shape is [4], expected [n, 4]"),
        (np.zeros((2, 5), np.int32), "shape is [2, 5], expected [n, 4]"),
        (np.zeros((0, 4), np.int32), "shape is [0, 4], expected [n, 4]"),
        (np.full((2, 4), -1, np.int32), "row 0, column 0: token -1, expected 0 to 9"),
        (np.array([[0] * 4] * 4100 + [[1, 2, 10, 3]], np.int32), "row 4100, column 2: token 10"),
    ],
)
def test_wrong_token_arrays(tmp_path, rows, said):
    path = save_rows(tmp_path / "t.npy", rows)
    with pytest.raises(ValueError) as caught:
        open_token_array(path, seq_len=3, vocab_size=10)
    assert str(caught.value).startswith(f"{path}: {said}")


def test_damaged_token_arrays(tmp_path):
    path = save_rows(tmp_path / "t.npy", np.zeros((20, 4), np.int32))
    content = path.read_bytes()
    for damaged in (content[:-1], content[:40], b"", b"plain text, longer than a header"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"complete \.npy file") as caught:
            open_token_array(path, seq_len=3, vocab_size=10)
        assert str(path) in str(caught.value)
    archive = tmp_path / "t.npz"
    np.savez(archive, rows=np.zeros((2, 4), np.int32))
    with pytest.raises(ValueError, match=r"t\.npz: is an \.npz archive"):
        open_token_array(archive, seq_len=3, vocab_size=10)


def test_split_is_by_name_and_the_same_everywhere():
    # Written down once: another value here would move documents between training and evaluation.
    held_out = [name for name in ("a", "b", "c", "d", "e", "lzma.py") if is_held_out(name, 0.5)]
    assert held_out == ["a", "c", "e", "lzma.py"]
    documents = [Document(f"{i}.txt", "x") for i in range(10_000)]
    training, kept = split_documents(documents, 0.02)
    assert set(training) | set(kept) == set(documents) and not set(training) & set(kept)
    assert 150 < len(kept) < 250
    assert split_documents(documents, 0.0) == (documents, [])
    more = split_documents(documents, 0.05)[1]
    assert set(kept) < set(more)  # a larger fraction only adds


def test_gzip_bits_per_byte_is_each_document_alone():
    documents = [Document("1", "abc " * 300), Document("2", "é" * 50)]
    contents = [document.text.encode() for document in documents]
    packed = sum(len(gzip.compress(content, 9, mtime=0)) for content in contents)
    assert gzip_bits_per_byte(documents) == 8 * packed / sum(map(len, contents))
    assert gzip_bits_per_byte(documents) < 1
    with pytest.raises(ValueError, match="at least one document"):
        gzip_bits_per_byte([])


def test_expand_paths_understands_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("x")
    assert [file.path for file in expand_paths(["~/*.txt"])] == [tmp_path / "x.txt"]
