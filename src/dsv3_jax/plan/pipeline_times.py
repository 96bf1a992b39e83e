"""When every rank of a pipeline does what, each stage with the time of its own layers. No JAX.

`dsv3_jax.parallel.pipeline.simulate` gives all stages the same durations; here the first stage has
the dense layers, the last the head, loss and MTP module, and a pair takes what its two stages do.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.pipeline.orders import Action, Kind, Layout, make_orders
from dsv3_jax.parallel.pipeline.schedule import Event, Schedule, made_events, needed_events
from dsv3_jax.parallel.pipeline.simulate import Timeline
from dsv3_jax.parallel.pipeline.stages import Unit, split_units
from dsv3_jax.plan.layer_times import ChunkTimes, Woven
from dsv3_jax.plan.links import Number

Seconds = Callable[[Action], Number]


@dataclass(frozen=True, kw_only=True)
class StepParts:
    """Seconds of a step's pipeline; they add up to `total`."""

    forward: Number
    """Of forwards alone ("1F" in "Insights" Table 4)."""
    backward: Number
    """Of backwards alone, full ones and those for inputs ("1B")."""
    weight: Number
    """Of backwards for weights alone ("1W")."""
    overlapped: Number
    """Of pairs ("1F1B")."""
    bubble: Number

    @property
    def total(self) -> Number:
        return self.forward + self.backward + self.weight + self.overlapped + self.bubble


@dataclass(frozen=True)
class Orders:
    """What every rank does, in its order: a schedule without its table of ticks."""

    layout: Layout
    orders: tuple[tuple[Action, ...], ...]


def run_schedule(schedule: Orders | Schedule, seconds: Seconds, transfer: Number = 0.0) -> Timeline:
    """The earliest times at which every rank can do its actions in their order.

    `transfer` passes between an action's end and its output's arrival on another rank.
    """
    layout, orders = schedule.layout, schedule.orders
    position, clock = [0] * layout.ranks, [0.0] * layout.ranks
    ended: dict[Event, tuple[Number, int]] = {}
    start = [np.zeros(len(order)) for order in orders]
    end = [np.zeros(len(order)) for order in orders]
    waiting = sum(map(len, orders))
    while waiting:
        before = waiting
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                action, at = order[position[rank]], position[rank]
                needed = needed_events(layout, action)
                if any(event not in ended for event in needed):
                    break
                made = [ended[event] for event in needed]
                arrivals = [time + transfer * (origin != rank) for time, origin in made]
                start[rank][at] = max([clock[rank], *arrivals])
                clock[rank] = end[rank][at] = start[rank][at] + seconds(action)
                ended.update((event, (clock[rank], rank)) for event in made_events(action))
                position[rank] += 1
                waiting -= 1
        assert waiting < before, f"the ranks wait for each other, at actions {position}"
    return Timeline(layout, orders, tuple(start), tuple(end))


def split_parts(timeline: Timeline, rank: int | None = None) -> StepParts:
    """The timeline's seconds by kind of action, of one rank or the mean over all."""
    ranks = range(timeline.layout.ranks) if rank is None else [rank]
    spent = dict.fromkeys(Kind, 0.0)
    for index in ranks:
        taken = timeline.end[index] - timeline.start[index]
        for action, seconds in zip(timeline.actions[index], taken, strict=True):
            spent[action.kind] += float(seconds) / len(ranks)
    return StepParts(
        forward=spent[Kind.FORWARD],
        backward=spent[Kind.BACKWARD] + spent[Kind.BACKWARD_INPUT],
        weight=spent[Kind.BACKWARD_WEIGHT],
        overlapped=spent[Kind.OVERLAPPED],
        bubble=float(np.mean(timeline.bubble_seconds[list(ranks)])),
    )


def run_stages(config: RunConfig) -> tuple[tuple[Unit, ...], ...]:
    """The units of each stage of a run, in one stage without a pipeline."""
    m = config.model
    stages = config.parallel.stages
    return split_units(m.num_dense_layers, m.num_moe_layers, m.num_nextn_predict_layers, stages)


def run_orders(config: RunConfig) -> Orders:
    """Of a run's schedule; without a pipeline, its parts one after the other on one rank."""
    parallel = config.parallel
    name = parallel.schedule if parallel.pipe > 1 else "1f1b"
    return _orders(name, parallel.stages, config.parts)


@functools.lru_cache(maxsize=64)
def _orders(name: str, stages: int, micro_batches: int) -> Orders:
    layout = Layout(name, stages, micro_batches)
    return Orders(layout, make_orders(layout))


class StageSeconds:
    """Seconds of an action, from the layers of its stages; each kind of pair is woven once."""

    def __init__(self, times: ChunkTimes, stages: Sequence[Sequence[Unit]], *, late_weights: bool):
        self.times = times
        self.stages = stages
        self.late_weights = late_weights
        self.pairs: dict[tuple[int, int], Woven] = {}
        self._forward = [times.forward(units) for units in stages]
        self._backward = [times.backward(units) for units in stages]

    def __call__(self, action: Action) -> Number:
        if action.kind == Kind.OVERLAPPED:
            assert action.forward is not None and action.backward is not None
            return self.pair(action.forward.stage, action.backward.stage).seconds
        if action.forward is not None:
            return self._forward[action.forward.stage]
        assert action.backward is not None
        inputs, weights = self._backward[action.backward.stage]
        split = {Kind.BACKWARD_INPUT: inputs, Kind.BACKWARD_WEIGHT: weights}
        if not self.late_weights:  # weights' gradients at once
            split = {Kind.BACKWARD_INPUT: inputs + weights, Kind.BACKWARD_WEIGHT: 0.0}
        return split.get(action.kind, inputs + weights)

    def pair(self, forward: int, backward: int) -> Woven:
        """A forward of one stage woven with a backward of another."""
        key = forward, backward
        if key not in self.pairs:
            self.pairs[key] = self.times.overlapped(self.stages[forward], self.stages[backward])
        return self.pairs[key]
