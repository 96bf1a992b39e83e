"""What every rank of a pipeline does, in which order: 1F1B, ZB1P, DualPipe, DualPipeV.

A stage is a group of consecutive layers, numbered 0..stages-1 in the model's order. A rank is a
device along the mesh axis `pipe`. A chunk is one of the one or two stages a rank holds:

    schedule    ranks      chunk 0     chunk 1             a micro-batch's way
    1f1b zb1p   stages     stage r     -                   rank 0 ... R-1
    dualpipe    stages     stage r     stage stages-1-r    first half 0 ... R-1, second R-1 ... 0
    dualpipev   stages/2   stage r     stage stages-1-r    0 ... R-1, then R-1 ... 0

DualPipe holds every stage twice (on ranks r and R-1-r): chunk 0 serves the micro-batches of the
first half, which enter at rank 0, chunk 1 those of the second half, which enter at rank R-1.
DualPipeV holds every stage once; at rank R-1 a micro-batch turns from chunk 0 to chunk 1 in place.

Source: DeepSeek-V3 Technical Report §3.2.1; github.com/deepseek-ai/DualPipe for the order of
actions; Zero Bubble Pipeline Parallelism (arXiv 2401.10241), ZB-H1, for ZB1P; PipeDream-Flush
(arXiv 2006.09503) for 1F1B.
"""

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from dsv3_jax.config.checks import require, require_one_of

SCHEDULES = ("1f1b", "zb1p", "dualpipe", "dualpipev")


class Kind(enum.IntEnum):
    """What a rank does in one tick; the numbers are the branches of the executor's switch."""

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    """Gradients of inputs and of weights."""
    BACKWARD_INPUT = 3
    """Gradients of inputs; those of the weights are queued."""
    BACKWARD_WEIGHT = 4
    """The weight gradients that a BACKWARD_INPUT queued."""
    OVERLAPPED = 5
    """A forward of one micro-batch together with a full backward of another."""


class Work(NamedTuple):
    """One micro-batch in one stage."""

    micro_batch: int
    stage: int


@dataclass(frozen=True)
class Action:
    """One tick of one rank. BACKWARD_WEIGHT names its work in `backward`."""

    kind: Kind
    forward: Work | None = None
    backward: Work | None = None


IDLE = Action(Kind.IDLE)


