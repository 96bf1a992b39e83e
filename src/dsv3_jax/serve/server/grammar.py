"""JSON and JSON schemas as constraints on tokens, by llguidance."""

import json
from collections import OrderedDict
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import UInt32
from llguidance import LLMatcher, LLTokenizer

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serve.server.errors import invalid

KEPT = 64
"""Compiled grammars kept, the least recently used of which goes first."""
PARAM = "response_format"
WHITE_SPACE = r"(?:\n[ \t]{0,32}| )?"
"""Between JSON's signs: a model that is unsure would else write nothing but white space."""


class GrammarConstraint:
    """Where an answer is in its grammar: a `Constraint` of the engine.

    The end token is allowed where the grammar may end, and alone where it must. A grammar may turn
    out too complex on the way; then `failure` says so, and only the end token is allowed: what one
    client asks for must not be an error of the engine.
    """

    def __init__(self, matcher: LLMatcher, at_end: UInt32[np.ndarray, " words"]):
        self._matcher = matcher
        self._at_end = at_end
        self.failure: str | None = None

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """One bit for each token, from the lowest of word 0 on."""
        if self.failure is None:
            mask = self._matcher.compute_bitmask()
            self._check()
        if self.failure is not None:
            return self._at_end
        return np.frombuffer(mask, np.uint32)[: len(self._at_end)]  # it may have a word more

    def accept(self, token: int) -> None:
        """Goes on by a token that was allowed."""
        if self.failure is None:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            self.failure = " ".join(self._matcher.get_error().split())[:300]


class Grammars:
    """Compiled grammars over one vocabulary, from any thread."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_tokens: tuple[int, ...]):
        self._tokenizer = None
        self._at_end = np.zeros((-(-vocab_size // 32),), np.uint32)
        for token in stop_tokens:
            self._at_end[token // 32] |= np.uint32(1 << token % 32)
        if stop_tokens:
            self._tokenizer = LLTokenizer(
                tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=list(stop_tokens)
            )
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def constraint(self, schema: dict[str, Any]) -> GrammarConstraint:
        """A constraint at the beginning of JSON that fits `schema`, `{}` for any.

        Raises ApiError, a 400, for a schema that is wrong or has what the library cannot do.
        """
        if self._tokenizer is None:
            raise invalid(f"{PARAM}: this model's tokenizer has no token that ends a text", PARAM)
        key = json.dumps(schema)
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = self._compile(key)
            with self._lock:
                self._compiled[key] = matcher
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        return GrammarConstraint(matcher.deep_copy(), self._at_end)

    def _compile(self, schema: str) -> LLMatcher:
        assert self._tokenizer is not None
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                schema, overrides={"whitespace_pattern": WHITE_SPACE}
            )
        except ValueError as error:
            raise _refused(str(error)) from error
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return matcher


def _refused(reason: str) -> Exception:
    first = " ".join(reason.split())[:300]
    return invalid(f"{PARAM}: this schema cannot be followed: {first}", PARAM)
