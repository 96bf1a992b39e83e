"""Which unit gets which request: a state machine of plain values. No JAX, no processes.

    waiting --assign--> prefill --adopted--> decode --> finished
       ^                   |                   |
       +---- again, with the tokens made so far: a unit was lost, a handover was damaged

Each attempt has a name of its own, that units know the request by: what still comes of an attempt
that was given up is told from what is expected. A decode unit is chosen before the prompt is read,
so that no prompt is read that nobody has room for.
"""

import dataclasses
import itertools
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3_jax.serve.disaggregated.messages import ConstraintElsewhere, Kind
from dsv3_jax.serve.request import Output, Request

MOST_ATTEMPTS = 4
"""A request that takes its units with it must not go on to take all of them."""
KNOWN_BEGINNINGS = 4096
"""Kept of each prefill unit."""


@dataclass(eq=False)
class Job:
    """A request that has not ended."""

    request: Request
    made: list[int] = field(default_factory=list)
    """Of its answer, and delivered."""
    attempt: str | None = None
    """None while it waits."""
    attempts: int = 0
    found: int | None = None
    prefill: str | None = None
    """The unit that reads it; None once it is handed over."""
    decode: str | None = None
    shunned: str | None = None
    """The decode unit that a handover to has failed: it may be about to be lost."""

    @property
    def for_units(self) -> Request:
        """The request as units get it."""
        assert self.attempt is not None
        constraint = None if self.request.constraint is None else ConstraintElsewhere()
        return dataclasses.replace(self.request, id=self.attempt, constraint=constraint)


@dataclass(eq=False)
class _Unit:
    kind: Kind
    credits: int
    load: int = 0
    beginnings: OrderedDict[tuple[int, ...], None] = field(default_factory=OrderedDict)
    """Of prompts that it has read, the latest last."""


@dataclass(frozen=True)
class Ended:
    """What ended, and the attempts at units that have to be told."""

    outputs: list[Output] = field(default_factory=list)
    cancels: list[tuple[str, str]] = field(default_factory=list)
    """(unit, attempt)"""


