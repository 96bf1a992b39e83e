"""A small tokenizer, trained once, and writers of small source files."""

import inspect
import json
import json.decoder
from pathlib import Path

import pytest

from dsv3_jax.data.tokenizer import Tokenizer, train_tokenizer

WORDS = ["def", "the", "return", "model", "of", "self", "experts", "token", "in", "with", "a"]


def prose(number: int, words: int = 60) -> str:
    """A text that differs for every number, with line breaks, digits and letters beyond ASCII."""
    picked = [WORDS[(number * 7 + i * i + i // 5) % len(WORDS)] for i in range(words)]
    lines = [" ".join(picked[i : i + 8]) for i in range(0, words, 8)]
    return f"# text {number} é漢🙂\n" + ":\n    ".join(lines) + "\n"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [prose(i) for i in range(40)] + [inspect.getsource(json.decoder)]
    return train_tokenizer(texts, vocab_size=400)


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """40 text files in a folder."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02}.txt").write_text(prose(i), encoding="utf-8")
    return folder


@pytest.fixture
def jsonl_file(tmp_path: Path) -> Path:
    """30 lines with the text in `body`."""
    path = tmp_path / "lines.jsonl"
    lines = (json.dumps({"id": i, "body": prose(100 + i)}) for i in range(30))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
