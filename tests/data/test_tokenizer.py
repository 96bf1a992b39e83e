"""Round trips, streaming, determinism, special tokens, and what a damaged file says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from dsv3_jax.data.tokenizer import (
    BOS,
    EOS,
    SPECIAL_TOKENS,
    StreamDecoder,
    cut_text,
    load_tokenizer,
    stream_decode,
    tokenizer_config,
    train_tokenizer,
)

TEXTS = [
    "def f(x):\n    return x + 12345\n",
    "Größe é漢字かな 🙂🙃 naïve\r\n\r\nend",
    "aaa bbb " * 9,
]
code_like = st.text(alphabet="ab_ .,(:)\n\t 12é漢🙂", max_size=60)


@given(text=st.text(max_size=80) | code_like)
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "x"])[0] == ids
    assert max(ids, default=0) < tokenizer.vocab_size


@given(text=st.text(max_size=80) | code_like)
def test_token_bytes_add_up_to_the_text(tokenizer, text):
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))


def test_special_tokens_have_the_first_ids_and_no_bytes(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id) == (3, 4, 5)
    assert tokenizer.token_bytes()[:6].tolist() == [0] * 6
    assert (tokenizer.token_bytes()[6:] > 0).all()
    assert tokenizer.decode([0, *tokenizer.encode("x"), 1]) == "x"
    assert tokenizer.decode([1], skip_special_tokens=False) == EOS


def test_text_that_spells_a_special_token_stays_text(tokenizer, tmp_path):
    text = f"a{EOS}b{BOS}"
    tokenizer.save(tmp_path / "tokenizer.json")
    for each in (tokenizer, load_tokenizer(tmp_path)):
        ids = each.encode(text)
        assert not set(ids) & set(range(6))
        assert each.decode(ids) == text
        assert each.encode_batch([text]) == [ids]


@given(data=st.data())
def test_streamed_pieces_are_the_text_of_all_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(stream_decode(tokenizer, ids)) == tokenizer.decode(ids)


@given(text=st.text(alphabet="aé漢🙂\n ", max_size=30))
def test_streaming_never_gives_half_a_character(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    given_out = ""
    for token in tokenizer.encode(text):
        given_out += stream.step(token)
        assert text.startswith(given_out)
    assert stream.finish() == ""
    assert given_out == text


def test_streaming_waits_for_the_last_byte_and_gives_up_at_the_end(tokenizer):
    ids = tokenizer.encode("😵")  # not in the training text, so several tokens
    assert len(ids) == 3
    stream = StreamDecoder(tokenizer)
    assert [stream.step(token) for token in ids] == ["", "", "😵"]
    assert [stream.step(token) for token in ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.step(tokenizer.encode("x")[0]) == "x"


def test_ids_of_the_model_that_have_no_token_decode_to_nothing(tokenizer):
    x = tokenizer.encode("x")[0]
    assert tokenizer.decode([x, tokenizer.vocab_size + 5, x]) == "xx"
    assert list(stream_decode(tokenizer, [x, tokenizer.vocab_size + 5, x])) == ["x", "x"]


def test_numbers_split_by_three_and_a_line_break_ends_its_token():
    texts = ["12345678 + 12345678):\n    return 12345678):\n    pass\n\n\nx" * 20]
    tokenizer = train_tokenizer(texts, vocab_size=600)
    pieces = [tokenizer.decode([index]) for index in tokenizer.encode(texts[0])]
    assert pieces[:3] == ["123", "456", "78"]
    assert "):\n" in pieces and "   " in pieces and " return" in pieces and "\n\n\n" in pieces
    assert all("\n" not in piece.rstrip("\n") for piece in pieces)


def test_vocabulary_is_filled_but_never_exceeded(tokenizer):
    assert tokenizer.vocab_size == 400
    assert train_tokenizer(["tiny"], vocab_size=400).vocab_size < 280
    with pytest.raises(ValueError, match=r"model\.vocab_size is 100, expected at least 262"):
        train_tokenizer(TEXTS, vocab_size=100)


def test_the_same_texts_give_the_same_file_in_another_process(tmp_path):
    script = (
        "import sys, json; from dsv3_jax.data.tokenizer import train_tokenizer;"
        "train_tokenizer(json.loads(sys.argv[1]), 500).save(sys.argv[2])"
    )
    texts = [text * (i + 1) for i, text in enumerate(TEXTS * 4)]
    train_tokenizer(texts, 500).save(tmp_path / "1.json")
    subprocess.run(
        [sys.executable, "-c", script, json.dumps(texts), str(tmp_path / "2.json")],
        env={**os.environ, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"},
        check=True,
    )
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def test_a_long_text_is_thinned_not_refused(monkeypatch):
    monkeypatch.setattr("dsv3_jax.data.tokenizer.TRAINING_BYTES", 500)
    assert train_tokenizer(["some words of text\n" * 20] * 20, 300).vocab_size > 262


@given(
    text=st.lists(st.sampled_from(["word", " ", "\n", "(x):\n", "    ", "7", "é", ".\r\n"])),
    limit=st.integers(1, 20),
)
def test_cut_pieces_join_to_the_text(text, limit):
    text = "".join(text)
    pieces = cut_text(text, limit)
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


@settings(max_examples=30)
@given(lines=st.lists(st.sampled_from(["def f(x):\n", "    return 1\n", "\n", "x = 'é'\r\n"])))
def test_cut_pieces_encode_like_the_whole(tokenizer, lines):
    text = "".join(f"word{line}" for line in lines)
    pieces = cut_text(text, 60)
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_saving_replaces_the_whole_file_or_nothing(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("dsv3_jax.data.tokenizer.os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            tokenizer.save(path)
    assert path.read_text() == "old"
    tokenizer.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    loaded = load_tokenizer(path, vocab_size=400)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    loaded.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def error_of(path: Path, vocab_size: int | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        load_tokenizer(path, vocab_size)
    message = str(caught.value)
    assert str(path) in message and "expected" in message and "\n" not in message
    return message


def test_damaged_tokenizer_files_name_themselves(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    assert "No such file" in error_of(path)
    tokenizer.save(path)
    assert "ids up to 399, expected at most 299" in error_of(path, vocab_size=300)
    text = path.read_text(encoding="utf-8")
    path.write_text(text[:1000], encoding="utf-8")
    assert "JSON breaks at character" in error_of(path)
    path.write_text("[1, 2]")
    assert "found a list" in error_of(path)
    path.write_text('{"model": {"type": "BPE"}}')
    error_of(path)
    path.write_bytes(b'{"\xe9": 1}')
    assert "byte 2 is no UTF-8" in error_of(path)


def other_tokenizer(path: Path) -> None:
    """A byte-level tokenizer with other names, and with truncation and padding switched on."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<go>", "<stop>", "<|fim_prefix|>"])
    backend.add_special_tokens(["<|fim_suffix|>", "<|fim_middle|>", "<pad>"])
    backend.enable_truncation(5)
    backend.enable_padding(length=7)
    backend.save(str(path))


