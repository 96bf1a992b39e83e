"""Schedules with real durations: step time, bubbles, memory, the published formulas.

`simulate` lets every rank run ahead: an action starts when its rank is free and its inputs have
come. That is how the papers count. `simulate_ticks` is stricter and describes one scan over the
table, in which neighbours exchange messages after every tick and so wait for each other.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from dsv3_jax.config.checks import require, require_at_least
from dsv3_jax.parallel.pipeline.orders import Action, Kind, Layout
from dsv3_jax.parallel.pipeline.schedule import Event, Schedule, made_events, needed_events


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of each action on one stage."""

    forward: float
    overlapped: float
    """F&B: a forward and a full backward together."""
    backward: float
    """B: the full one. Its input half takes `backward - weight`."""
    weight: float
    """W: the weight half."""
    transfer: float = 0.0
    """From the end of an action to its output's arrival on another rank."""

    def __post_init__(self):
        names = ("forward", "overlapped", "backward", "weight", "transfer")
        require_at_least("durations", self, 0, *names)
        rule = f"less than durations.backward {self.backward}"
        require(self.weight < self.backward, "durations.weight", self.weight, rule)

    @property
    def backward_input(self) -> float:
        return self.backward - self.weight

    def of_kinds(self) -> dict[Kind, float]:
        """Seconds of an action of each kind."""
        return {
            Kind.IDLE: 0.0,
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.BACKWARD_INPUT: self.backward_input,
            Kind.BACKWARD_WEIGHT: self.weight,
            Kind.OVERLAPPED: self.overlapped,
        }


V3_FORWARD = 1.13 / 23
V3_OVERLAPPED = 13.95 / 97
V3_BACKWARD = (1.99 + 0.48) / 23
V3_WEIGHT = 0.48 / 15
V3_DURATIONS = Durations(
    forward=V3_FORWARD, overlapped=V3_OVERLAPPED, backward=V3_BACKWARD, weight=V3_WEIGHT
)
"""DeepSeek-V3 on 2,048 H800, by inference: 0.049, 0.144, 0.107, 0.032 s.

Source: "Insights into DeepSeek-V3" (arXiv 2505.09343) Table 4, the seconds of a step by kind of
action, over rank 0's counts of them in DualPipe with 16 ranks and 120 micro-batches (one a
sequence, 15,360 over 128 ranks a stage): 23 lone forwards, 97 pairs, 23 lone backwards of which 15
are split.
"""


@dataclass(frozen=True)
class Formulas:
    """What the papers say of a schedule."""

    bubble_seconds: float
    activations: int
    """Most micro-batches whose forward a rank holds, each in one stage."""
    parameter_copies: int
    """Stages' parameters that a rank holds."""
    ranks: int


@dataclass(frozen=True)
class Timeline:
    """When action i of a rank runs: from `start[rank][i]` to `end[rank][i]`, seconds."""

    layout: Layout
    actions: tuple[tuple[Action, ...], ...]
    start: tuple[Float64[np.ndarray, " _"], ...]
    end: tuple[Float64[np.ndarray, " _"], ...]

    @property
    def total_seconds(self) -> float:
        """From the first start on any rank to the last end on any."""
        return max(float(end[-1]) for end in self.end)

    @property
    def bubble_seconds(self) -> Float64[np.ndarray, " ranks"]:
        """What of the total each rank stands idle."""
        busy = [float(np.sum(e - s)) for s, e in zip(self.start, self.end, strict=True)]
        return self.total_seconds - np.array(busy)

    @property
    def bubble_share(self) -> float:
        """Idle time of all ranks over their total time."""
        return float(np.mean(self.bubble_seconds)) / self.total_seconds

    @property
    def peak_activations(self) -> Int64[np.ndarray, " ranks"]:
        """Most forwards a rank holds at a time, each until its full or weight backward ends."""
        return np.array([_peak(actions) for actions in self.actions], np.int64)


