"""Who may ask now: budgets of keys, the queue's bound, latency targets, draining.

Pure: times come in as numbers, and what does not get in is an ApiError with a true Retry-After,
the seconds after which the same request would have got in if nobody else had come.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3_jax.serve.server.errors import ApiError, invalid
from dsv3_jax.serve.server.keys import Key
from dsv3_jax.serve.server.latency import Line, RollingCount, RollingQuantile

P95 = 0.95
MINUTE = 60.0
LONGEST_WAIT = 60
"""Seconds that a Retry-After says at most where it is a prediction."""


class Bucket:
    """A token bucket that holds a minute's budget; full at first.

    >>> bucket = Bucket(60.0, now=0.0)
    >>> bucket.take(60.0, 0.0), bucket.seconds_until(10.0, 0.0), bucket.seconds_until(10.0, 10.0)
    (None, 10.0, 0.0)
    """

    def __init__(self, per_minute: float, now: float):
        self.per_minute = per_minute
        self._level = per_minute
        self._at = now

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until there is `amount`, which is at most a minute's."""
        self._refill(now)
        return max(amount - self._level, 0.0) * MINUTE / self.per_minute

    def take(self, amount: float, now: float) -> None:
        """Takes it, also where there is less: what comes next waits longer."""
        self._refill(now)
        self._level -= amount

    def give(self, amount: float, now: float) -> None:
        """Gives back what was not used."""
        self._refill(now)
        self._level = min(self._level + amount, self.per_minute)

    def _refill(self, now: float) -> None:
        passed = max(now - self._at, 0.0)
        self._level = min(self._level + passed * self.per_minute / MINUTE, self.per_minute)
        self._at = now


@dataclass(kw_only=True, eq=False)
class Ticket:
    """One admitted body: its choices, and what it has taken from budgets."""

    key: str | None
    prompt_tokens: int
    choices: int
    reserved_tokens: float
    admitted_at: float
    backlog_tokens: int
    """Prompt tokens that stood before its first answer token, its own included."""
    had_slot: bool
    waiting: int = 0
    """Choices without a first token."""
    running: int = 0
    last_at: dict[int, float] = field(default_factory=dict)
    """When each running choice had its last tokens."""
    first_token_at: float | None = None


@dataclass(kw_only=True)
class Limits:
    """What the queue and the latencies may be; None is no limit."""

    slots: int
    max_queue: int
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None