@dataclass(frozen=True)
class Layout:
    """Which rank holds which stages, and where each micro-batch goes (module docstring).

    Raises ValueError for counts that the schedule does not have: DualPipe takes an even number of
    stages, an even number of micro-batches, at least 2 * stages; DualPipeV an even number of stages
    and at least as many micro-batches (DeepSeek's limits, 2 * ranks both); the others any from 1.
    """

    name: str
    stages: int
    micro_batches: int

    def __post_init__(self):
        require_one_of("parallel.schedule", self.name, *SCHEDULES)
        stages, count = self.stages, self.micro_batches
        require(stages >= 1, "stages", stages, "at least 1")
        require(count >= 1, "parallel.micro_batches", count, "at least 1")
        if self.chunks == 1:
            return
        require(stages % 2 == 0, "stages", stages, f"an even number ({self.name})")
        least = 2 * self.ranks
        rule = f"at least {least}, twice the {self.ranks} ranks ({self.name})"
        require(count >= least, "parallel.micro_batches", count, rule)
        if self.is_bidirectional:
            require(count % 2 == 0, "parallel.micro_batches", count, "an even number (dualpipe)")

    @property
    def is_bidirectional(self) -> bool:
        """Micro-batches enter from both ends."""
        return self.name == "dualpipe"

    @property
    def ranks(self) -> int:
        return self.stages // 2 if self.name == "dualpipev" else self.stages

    @property
    def chunks(self) -> int:
        """Stages that a rank holds; with it, copies of parameters relative to one stage."""
        return 2 if self.name in ("dualpipe", "dualpipev") else 1

    def stage_of(self, rank: int, chunk: int) -> int:
        """The stage that is chunk `chunk` of `rank`."""
        return self.stages - 1 - rank if chunk else rank

    def chunk_of(self, work: Work) -> int:
        """Which of its rank's chunks does `work`."""
        if self.is_bidirectional:
            return int(work.micro_batch >= self.micro_batches // 2)
        return int(work.stage >= self.ranks)

    def rank_of(self, work: Work) -> int:
        """The rank that does `work`."""
        return self.stages - 1 - work.stage if self.chunk_of(work) else work.stage


def make_orders(layout: Layout) -> tuple[tuple[Action, ...], ...]:
    """Every rank's actions in their order, idle time left out."""
    make = {
        "1f1b": _order_1f1b,
        "zb1p": _order_zb1p,
        "dualpipe": _order_dualpipe,
        "dualpipev": _order_dualpipev,
    }[layout.name]
    return tuple(tuple(make(layout, rank)) for rank in range(layout.ranks))


@dataclass
class _Order:
    """Collects a rank's actions: counts micro-batches a chunk, and queues weight gradients."""

    layout: Layout
    rank: int
    actions: list[Action] = field(default_factory=list)
    forwards: list[int] = field(default_factory=lambda: [0, 0])
    backwards: list[int] = field(default_factory=lambda: [0, 0])
    queue: deque[Work] = field(default_factory=deque)

    def forward(self, chunk: int = 0) -> None:
        self.actions.append(Action(Kind.FORWARD, forward=self._next(self.forwards, chunk)))

    def backward(self, chunk: int = 0, *, split: bool = False) -> None:
        work = self._next(self.backwards, chunk)
        self.actions.append(Action(Kind.BACKWARD_INPUT if split else Kind.BACKWARD, backward=work))
        if split:
            self.queue.append(work)

    def overlapped(self, forward_chunk: int, backward_chunk: int) -> None:
        forward = self._next(self.forwards, forward_chunk)
        backward = self._next(self.backwards, backward_chunk)
        self.actions.append(Action(Kind.OVERLAPPED, forward, backward))

    def weight(self) -> None:
        self.actions.append(Action(Kind.BACKWARD_WEIGHT, backward=self.queue.popleft()))

    def _next(self, counts: list[int], chunk: int) -> Work:
        micro_batch = counts[chunk]
        counts[chunk] += 1
        if self.layout.is_bidirectional:
            micro_batch += chunk * (self.layout.micro_batches // 2)
        return Work(micro_batch, self.layout.stage_of(self.rank, chunk))


def _order_1f1b(layout: Layout, rank: int) -> list[Action]:
    """stages-1-rank forwards, then one forward and one backward in turn, then the backwards."""
    order = _Order(layout, rank)
    warm_up = min(layout.ranks - 1 - rank, layout.micro_batches)
    for _ in range(warm_up):
        order.forward()
    for index in range(layout.micro_batches):
        if warm_up + index < layout.micro_batches:
            order.forward()
        order.backward()
    return order.actions


def _order_zb1p(layout: Layout, rank: int) -> list[Action]:
    """1F1B with its backward split, the weight half of it `rank` micro-batches late.

    Rank r keeps stages-r micro-batches in flight and r with queued weight gradients: as much
    memory on every rank as 1F1B's first one has. The late halves fill what was the last bubble.
    """
    order = _Order(layout, rank)
    warm_up = min(layout.ranks - 1 - rank, layout.micro_batches)
    for _ in range(warm_up):
        order.forward()
    for index in range(layout.micro_batches):
        if warm_up + index < layout.micro_batches:
            order.forward()
        order.backward(split=True)
        if len(order.queue) > rank:
            order.weight()
    while order.queue:
        order.weight()
    return order.actions


def _order_dualpipe(layout: Layout, rank: int) -> list[Action]:
    """The second half of the ranks does what the first does, with the directions swapped."""
    depth = min(rank, layout.ranks - 1 - rank)
    near = int(rank >= layout.ranks // 2)
    return _bidirectional(layout, rank, depth, layout.ranks // 2, layout.micro_batches // 2, near)


def _order_dualpipev(layout: Layout, rank: int) -> list[Action]:
    """DualPipe's first half of ranks, whose other half is the V's way back."""
    return _bidirectional(layout, rank, rank, layout.ranks, layout.micro_batches, 0)


def _bidirectional(
    layout: Layout, rank: int, depth: int, half: int, per_chunk: int, near: int
) -> list[Action]:
    """DeepSeek's eight phases for the rank at `depth` of `half` ranks from an end to the middle.

    `near` is the chunk whose micro-batches enter at this end (for a V: the way down), the other is
    `far`; each chunk sees `per_chunk` micro-batches. The phases of the published figure from left
    to right: fill (1, 2), first far backwards (3), steady overlap (4), drain (5-8).
    """
    order, far, outer = _Order(layout, rank), 1 - near, half - 1 - depth
    for _ in range(2 * outer):  # 1
        order.forward(near)
    for _ in range(depth + 1):  # 2
        order.forward(near)
        order.forward(far)
    for _ in range(outer):  # 3
        order.backward(far, split=True)
        order.weight()
        order.forward(far)
    for index in range(per_chunk - 2 * half + depth + 1):  # 4
        if index == 0 and outer == 0:  # the middle ranks: apart, the next rank gets F earlier
            order.forward(near)
            order.backward(far)
        else:
            order.overlapped(near, far)
        order.overlapped(far, near)
    for _ in range(outer):  # 5
        order.backward(far)
        order.overlapped(far, near)
    for index in range(2 * (depth + 1)):  # 6: far and near in turn, the second half of them split
        order.backward(near if index % 2 else far, split=index > depth)
    for _ in range(outer):  # 7
        order.weight()
        order.backward(near, split=True)
    while order.queue:  # 8
        order.weight()
    return order.actions
