"""What is asked of the engine and what comes back: plain values, without JAX."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt32

from dsv3_jax.config.checks import require

MAX_LOGPROBS = 20
"""Alternatives that can be asked for at each token."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep the whole
    vocabulary.

    In this order: `repetition_penalty` (of tokens of prompt and answer), `frequency_penalty` and
    `presence_penalty` (of the answer's), `logit_bias`, temperature, top-k, top-p, min-p, as vLLM
    does. `logprobs` asks for that many alternatives' log-probabilities beside the chosen token's
    (None: not even that), all from the model's own logits.
    Raises ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    seed: int = 0

    def __post_init__(self):
        require(0 <= self.seed < 2**32, "seed", self.seed, "a number from 0 to below 2**32")
        temperature = self.temperature
        holds = 0 <= temperature < math.inf
        require(holds, "temperature", temperature, "a number of at least 0")
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive integer")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(-2 <= value <= 2, name, value, "a number from -2 to 2")
        repetition = self.repetition_penalty
        require(0 < repetition < math.inf, "repetition_penalty", repetition, "a number above 0")
        for token, bias in self.logit_bias:
            require(-100 <= bias <= 100, f"logit_bias of {token}", bias, "a number of -100 to 100")
        if self.logprobs is not None:
            holds = 0 <= self.logprobs <= MAX_LOGPROBS
            require(holds, "logprobs", self.logprobs, f"None or a number from 0 to {MAX_LOGPROBS}")


@runtime_checkable
class Constraint(Protocol):
    """A grammar that an answer has to follow, at one place in it. Belongs to one request."""

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        """One bit for each token of the vocabulary, from the lowest of word 0 on: may it come?"""
        ...

    def accept(self, token: int) -> None:
        """Goes on by a token that was allowed."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A prompt to be continued by at most `max_tokens` tokens.

    It ends at any of `stop_tokens`, which is the last of its tokens then. `stop` texts are not the
    engine's: who decodes the tokens cancels. Raises ValueError for a prompt that is empty.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_tokens: tuple[int, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self):
        require(len(self.prompt) > 0, "prompt", list(self.prompt), "at least one token")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities at one place of an answer."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens there, the most likely first."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step added to a request.

    `finish` is None while it goes on; `stop` after a stop token, `length` at `max_tokens`,
    `cancelled`, or `error`, with what happened in `error`. `cached_tokens` of the prompt were
    found in the cache of prefixes.
    """

    id: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: str | None = None
    error: str | None = None
    cached_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """Gauges of now, and counters since the start."""

    waiting: int = 0
    prefilling: int = 0
    running: int = 0
    slots: int = 0
    pages: int = 0
    pages_used: int = 0
    """Pages of running requests."""
    pages_cached: int = 0
    """Pages that wait for a prompt that begins alike; free when needed."""
    host_pages_cached: int = 0
    cache_bytes_per_token: int = 0
    """Over all layers."""
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    cancelled: int = 0
    compilations: int = 0
    """Of the model's programs; does not grow after warm-up."""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    expert_load: tuple[float, ...] = field(default=())
    """Tokens to each expert, over all layers, since the start."""
    expert_placements: int = 0
    """How often experts were placed anew by their load."""
    device_load_max_over_mean: float = 1.0
    """Tokens to the experts of the fullest device over the mean, where experts are placed."""
    is_speculating: bool = False


@runtime_checkable
class Backend(Protocol):
    """What answers requests: an engine in a thread, or units in other processes.

    `submit` and `cancel` may be called from any thread, and return at once. Outputs come to the
    callback given to `start`, in order for each request, all of one step in one call, from a thread
    of the backend's. Each submitted request gets exactly one output with a `finish`.
    """

    @property
    def max_seq_len(self) -> int:
        """Tokens of a request, prompt and answer, at most."""
        ...

    def start(self, deliver: Callable[[list[Output]], None]) -> None:
        """Returns when requests can be submitted: when all programs are compiled."""
        ...

    def submit(self, request: Request) -> None:
        """Raises ValueError for one that could never be served."""
        ...

    def cancel(self, request_id: str) -> None:
        """Ends a request, whose output says `cancelled`; nothing if it has ended already."""
        ...

    def statistics(self) -> EngineStatistics: ...

    def failure(self) -> str | None:
        """Why nothing can be served any more, None while all is well."""
        ...

    def stop(self) -> None:
        """Ends all requests, and what runs them."""
        ...
