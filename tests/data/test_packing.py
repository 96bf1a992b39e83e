"""Each token predicted once, document ids, and fill-in-the-middle that can be undone."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data import packing
from dsv3_jax.data.packing import (
    cut_rows,
    document_ids,
    fim_join,
    fim_parts,
    fim_restore,
    pack_documents,
)
from dsv3_jax.data.sources import Document

texts = st.text(alphabet="ab é漢\n(:", min_size=1, max_size=30)
token_arrays = st.lists(st.integers(6, 300), max_size=20).map(lambda ids: np.array(ids, np.uint16))


def split_at_eos(stream: np.ndarray, eos: int) -> list[np.ndarray]:
    """The tokens of each document of a stream, which ends in an eos."""
    ends = np.flatnonzero(stream == eos)
    assert len(stream) == 0 or ends[-1] == len(stream) - 1
    return [part[:-1] for part in np.split(stream, ends + 1)[:-1]]


@given(length=st.integers(0, 60), seq_len=st.integers(2, 9))
def test_rows_predict_every_token_once(length, seq_len):
    stream = np.arange(length, dtype=np.uint16)
    rows = cut_rows(stream, seq_len)
    assert rows.shape == (max(length - 1, 0) // seq_len, seq_len + 1)
    targets = rows[:, 1:].reshape(-1)
    np.testing.assert_array_equal(targets, np.arange(1, len(rows) * seq_len + 1))
    inputs = rows[:, :-1].reshape(-1)
    np.testing.assert_array_equal(inputs, targets - 1)
    assert length - 1 - len(targets) < seq_len  # less than a row is left over


def test_rows_are_views():
    stream = np.arange(100, dtype=np.uint16)
    assert np.shares_memory(cut_rows(stream, 7), stream)


@given(st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_document_ids_count_the_ends_before_a_position(rows):
    found = document_ids(np.array(rows, np.int32), eos_id=1)
    expected = [[row[:i].count(1) for i in range(len(row))] for row in rows]
    assert found.tolist() == expected
    assert found.dtype == np.int32


@given(st.lists(texts, max_size=8))
def test_a_stream_holds_each_document_and_an_eos(tokenizer, contents):
    documents = [Document(f"{i}", text) for i, text in enumerate(contents)]
    stream = pack_documents(documents, tokenizer)
    assert stream.dtype == np.uint16
    decoded = [tokenizer.decode(ids.tolist()) for ids in split_at_eos(stream, tokenizer.eos_id)]
    assert decoded == contents


def test_grouping_and_cutting_change_nothing(tokenizer, monkeypatch):
    documents = [Document(f"{i}", f"word {i}\nline\n" * (3 * i + 1)) for i in range(12)]
    whole = pack_documents(documents, tokenizer, fim_rate=0.5)
    monkeypatch.setattr(packing, "CHUNK_CHARS", 100)
    np.testing.assert_array_equal(pack_documents(documents, tokenizer, fim_rate=0.5), whole)


def test_large_vocabularies_use_int32(tokenizer):
    large = dataclasses.replace(tokenizer, vocab_size=2**16 + 1)
    assert pack_documents([Document("x", "x")], large).dtype == np.int32


@given(text=texts, name=st.text(max_size=5), seed=st.integers(0, 9))
def test_fim_cuts_lose_nothing(text, name, seed):
    parts = fim_parts(text, 1.0, seed, name)
    assert len(parts) == 3 and "".join(parts) == text
    assert fim_parts(text, 0.0, seed, name) == (text,)
    assert fim_parts(text, 1.0, seed, name) == parts


def test_fim_rate_seed_and_cuts():
    names = [f"{i}.py" for i in range(5000)]
    text = "x" * 100
    cuts = {name: fim_parts(text, 0.1, 3, name) for name in names}
    chosen = [name for name in names if len(cuts[name]) == 3]
    assert 400 < len(chosen) < 600
    assert chosen != [name for name in names if len(fim_parts(text, 0.1, 4, name)) == 3]
    lengths = np.array([[len(part) for part in cuts[name]] for name in chosen])
    assert np.all(np.abs(lengths.mean(axis=0) - 100 / 3) < 5)  # three equal parts on average


@given(prefix=token_arrays, middle=token_arrays, suffix=token_arrays)
def test_fim_join_is_undone_by_restore(tokenizer, prefix, middle, suffix):
    joined = fim_join(prefix, middle, suffix, tokenizer)
    assert joined.tolist() == [3, *prefix, 4, *suffix, 5, *middle]  # prefix, suffix, middle
    restored = fim_restore(joined, tokenizer)
    np.testing.assert_array_equal(restored, np.concatenate([prefix, middle, suffix]))
    assert restored.dtype == np.uint16


@given(st.lists(texts, min_size=1, max_size=6), st.integers(0, 3))
def test_rearranged_documents_keep_their_text(tokenizer, contents, seed):
    documents = [Document(f"{i}", text) for i, text in enumerate(contents)]
    stream = pack_documents(documents, tokenizer, fim_rate=1.0, seed=seed)
    parts = split_at_eos(stream, tokenizer.eos_id)
    restored = [tokenizer.decode(fim_restore(ids, tokenizer).tolist()) for ids in parts]
    assert restored == contents


def test_restore_refuses_what_is_no_fim_document(tokenizer):
    for tokens in ([], [7, 8], [3, 7, 4, 8], [3, 4, 4, 5], [7, 3, 4, 5], [3, 5, 4]):
        with pytest.raises(ValueError, match="no prefix-suffix-middle document"):
            fim_restore(np.array(tokens, np.int32), tokenizer)


def test_missing_special_tokens_are_named(tokenizer):
    documents = [Document("x", "some text")]
    with pytest.raises(ValueError, match="no end-of-sentence token"):
        pack_documents(documents, dataclasses.replace(tokenizer, eos_id=None))
    with pytest.raises(ValueError, match=r"no fill-in-the-middle tokens.*data.fim_rate"):
        pack_documents(documents, dataclasses.replace(tokenizer, fim_hole_id=None), fim_rate=1.0)