def formulas(name: str, stages: int, durations: Durations) -> Formulas:
    """The published table; `stages` is its PP. See `released_bubble_seconds` for how exact it is.

    Source: DeepSeek-V3 Technical Report Table 2; README of github.com/deepseek-ai/DualPipe.
    """
    layout = Layout(name, stages, 4 * stages)
    f, b, w = durations.forward, durations.backward, durations.weight
    if layout.chunks == 2:
        bubble, activations = (stages / 2 - 1) * (durations.overlapped + b - 3 * w), stages + 1
    else:
        saved = {"1f1b": 0.0, "zb1p": 2 * w}[name]
        bubble, activations = (stages - 1) * (f + b - saved), stages
    return Formulas(bubble, activations, layout.chunks, layout.ranks)


def released_bubble_seconds(name: str, stages: int, durations: Durations) -> float:
    """The bubble that `simulate` finds, exactly: on the rank where it is largest, `transfer` 0.

    It is the published one, but for DualPipe and DualPipeV min(F, (PP/2 - 1)(B - W - F)) less: in
    the released code the two middle ranks (a V's last) run their first pair one after the other,
    so that their neighbours get its forward earlier; the published formula is met exactly by a
    schedule that overlaps that pair too. At F = W = B - W, as the papers draw it, both are equal.

    Holds for B - W >= F >= W and F&B <= F + B (DeepSeek-V3's durations are so), and enough
    micro-batches: 2 * ranks for both DualPipes, `stages` for zb1p, any for 1f1b. Derived from
    simulations, and checked by tests; no publication states it.
    """
    published = formulas(name, stages, durations).bubble_seconds
    if Layout(name, stages, 4 * stages).chunks == 1:
        return published
    lead = durations.backward_input - durations.forward
    return published - min(durations.forward, (stages / 2 - 1) * lead)


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """The earliest times at which every rank can do its actions in their order."""
    layout, orders, seconds = schedule.layout, schedule.orders, durations.of_kinds()
    position, clock = [0] * layout.ranks, [0.0] * layout.ranks
    ended: dict[Event, tuple[float, int]] = {}
    start = [np.zeros(len(order)) for order in orders]
    end = [np.zeros(len(order)) for order in orders]
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        before = sum(position)
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                action, at = order[position[rank]], position[rank]
                needed = needed_events(layout, action)
                if any(event not in ended for event in needed):
                    break
                for time, origin in (ended[event] for event in needed):
                    arrival = time + durations.transfer * (origin != rank)
                    clock[rank] = max(clock[rank], arrival)
                start[rank][at] = clock[rank]
                clock[rank] += seconds[action.kind]
                end[rank][at] = clock[rank]
                ended.update((event, (clock[rank], rank)) for event in made_events(action))
                position[rank] += 1
        assert sum(position) > before, f"the ranks wait for each other, at actions {position}"
    return Timeline(layout, orders, tuple(start), tuple(end))


def simulate_ticks(schedule: Schedule, durations: Durations) -> Timeline:
    """The times of one scan over the table, which exchanges messages after every tick.

    A rank starts a tick when it and its neighbours have ended the one before, plus `transfer`.
    Ticks of unequal length (a forward beside a backward) therefore cost more than `simulate` says.
    """
    of_kinds = durations.of_kinds()
    seconds = np.array([[of_kinds[action.kind] for action in row] for row in schedule.table])
    start, end = np.zeros_like(seconds), np.zeros_like(seconds)
    for tick in range(schedule.ticks):
        if tick:
            padded = np.pad(end[tick - 1], 1)
            start[tick] = np.maximum(padded[1:-1], np.maximum(padded[:-2], padded[2:]))
            start[tick] += durations.transfer
        end[tick] = start[tick] + seconds[tick]
    busy = np.array([[action.kind != Kind.IDLE for action in row] for row in schedule.table])
    ranks = range(schedule.ranks)
    return Timeline(
        schedule.layout,
        schedule.orders,
        tuple(start[busy[:, rank], rank] for rank in ranks),
        tuple(end[busy[:, rank], rank] for rank in ranks),
    )


def _peak(actions: tuple[Action, ...]) -> int:
    """Forwards held at a time: one more with each forward, one less after its last backward."""
    held = most = 0
    for action in actions:
        held += action.forward is not None
        most = max(most, held)
        held -= any(event == "weight" for event, _ in made_events(action))
    return most
