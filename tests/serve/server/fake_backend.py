"""A `Backend` without a model: answers by a script, in a thread, as the contract says."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dsv3_jax.serve.request import EngineStatistics, Output, Request, TokenLogprobs

Script = Callable[[Request], Sequence[int]]


@dataclass
class Running:
    """A request in a slot: what is still to come of its answer."""

    request: Request
    script: list[int]
    made: int = 0


@dataclass(kw_only=True)
class FakeBackend:
    """Each step gives every running request its next `tokens_per_step` tokens of its script.

    Where the script has ended, its last token comes again. A constraint is followed: of its allowed
    tokens the script's, or else the first from the script's on, comes. Every request's end is
    counted, so that a test sees one that has two or none.
    """

    script: Script
    slots: int = 4
    step_seconds: float = 0.0
    tokens_per_step: int = 2
    max_seq_len: int = 256
    warm_up_seconds: float = 0.0
    cached_tokens: int = 0
    fail_after: int | None = None
    """Tokens after which a request ends in an error."""
    finishes: dict[str, list[str]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    largest_batch: int = 0
    broken: str | None = None

    def __post_init__(self):
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._running: list[Running] = []
        self._cancelled: set[str] = set()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def start(self, deliver: Callable[[Sequence[Output]], None]) -> None:
        time.sleep(self.warm_up_seconds)
        self._deliver = deliver
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        size = len(request.prompt) + request.max_tokens
        if size > self.max_seq_len:
            raise ValueError(f"prompt is {size} tokens long, expected at most {self.max_seq_len}")
        with self._changed:
            self.requests.append(request)
            self.finishes[request.id] = []
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def statistics(self) -> EngineStatistics:
        with self._changed:
            ended = sum(len(each) for each in self.finishes.values())
            return EngineStatistics(
                waiting=len(self._waiting),
                running=len(self._running),
                slots=self.slots,
                pages=64,
                pages_used=len(self._running),
                prompt_tokens=sum(len(request.prompt) for request in self.requests),
                cached_prompt_tokens=self.cached_tokens * len(self.requests),
                drafted_tokens=8,
                accepted_tokens=6,
                expert_load=(1.0, 3.0, 2.0, 2.0),
                finished=ended,
            )

    def failure(self) -> str | None:
        return self.broken

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def open(self) -> int:
        """Requests without an end."""
        with self._changed:
            return len(self._waiting) + len(self._running)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._stopped):
                    self._changed.wait()
                outputs = self._end_cancelled(everything=self._stopped)
                self._take_waiting()
                outputs += [self._step(each) for each in self._running]
                self._running = [
                    each for each in self._running if not self.finishes[each.request.id]
                ]
                stopped = self._stopped
            if outputs:
                self.largest_batch = max(self.largest_batch, len(outputs))
                self._deliver(outputs)
            if stopped:
                return
            if self.step_seconds:
                time.sleep(self.step_seconds)

    def _end_cancelled(self, everything: bool) -> list[Output]:
        requests = [*self._waiting, *(each.request for each in self._running)]
        ended = {each.id for each in requests if everything or each.id in self._cancelled}
        self._waiting = [each for each in self._waiting if each.id not in ended]
        self._running = [each for each in self._running if each.request.id not in ended]
        self._cancelled.clear()
        return [self._output(request_id, finish="cancelled") for request_id in sorted(ended)]

    def _take_waiting(self) -> None:
        free = self.slots - len(self._running)
        for request in self._waiting[:free]:
            self._running.append(Running(request, list(self.script(request))))
        self._waiting = self._waiting[free:]

    def _step(self, running: Running) -> Output:
        request, tokens, finish = running.request, [], None
        while len(tokens) < self.tokens_per_step and finish is None:
            place = min(running.made, len(running.script) - 1)
            token = running.script[place]
            if request.constraint is not None:
                token = _nearest(request.constraint.allowed(), token)
                request.constraint.accept(token)
            tokens.append(token)
            running.made += 1
            if self.fail_after is not None and running.made > self.fail_after:
                return self._output(request.id, finish="error", error="a unit has died")
            if token in request.stop_tokens:
                finish = "stop"
            elif running.made == request.max_tokens:
                finish = "length"
        logprobs = ()
        if (wanted := request.sampling.logprobs) is not None:
            logprobs = tuple(_logprobs(token, wanted) for token in tokens)
        return self._output(
            request.id,
            tokens=tuple(tokens),
            logprobs=logprobs,
            finish=finish,
            cached_tokens=self.cached_tokens,
        )

    def _output(self, request_id: str, finish: str | None, **rest) -> Output:
        if finish is not None:
            self.finishes[request_id].append(finish)
        return Output(id=request_id, finish=finish, **rest)


def _nearest(words: np.ndarray, token: int) -> int:
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    allowed = np.flatnonzero(bits)
    return int(allowed[np.searchsorted(allowed, token) % len(allowed)])


def _logprobs(token: int, wanted: int) -> TokenLogprobs:
    """The token has half of the probability, the next ids ever less."""
    top = tuple((token + i, -0.7 * (i + 1)) for i in range(wanted))
    return TokenLogprobs(token=token, logprob=-0.7, top=top)
