"""Text in, text out: stop texts against `str.partition`, the pieces against the whole."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.serve.generate import stream
from dsv3_jax.serve.sampler import SamplingParams
from dsv3_jax.serve.text import STREAM_STEPS, continue_text, until_stop
from tests.model.weights import build_transformer, model_config
from tests.oracle import random_weights
from tests.oracle.cases import tiny_config

PIECES = st.lists(st.text("ab", max_size=3), max_size=8)


@given(pieces=PIECES, stop=st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_the_stop_however_it_is_cut(pieces, stop):
    given_out = list(until_stop(iter(pieces), [stop]))
    assert "".join(given_out) == "".join(pieces).partition(stop)[0]
    assert all(given_out)


@given(pieces=PIECES)
def test_the_first_of_several_stops_counts(pieces):
    """Neither contains the other, so the first to begin is the first to end."""
    text = "".join(pieces)
    ends = [text.find(stop) for stop in ("abb", "baa") if stop in text]
    expected = text[: min(ends, default=len(text))]
    assert "".join(until_stop(iter(pieces), ["abb", "baa"])) == expected


@given(pieces=PIECES)
def test_without_stops_the_pieces_pass(pieces):
    assert list(until_stop(iter(pieces), [])) == [piece for piece in pieces if piece]


def test_only_what_may_become_a_stop_is_held_back():
    def pieces():
        yield "one tw"
        reached.append("second piece")
        yield "ice two three"
        reached.append("third piece")
        yield "four"

    reached = []
    texts = until_stop(pieces(), ["two"])
    assert next(texts) == "one "
    assert reached == []
    assert list(texts) == ["twice "]
    assert reached == ["second piece"]  # nothing is asked for after the stop


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the model of the experts returns a token, é漢 too\n"] * 3, 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = tiny_config(num_nextn_predict_layers=0, vocab_size=tokenizer.vocab_size)
    return build_transformer(model_config(config), random_weights(config, seed=0, std=0.5))


def continued(model, tokenizer, stop=()):
    params = SamplingParams(temperature=1.0)
    return list(continue_text(model, tokenizer, "the model", 24, params, stop))


def test_pieces_join_to_the_decoded_tokens(model, tokenizer):
    """Among them bytes that form no character, which come out as the decoder has them."""
    prompts, params = [tokenizer.encode("the model")], SamplingParams(temperature=1.0)
    tokens = [t for (row,) in stream(model, prompts, 24, params, steps=STREAM_STEPS) for t in row]
    pieces = continued(model, tokenizer)
    assert len(tokens) == 24 and len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_a_prompt_begins_with_bos_where_the_tokenizer_says_so(model, tokenizer):
    with_bos = dataclasses.replace(tokenizer, prompt_begins_with_bos=True)
    params = SamplingParams(temperature=1.0)
    prompts = [[tokenizer.bos_id, *tokenizer.encode("the model")]]
    tokens = [t for (row,) in stream(model, prompts, 24, params, steps=STREAM_STEPS) for t in row]
    found = "".join(continue_text(model, with_bos, "the model", 24, params))
    assert found == tokenizer.decode(tokens)
    assert found != "".join(continue_text(model, tokenizer, "the model", 24, params))
    with pytest.raises(ValueError, match=r"^prompt is '', expected text of at least one token$"):
        continue_text(model, with_bos, "", 4, params)


def test_a_stop_text_ends_the_continuation(model, tokenizer):
    text = "".join(continued(model, tokenizer))
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    assert "".join(continued(model, tokenizer, [stop, "never there"])) == text.partition(stop)[0]


def test_errors_come_at_the_call_in_one_line(model, tokenizer):
    params = SamplingParams()
    with pytest.raises(ValueError, match=r"^prompt is '', expected text of at least one token$"):
        continue_text(model, tokenizer, "", 4, params)
    with pytest.raises(ValueError, match=r"^stop is '', expected text of at least one character$"):
        continue_text(model, tokenizer, "a", 4, params, ["x", ""])