class Admission:
    """Counts what is in flight and says who may come in."""

    def __init__(self, limits: Limits, keys: Sequence[Key], now: float):
        self._limits = limits
        self._requests = {
            key.name: Bucket(key.requests_per_minute, now)
            for key in keys
            if key.requests_per_minute is not None
        }
        self._tokens = {
            key.name: Bucket(key.tokens_per_minute, now)
            for key in keys
            if key.tokens_per_minute is not None
        }
        self.waiting = 0
        self.running = 0
        self.drains_until: float | None = None
        self.ttft = RollingQuantile()
        self.tpot = RollingQuantile()
        self.tokens = RollingCount(10)
        self._backlog_tokens = 0
        self._finished = RollingCount(60)
        self._ttft_line = Line()
        self._tpot_line = Line()

    @property
    def in_flight(self) -> int:
        """Choices that were admitted and have not ended."""
        return self.waiting + self.running

    def check_draining(self, now: float) -> None:
        """Raises ApiError, a 503, once the server is on its way out."""
        if self.drains_until is not None:
            wait = max(math.ceil(self.drains_until - now), 1)
            message = "The server is shutting down."
            raise ApiError(503, message, code="draining", retry_after=wait, reason="draining")

    def admit(
        self, key: str | None, prompt_tokens: int, most_tokens: int, choices: int, now: float
    ) -> Ticket:
        """A ticket for `choices` answers of `most_tokens` together. Raises ApiError."""
        self.check_draining(now)
        if choices > self._limits.slots + self._limits.max_queue:
            most = self._limits.slots + self._limits.max_queue
            raise invalid(f"n: {choices} choices, expected at most {most}", "n")
        self._check_queue(choices, now)
        self._check_targets(prompt_tokens, choices, now)
        reserved = self._charge(key, prompt_tokens, most_tokens, now)
        had_slot = self.in_flight + choices <= self._limits.slots
        self.waiting += choices
        self._backlog_tokens += prompt_tokens
        return Ticket(
            key=key,
            prompt_tokens=prompt_tokens,
            choices=choices,
            reserved_tokens=reserved,
            admitted_at=now,
            backlog_tokens=self._backlog_tokens,
            had_slot=had_slot,
            waiting=choices,
        )

    def made(self, ticket: Ticket, index: int, tokens: int, now: float) -> None:
        """A step gave choice `index` `tokens` tokens."""
        self.tokens.add(tokens, now)
        last = ticket.last_at.get(index)
        ticket.last_at[index] = now
        if last is not None:
            self.tpot.add((now - last) / tokens, now, tokens)
            self._tpot_line.add(self.running, (now - last) / tokens)
            return
        ticket.waiting -= 1
        ticket.running += 1
        self.waiting -= 1
        self.running += 1
        if ticket.first_token_at is None:
            ticket.first_token_at = now
            self._backlog_tokens -= ticket.prompt_tokens
            seconds = now - ticket.admitted_at
            self.ttft.add(seconds, now)
            if ticket.had_slot:
                self._ttft_line.add(ticket.backlog_tokens, seconds)

    def ended(self, ticket: Ticket, index: int, now: float) -> None:
        """Choice `index` has left the engine."""
        if ticket.last_at.pop(index, None) is not None:
            ticket.running -= 1
            self.running -= 1
        else:
            ticket.waiting -= 1
            self.waiting -= 1
        self._finished.add(1, now)
        if ticket.waiting + ticket.running == 0 and ticket.first_token_at is None:
            self._backlog_tokens -= ticket.prompt_tokens

    def settle(self, ticket: Ticket, generated_tokens: int, now: float) -> None:
        """The body is answered: what it had reserved and not used goes back to its key."""
        if ticket.key in self._tokens:
            used = ticket.prompt_tokens + generated_tokens
            self._tokens[ticket.key].give(ticket.reserved_tokens - used, now)

    def _check_queue(self, choices: int, now: float) -> None:
        limits = self._limits
        excess = self.in_flight + choices - limits.slots - limits.max_queue
        if excess > 0:
            raise _too_busy(
                f"The queue is full: {self.in_flight} answers are in work or wait.",
                "queue_full",
                self._seconds_until_finished(excess, now),
            )

    def _check_targets(self, prompt_tokens: int, choices: int, now: float) -> None:
        """With nothing in flight there is nobody to disturb, so that is always admitted."""
        if self.in_flight == 0:
            return
        limits = self._limits
        if limits.ttft_seconds is not None:
            over = self.ttft.seconds_over(P95, limits.ttft_seconds, now)
            expected = self.expected_ttft(prompt_tokens, choices, now)
            if over or expected > limits.ttft_seconds:
                raise _too_busy(
                    "The time to the first token would be over its target.",
                    "slo_ttft",
                    float(over) or expected - limits.ttft_seconds,
                )
        if limits.tpot_seconds is not None:
            over = self.tpot.seconds_over(P95, limits.tpot_seconds, now)
            running = min(self.in_flight + choices, limits.slots)
            expected = self._tpot_line.at(running) or 0.0
            if over or expected > limits.tpot_seconds:
                raise _too_busy(
                    "The time per token would be over its target.",
                    "slo_tpot",
                    float(over) or self._seconds_until_finished(choices, now),
                )

    def expected_ttft(self, prompt_tokens: int, choices: int, now: float) -> float:
        """Seconds to the first token of one more, by what was seen; 0 if nothing was."""
        reading = self._ttft_line.at(self._backlog_tokens + prompt_tokens) or 0.0
        without_slot = self.in_flight + choices - self._limits.slots
        return reading + (
            self._seconds_until_finished(without_slot, now) if without_slot > 0 else 0.0
        )

    def _seconds_until_finished(self, choices: int, now: float) -> float:
        rate = self._finished.per_second(now)
        return choices / rate if rate > 0 else 1.0

    def _charge(self, key: str | None, prompt: int, most: int, now: float) -> float:
        """Takes a request and its tokens from the budgets; what it reserved of the latter."""
        requests, tokens = self._requests.get(key or ""), self._tokens.get(key or "")
        reserved = float(prompt + most)
        if tokens is not None:
            if prompt > tokens.per_minute:
                raise invalid(
                    f"The prompt has {prompt} tokens, expected at most {tokens.per_minute:g},"
                    " this key's budget of a minute.",
                    "prompt",
                    "over_budget",
                )
            reserved = min(reserved, tokens.per_minute)
        for bucket, amount, what in ((requests, 1.0, "requests"), (tokens, reserved, "tokens")):
            wait = bucket.seconds_until(amount, now) if bucket is not None else 0.0
            if bucket is not None and wait > 0:
                message = f"This key may use {bucket.per_minute:g} {what} a minute."
                raise ApiError(
                    429,
                    message,
                    code="rate_limit_exceeded",
                    retry_after=math.ceil(wait),
                    reason=f"{what}_per_minute",
                )
        if requests is not None:
            requests.take(1.0, now)
        if tokens is not None:
            tokens.take(reserved, now)
        return reserved


def _too_busy(message: str, reason: str, seconds: float) -> ApiError:
    wait = min(max(math.ceil(seconds), 1), LONGEST_WAIT)
    return ApiError(429, message, code=reason, retry_after=wait, reason=reason)