class Dispatcher:
    """Holds every request that has not ended, and the units that are ready."""

    def __init__(self, page_size: int | None):
        """Prompts that share their first page are read by one unit; None: by any."""
        self.finished = self.cancelled = self.retries = 0
        self._page_size = page_size
        self._jobs: dict[str, Job] = {}
        self._by_attempt: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._units: dict[str, _Unit] = {}
        self._numbers = itertools.count()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def units(self, kind: Kind) -> list[str]:
        """Names of those that are ready."""
        return [name for name, unit in self._units.items() if unit.kind == kind]

    def add(self, request: Request) -> None:
        """Takes a request in. ValueError if one of its name is running."""
        if request.id in self._jobs:
            raise ValueError(f"request id is {request.id!r}, expected one that is not running")
        self._jobs[request.id] = job = Job(request)
        self._waiting.append(job)

    def unit_ready(self, name: str, kind: Kind, credits: int) -> None:
        """It takes up to `credits` requests at a time."""
        self._units[name] = _Unit(kind, credits)

    def unit_lost(self, name: str, reason: str) -> Ended:
        """Its requests wait again if another unit of its kind is there, else they end; so do those
        that an earlier loss has made wait."""
        unit = self._units.pop(name, None)
        if unit is None:
            return Ended()
        ended = Ended()
        lost = [job for job in self._jobs.values() if name in (job.prefill, job.decode)]
        if not self.units(unit.kind):
            lost += [job for job in self._waiting if job.attempts]
        for job in reversed(lost):  # each goes before the rest
            self._again(job, unit.kind, f"{name} {reason}", ended)
        return ended

    def assign(self) -> list[Job]:
        """Gives units to those that wait, first come first served; who got them."""
        assigned = []
        while self._waiting:
            job = self._waiting[0]
            beginning = self._beginning(job)
            unread = [n for n, unit in self._units.items() if beginning not in unit.beginnings]
            prefill = self._choose(Kind.PREFILL, unread)
            decode = self._choose(Kind.DECODE, [job.shunned])
            if decode is None or prefill is None:
                break
            self._waiting.popleft()
            self._start(job, prefill, decode)
            assigned.append(job)
        return assigned

    def adopted(self, attempt: str) -> None:
        """The decode unit has it; nothing if that attempt was given up."""
        job = self._by_attempt.get(attempt)
        if job is not None and job.prefill is not None:
            self._free(job.prefill)
            job.prefill = None

    def not_handed_over(self, attempt: str, reason: str) -> Ended:
        """It waits again, to be read once more."""
        ended, job = Ended(), self._by_attempt.get(attempt)
        if job is not None and job.prefill is not None:
            job.shunned = job.decode
            self._again(job, None, f"the handover failed: {reason}", ended)
        return ended

    def job_of(self, attempt: str) -> Job | None:
        """None where that attempt was given up."""
        return self._by_attempt.get(attempt)

    def output(self, output: Output) -> Output | None:
        """What a decode unit made, for whom it was asked; None if that attempt was given up."""
        job = self._by_attempt.get(output.id)
        if job is None:
            return None
        job.made += output.tokens
        if job.found is None:
            job.found = output.cached_tokens
        if output.finish is not None:
            self._remove(job)
            self.finished += 1
        return dataclasses.replace(output, id=job.request.id, cached_tokens=job.found)

    def end(self, request_id: str, finish: str, error: str | None = None) -> Ended:
        """Ends a request; nothing if it has ended already."""
        ended, job = Ended(), self._jobs.get(request_id)
        if job is not None:
            self._end(job, finish, error, ended)
        return ended

    def end_all(self, finish: str, error: str | None = None) -> Ended:
        """Ends every request."""
        ended = Ended()
        for job in list(self._jobs.values()):
            self._end(job, finish, error, ended)
        return ended

    def check(self) -> None:
        """AssertionError unless the loads are those of the requests."""
        for name, unit in self._units.items():
            jobs = [job for job in self._jobs.values() if name in (job.prefill, job.decode)]
            assert unit.load == len(jobs) <= unit.credits
        idle = {id(job) for job in self._jobs.values() if job.attempt is None}
        assert {id(job) for job in self._waiting} == idle

    def _beginning(self, job: Job) -> tuple[int, ...] | None:
        """The first page's tokens, None where the prompt has no more."""
        size, prompt = self._page_size, job.request.prompt
        return None if size is None or len(prompt) <= size else prompt[:size]

    def _choose(self, kind: Kind, worse: Sequence[str | None]) -> str | None:
        """Of the units with room the least loaded, a worse one only where no other has."""
        have_room = [
            (name in worse, unit.load / unit.credits, name)
            for name, unit in self._units.items()
            if unit.kind == kind and unit.load < unit.credits
        ]
        return min(have_room)[-1] if have_room else None

    def _start(self, job: Job, prefill: str, decode: str) -> None:
        job.attempts += 1
        job.attempt = f"{next(self._numbers)}/{job.request.id}"
        job.prefill, job.decode = prefill, decode
        self._by_attempt[job.attempt] = job
        for name in (prefill, decode):
            self._units[name].load += 1
        beginning, beginnings = self._beginning(job), self._units[prefill].beginnings
        if beginning is not None:
            beginnings[beginning] = None
            beginnings.move_to_end(beginning)
        if len(beginnings) > KNOWN_BEGINNINGS:
            beginnings.popitem(last=False)

    def _again(self, job: Job, kind: Kind | None, reason: str, ended: Ended) -> None:
        if kind is not None and not self.units(kind):
            message = f"{reason}, and no other {kind} unit is there: send the request again"
            self._end(job, "error", message, ended)
        elif job.attempts >= MOST_ATTEMPTS:
            message = f"{reason}, at attempt {job.attempts} of {MOST_ATTEMPTS}"
            self._end(job, "error", message, ended)
        else:
            ended.cancels.extend(self._give_up(job))
            self._waiting.appendleft(job)
            self.retries += 1

    def _end(self, job: Job, finish: str, error: str | None, ended: Ended) -> None:
        if job.attempt is None:
            self._waiting.remove(job)
        ended.cancels.extend(self._remove(job))
        if finish == "cancelled":
            self.cancelled += 1
        cached = job.found or 0
        ended.outputs.append(
            Output(id=job.request.id, finish=finish, error=error, cached_tokens=cached)
        )

    def _remove(self, job: Job) -> list[tuple[str, str]]:
        del self._jobs[job.request.id]
        return self._give_up(job)

    def _give_up(self, job: Job) -> list[tuple[str, str]]:
        """Ends an attempt: the units that know of it."""
        if job.attempt is None:
            return []
        del self._by_attempt[job.attempt]
        units = [name for name in (job.prefill, job.decode) if name is not None]
        told = [(name, job.attempt) for name in units if name in self._units]
        for name in units:
            self._free(name)
        job.attempt = job.prefill = job.decode = None
        return told

    def _free(self, name: str) -> None:
        if name in self._units:
            self._units[name].load -= 1