def test_a_foreign_tokenizer_is_taken_as_its_config_says(tmp_path):
    other_tokenizer(tmp_path / "tokenizer.json")
    bare = load_tokenizer(tmp_path)
    assert (bare.bos_id, bare.eos_id, bare.pad_id) == (None, None, 261)
    assert (bare.fim_begin_id, bare.fim_hole_id, bare.fim_end_id) == (258, 259, 260)
    config = {"bos_token": {"content": "<go>"}, "eos_token": "<stop>", "pad_token": None}
    settings_path = tmp_path / "tokenizer_config.json"
    settings_path.write_text(json.dumps(config))
    named = load_tokenizer(tmp_path)
    assert (named.bos_id, named.eos_id, named.pad_id) == (256, 257, 261)
    assert len(named.encode("more than five bytes")) == 20  # neither truncated nor padded
    assert named.token_bytes().tolist() == [1] * 256 + [0] * 6
    settings_path.write_text('{"eos_token": "<absent>"}')
    with pytest.raises(ValueError, match=f"{settings_path}: eos_token is '<absent>'"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_like_tokenizer_counts_and_streams(tmp_path):
    pieces = ["<unk>", "</s>", "▁", "▁he", "llo", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = []
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 1
    assert tokenizer.token_bytes()[:6].tolist() == [0, 0, 1, 3, 3, 1]
    ids = [3, 4, *(5 + byte for byte in "é".encode()), 3, 4]
    assert list(stream_decode(tokenizer, ids)) == [" he", "llo", "é", " he", "llo"]


def test_config_for_transformers(tokenizer):
    config = tokenizer_config(tokenizer, model_max_length=128)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"]) == (BOS, EOS)
    assert config["additional_special_tokens"] == list(SPECIAL_TOKENS[3:])
    assert config["model_max_length"] == 128
    json.dumps(config)


def test_prompt_begins_with_bos_where_the_configuration_says_so(tmp_path):
    trained = train_tokenizer(["some text, and some more text"], 300)
    trained.save(tmp_path / "tokenizer.json")
    plain = load_tokenizer(tmp_path)
    assert plain.encode_prompt("text") == plain.encode("text")
    fields = tokenizer_config(plain, 128) | {"add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields), encoding="utf-8")
    asking = load_tokenizer(tmp_path)
    assert asking.encode_prompt("text") == [asking.bos_id, *plain.encode("text")]
    assert asking.encode("text") == plain.encode("text")
