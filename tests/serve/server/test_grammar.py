"""Grammars as masks: whoever follows them at random writes JSON that fits; `json` is the judge."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.serve.server.errors import ApiError
from dsv3_jax.serve.server.grammar import Grammars


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size + 5, (tokenizer.eos_id,))


def allowed(constraint):
    return np.flatnonzero(np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little"))


def write(constraint, tokenizer, seed, longest=400):
    """Tokens chosen at random from those allowed, the end token only where nothing else is."""
    choose, tokens = random.Random(seed), []
    while len(tokens) < longest:
        choices = [token for token in allowed(constraint) if token != tokenizer.eos_id]
        if not choices:
            return tokenizer.decode(tokens)
        tokens.append(int(choose.choice(choices)))
        constraint.accept(tokens[-1])
    return None


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 3, "maximum": 17},
        "kind": {"enum": ["a", "b", None]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_whoever_follows_a_schema_writes_what_fits(grammars, tokenizer, seed):
    text = write(grammars.constraint(SCHEMA), tokenizer, seed)
    value = json.loads(text)
    assert set(value) == {"name", "size", "kind"}
    assert len(value["name"]) <= 8 and 3 <= value["size"] <= 17
    assert value["kind"] in ("a", "b", None)


def test_the_end_token_comes_where_the_grammar_may_end_and_nowhere_else(grammars, tokenizer):
    constraint = grammars.constraint({"type": "integer"})
    assert tokenizer.eos_id not in allowed(constraint)
    for token in tokenizer.encode("12"):
        constraint.accept(token)
    choices = allowed(constraint)
    assert tokenizer.eos_id in choices and len(choices) > 1
    constraint = grammars.constraint({"const": "a"})
    for token in tokenizer.encode('"a"'):
        constraint.accept(token)
    assert allowed(constraint).tolist() == [tokenizer.eos_id]
    constraint.accept(tokenizer.eos_id)
    assert allowed(constraint).tolist() == [tokenizer.eos_id]


@pytest.mark.parametrize("more", [0, 1, 31, 32, 33])
def test_masks_have_a_word_for_every_32_tokens_and_none_beyond(tokenizer, more):
    vocab = 320 + more
    constraint = Grammars(tokenizer, vocab, (tokenizer.eos_id,)).constraint({})
    assert constraint.allowed().shape == (-(-vocab // 32),)
    assert max(allowed(constraint)) < tokenizer.vocab_size <= 320


def test_white_space_does_not_go_on_for_ever(grammars, tokenizer):
    constraint = grammars.constraint({"type": "object"})
    constraint.accept(tokenizer.encode("{")[0])
    space = tokenizer.encode(" ")[0]
    constraint.accept(space)
    assert space not in allowed(constraint)


def test_constraints_of_one_schema_do_not_share_their_place(grammars, tokenizer):
    first, second = grammars.constraint(SCHEMA), grammars.constraint(SCHEMA)
    before = allowed(second).tolist()
    first.accept(tokenizer.encode("{")[0])
    assert allowed(second).tolist() == before != allowed(first).tolist()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "objct"},
        {"not": {"type": "string"}},
        {"$ref": "#/nowhere"},
        {"$ref": "http://example.com/schema"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "integer", "minimum": 3, "maximum": 2},
    ],
)
def test_a_schema_that_cannot_be_followed_is_a_400(grammars, schema):
    with pytest.raises(ApiError) as caught:
        grammars.constraint(schema)
    assert (caught.value.status, caught.value.param) == (400, "response_format")


def test_a_grammar_that_breaks_on_the_way_ends_the_answer_and_not_the_engine(grammars, tokenizer):
    constraint = grammars.constraint(SCHEMA)
    constraint.accept(tokenizer.encode("the")[0])  # stands for a limit of the library's
    assert constraint.failure
    assert allowed(constraint).tolist() == [tokenizer.eos_id]
    constraint.accept(7)
