"""Answers in progress, and the bridge from the backend's thread to the event loop."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax.serve.request import Backend, Output
from dsv3_jax.serve.server.admission import Admission, Ticket
from dsv3_jax.serve.server.choices import Choice, Piece
from dsv3_jax.serve.server.errors import ApiError, invalid, named_field
from dsv3_jax.serve.server.grammar import PARAM, GrammarConstraint
from dsv3_jax.serve.server.logs import log
from dsv3_jax.serve.server.plans import Plan, ServedModel

MOST_OUTPUTS = 256
"""That one answer takes in before others have their turn."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens of one body, each prompt counted once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    def as_json(self) -> dict:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Answer:
    """What one body is answered with: its choices, as the backend's outputs arrive."""

    def __init__(self, name: str, plan: Plan, served: ServedModel, ticket: Ticket):
        self.name = name
        self.plan = plan
        self.ticket = ticket
        self.requests = plan.requests(name)
        self.choices = [
            Choice(served.tokenizer, plan.stop, plan.stop_tokens) for _ in self.requests
        ]
        self.has_left = False
        """The client has."""
        self._cached = [0] * len(plan.prompts)
        self._arrived: deque[tuple[int, Output]] = deque()
        self._wake = asyncio.Event()
        self._error: ApiError | None = None

    @property
    def is_complete(self) -> bool:
        """Every choice has its finish."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def usage(self) -> Usage:
        """As far as it has come."""
        return Usage(
            prompt_tokens=self.plan.prompt_tokens,
            completion_tokens=sum(choice.tokens for choice in self.choices),
            cached_tokens=sum(self._cached),
        )

    def put(self, index: int, output: Output) -> None:
        """Takes in what a step made of choice `index`."""
        self._arrived.append((index, output))
        self._wake.set()

    def fail(self, error: ApiError) -> None:
        """Ends the answer for its reader."""
        self._error = error
        self._wake.set()

    def leave(self) -> None:
        """The client does not listen any more."""
        self.has_left = True
        self._wake.set()

    async def pieces(self) -> list[tuple[int, Piece]]:
        """What has come since the last call, of which there is none once the client has left.

        Waits for it. Raises ApiError where the engine failed or the time was up.
        """
        await self._wake.wait()
        self._wake.clear()
        if self._error is not None:
            raise self._error
        made = []
        for _ in range(min(len(self._arrived), MOST_OUTPUTS)):
            if self.has_left:
                break
            index, output = self._arrived.popleft()
            choice = self.choices[index]
            if choice.finish is not None:  # by a stop text; the engine was a little ahead
                continue
            if output.finish == "error":
                raise ApiError(500, f"The engine failed: {output.error}", code="engine_error")
            if output.finish == "cancelled":
                raise ApiError(503, "The answer was cancelled.", code="cancelled", retry_after=1)
            if index % self.plan.n == 0:
                cached = self._cached[index // self.plan.n]
                self._cached[index // self.plan.n] = max(cached, output.cached_tokens)
            self._check_grammar(index)
            made.append((index, choice.push(output)))
        if self._arrived:
            self._wake.set()
            await asyncio.sleep(0)
        return made

    def _check_grammar(self, index: int) -> None:
        constraint = self.requests[index].constraint
        if isinstance(constraint, GrammarConstraint) and constraint.failure is not None:
            raise invalid(f"{PARAM}: {constraint.failure}", PARAM)


class Bridge:
    """Requests to the backend, outputs to their answers. All but `_deliver` runs in the loop."""

    def __init__(self, backend: Backend, admission: Admission):
        self.backend = backend
        self.is_ready = False
        self.start_error: str | None = None
        self._admission = admission
        self._open: dict[str, tuple[Answer, int]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nothing_open = asyncio.Event()
        self._nothing_open.set()

    async def start(self) -> None:
        """Starts the backend; `is_ready` when it has warmed up, `start_error` if it cannot."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self.backend.start, self._deliver)
        except Exception as error:
            self.start_error = f"{type(error).__name__}: {error}"
            log("start_failed", logging.ERROR, error=self.start_error)
            raise
        self.is_ready = True

    def failure(self) -> str | None:
        """Why nothing can be served any more."""
        return self.start_error or self.backend.failure()

    def submit(self, answer: Answer) -> None:
        """Raises ApiError for what the backend refuses."""
        index = 0
        self._nothing_open.clear()
        try:
            for index, request in enumerate(answer.requests):
                self._open[request.id] = (answer, index)
                self.backend.submit(request)
        except ValueError as error:
            for refused in range(index, len(answer.requests)):
                self._open.pop(answer.requests[refused].id, None)
                self._admission.ended(answer.ticket, refused, time.monotonic())
            self.cancel(answer)
            self._note_if_nothing_open()
            if self.failure() is not None:
                raise ApiError(503, str(error), code="engine_failed", retry_after=1) from error
            raise invalid(str(error), named_field(error)) from error

    def cancel(self, answer: Answer) -> None:
        """Cancels what of an answer is still in the engine."""
        for request in answer.requests:
            if request.id in self._open:
                self.backend.cancel(request.id)

    def cancel_choice(self, answer: Answer, index: int) -> None:
        """Cancels one choice, if the engine still has it."""
        if answer.requests[index].id in self._open:
            self.backend.cancel(answer.requests[index].id)

    async def drain(self, seconds: float) -> bool:
        """Waits until nothing is in the engine; after `seconds` cancels. Was it time?"""
        try:
            async with asyncio.timeout(seconds):
                await self._nothing_open.wait()
        except TimeoutError:
            for request_id in list(self._open):
                self.backend.cancel(request_id)
            return False
        return True

    def _deliver(self, outputs: Sequence[Output]) -> None:
        """The backend's callback, in its thread: one wake-up of the loop a step."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._spread, outputs)

    def _spread(self, outputs: Sequence[Output]) -> None:
        now = time.monotonic()
        for output in outputs:
            answer, index = self._open.get(output.id, (None, 0))
            if answer is None:
                continue
            if output.tokens:
                self._admission.made(answer.ticket, index, len(output.tokens), now)
            if output.finish is not None:
                del self._open[output.id]
                self._admission.ended(answer.ticket, index, now)
            answer.put(index, output)
        self._note_if_nothing_open()

    def _note_if_nothing_open(self) -> None:
        if not self._open:
            self._nothing_open.set()
