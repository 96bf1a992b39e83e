"""A pipeline schedule as a table [tick][rank] of actions.

`make_schedule("1f1b", 3, 4)`, drawn (f forward, b full backward; the number is the micro-batch):

    tick    0   1   2   3   4   5   6   7   8   9  10  11
    rank 0  f0  f1  f2  .   .   b0  f3  b1  .   b2  .   b3
    rank 1  .   f0  f1  .   b0  f2  b1  f3  b2  .   b3  .
    rank 2  .   .   f0  b0  f1  b1  f2  b2  f3  b3  .   .

A tick is one action on every rank, whatever it costs. What an action makes (an activation for the
next stage, a gradient for the stage before) is there for other actions from the next tick on, on
this rank or, after one message at the end of the tick, on its neighbour; until it is used it waits
in a slot. `dsv3_jax.parallel.pipeline.arrays` numbers the slots,
`check` follows both tick by tick, `simulate` gives them durations.
"""

from dataclasses import dataclass
from functools import cached_property

from dsv3_jax.parallel.pipeline.orders import IDLE, Action, Kind, Layout, Work, make_orders

Event = tuple[str, Work]
"""("forward" | "backward" | "weight", work): done, and what it made is there. "backward" is the
gradient of the input, so that of a BACKWARD or of a BACKWARD_INPUT."""


@dataclass(frozen=True)
class Schedule:
    """Who does what when. Every row of `table` is a tick, with one action for each rank."""

    layout: Layout
    table: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return self.layout.ranks

    @property
    def ticks(self) -> int:
        return len(self.table)

    @cached_property
    def orders(self) -> tuple[tuple[Action, ...], ...]:
        """Every rank's actions, idle ticks left out."""
        columns = zip(*self.table, strict=True)
        return tuple(tuple(a for a in column if a.kind != Kind.IDLE) for column in columns)


def make_schedule(name: str, stages: int, micro_batches: int) -> Schedule:
    """The schedule `name` (1f1b, zb1p, dualpipe, dualpipev) as a table.

    `stages` counts the model's parts, so dualpipev runs on half as many ranks, the others on as
    many. `micro_batches` counts those of both directions. Raises ValueError for what the schedule
    does not have (see `Layout`).

    >>> make_schedule("1f1b", 3, 4).table[3]
    (IDLE, IDLE, Action(BACKWARD, backward=Work(0, 2)))           # abridged
    """
    layout = Layout(name, stages, micro_batches)
    return Schedule(layout, place_in_ticks(layout, make_orders(layout)))


def place_in_ticks(
    layout: Layout, orders: tuple[tuple[Action, ...], ...]
) -> tuple[tuple[Action, ...], ...]:
    """The table with every action in the first tick that its rank's order and its inputs allow."""
    done: set[Event] = set()
    position = [0] * layout.ranks
    table = []
    while any(at < len(order) for at, order in zip(position, orders, strict=True)):
        row = []
        for rank, order in enumerate(orders):
            action = order[position[rank]] if position[rank] < len(order) else IDLE
            if not done.issuperset(needed_events(layout, action)):
                action = IDLE
            row.append(action)
        assert any(action is not IDLE for action in row), f"tick {len(table)}: every rank waits"
        for rank, action in enumerate(row):
            position[rank] += action is not IDLE
            done.update(made_events(action))
        table.append(tuple(row))
    return tuple(table)


def needed_events(layout: Layout, action: Action) -> list[Event]:
    """What must be done before `action` starts."""
    needed: list[Event] = []
    if action.forward is not None and action.forward.stage > 0:
        micro_batch, stage = action.forward
        needed.append(("forward", Work(micro_batch, stage - 1)))
    if action.kind == Kind.BACKWARD_WEIGHT and action.backward is not None:
        needed.append(("backward", action.backward))
    elif action.backward is not None:
        needed.append(("forward", action.backward))
        micro_batch, stage = action.backward
        if stage < layout.stages - 1:
            needed.append(("backward", Work(micro_batch, stage + 1)))
    return needed


def made_events(action: Action) -> list[Event]:
    """What is done when `action` ends."""
    made: list[Event] = []
    if action.forward is not None:
        made.append(("forward", action.forward))
    if action.backward is not None and action.kind != Kind.BACKWARD_WEIGHT:
        made.append(("backward", action.backward))
    if action.backward is not None and action.kind != Kind.BACKWARD_INPUT:
        made.append(("weight", action.backward))
    return made
