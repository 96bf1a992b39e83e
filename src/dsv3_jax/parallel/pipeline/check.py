"""A schedule followed tick by tick: every dependency of its table, every slot of its arrays.

Shares nothing with what makes them: the table is checked against the rules of a pipeline, the
arrays by running them, with names in the buffers instead of numbers.
"""

import numpy as np

from dsv3_jax.parallel.pipeline.arrays import NONE, Peer, ScheduleArrays, lower_schedule
from dsv3_jax.parallel.pipeline.orders import Action, Kind, Layout, Work
from dsv3_jax.parallel.pipeline.schedule import Schedule

HALVES = {  # (a forward half, a backward half)
    Kind.IDLE: (False, False),
    Kind.FORWARD: (True, False),
    Kind.BACKWARD: (False, True),
    Kind.BACKWARD_INPUT: (False, True),
    Kind.BACKWARD_WEIGHT: (False, True),
    Kind.OVERLAPPED: (True, True),
}


def check_schedule(schedule: Schedule) -> None:
    """Raises AssertionError that names the first violated dependency of the table or slot clash.

    Of every micro-batch and stage: one forward, after that of the stage before; one gradient of
    the input, after its forward and after that of the stage behind; one of the weights, with or
    after it; all on the rank that holds the stage. Messages take until the next tick.
    """
    check_table(schedule)
    check_arrays(schedule, lower_schedule(schedule))


def check_table(schedule: Schedule) -> None:
    """The part of `check_schedule` that needs no slots."""
    layout = schedule.layout
    done: dict[str, dict[Work, int]] = {"forward": {}, "input": {}, "weight": {}}
    for tick, row in enumerate(schedule.table):
        for rank, action in enumerate(row):
            problem = _misplaced(layout, rank, action)
            if problem is None and action.forward is not None:
                problem = _premature_forward(done["forward"], tick, action.forward)
            if problem is None and action.backward is not None:
                problem = _premature_backward(done, layout.stages, tick, action)
            if problem is not None:
                raise AssertionError(f"tick {tick}, rank {rank}: {action.kind.name} {problem}")
    for name, works in done.items():
        missing = layout.stages * layout.micro_batches - len(works)
        if missing:
            raise AssertionError(f"{missing} of the {name} works are never done")


def _misplaced(layout: Layout, rank: int, action: Action) -> str | None:
    """What is wrong with the action by itself."""
    halves = action.forward is not None, action.backward is not None
    if halves != HALVES[action.kind]:
        return "has the wrong halves"
    for work in (action.forward, action.backward):
        if work is None:
            continue
        if not (0 <= work.micro_batch < layout.micro_batches and 0 <= work.stage < layout.stages):
            return f"of {work}, which does not exist"
        if layout.rank_of(work) != rank:
            return f"of {work}, which is elsewhere"
    return None


def _premature_forward(done: dict[Work, int], tick: int, work: Work) -> str | None:
    """What `work` comes before, or None; then it is noted as done."""
    before = Work(work.micro_batch, work.stage - 1)
    if work in done:
        return f"of {work} for the second time"
    if work.stage > 0 and done.get(before, tick) >= tick:
        return f"of {work} before the forward of {before}"
    done[work] = tick
    return None


def _premature_backward(
    done: dict[str, dict[Work, int]], stages: int, tick: int, action: Action
) -> str | None:
    work = action.backward
    assert work is not None
    after = Work(work.micro_batch, work.stage + 1)
    if action.kind == Kind.BACKWARD_WEIGHT:
        if done["input"].get(work, tick) >= tick:
            return f"of {work} before its input gradient"
    else:
        if work in done["input"]:
            return f"of {work} for the second time"
        if done["forward"].get(work, tick) >= tick:
            return f"of {work} before its forward"
        if work.stage < stages - 1 and done["input"].get(after, tick) >= tick:
            return f"of {work} before the input gradient of {after}"
        done["input"][work] = tick
    if action.kind != Kind.BACKWARD_INPUT:
        if work in done["weight"]:
            return f"of {work} for the second time"
        done["weight"][work] = tick
    return None


class _Buffers:
    """Slots (buffer, rank, slot) with the work that each one's content belongs to."""

    def __init__(self, arrays: ScheduleArrays):
        self.sizes = {
            "activation": arrays.activation_slots,
            "gradient": arrays.gradient_slots,
            "residual": arrays.residual_slots,
            "weight": arrays.weight_slots,
        }
        self.content: dict[tuple[str, int, int], Work] = {}
        self.used_up: list[tuple[str, int, int]] = []

    def read(self, where: str, at: tuple[str, int, int], work: Work, *, last: bool = True) -> None:
        """Of `work`, for the last time where so said: the slot is free when the tick is over."""
        found = self.content.get(at)
        if found != work:
            raise AssertionError(f"{where} of {work} finds {found} in {at[0]} slot {at[2]}")
        if last:
            self.used_up.append(at)

    def write(self, where: str, at: tuple[str, int, int], work: Work) -> None:
        buffer, rank, slot = at
        size = int(self.sizes[buffer][rank])
        if not 0 <= slot < size:
            raise AssertionError(f"{where} of {work} writes {buffer} slot {slot} of {size}")
        held = self.content.get(at)
        if held is not None:
            raise AssertionError(f"{where} of {work} overwrites {held} in {buffer} slot {slot}")
        self.content[at] = work

    def end_tick(self) -> None:
        for at in self.used_up:
            del self.content[at]
        self.used_up.clear()


def check_arrays(schedule: Schedule, arrays: ScheduleArrays) -> None:
    """Runs the arrays as the executor would. Raises AssertionError for the first wrong slot."""
    buffers = _Buffers(arrays)
    for tick, row in enumerate(schedule.table):
        for rank, action in enumerate(row):
            where = f"tick {tick}, rank {rank}: {action.kind.name}"
            found = _action_of(arrays, tick, rank)
            if found != action:
                raise AssertionError(f"{where} is {found} in the arrays")
            _run_action(buffers, arrays, schedule, (tick, rank), where)
        buffers.end_tick()
        _deliver(buffers, arrays, schedule, tick)
    if buffers.content:
        raise AssertionError(f"never used: {buffers.content}")


def _action_of(arrays: ScheduleArrays, tick: int, rank: int) -> Action:
    """The action that the arrays describe."""
    works: list[Work | None] = []
    for micro_batches, chunks in (
        (arrays.forward_micro_batch, arrays.forward_chunk),
        (arrays.backward_micro_batch, arrays.backward_chunk),
    ):
        micro_batch, chunk = int(micro_batches[tick, rank]), int(chunks[tick, rank])
        stage = int(arrays.stage_of_chunk[rank, chunk])
        works.append(None if micro_batch == NONE else Work(micro_batch, stage))
    return Action(Kind(int(arrays.kind[tick, rank])), *works)


def _run_action(
    buffers: _Buffers, arrays: ScheduleArrays, schedule: Schedule, at: tuple[int, int], where: str
) -> None:
    """Reads before writes: a slot that is read in a tick may not be written in it."""
    rank, action = at[1], schedule.table[at[0]][at[1]]
    if (work := action.backward) is not None:
        splits = action.kind == Kind.BACKWARD_INPUT
        is_late = action.kind == Kind.BACKWARD_WEIGHT
        residual = ("residual", rank, int(arrays.backward_residual_slot[at]))
        buffers.read(where, residual, work, last=not splits)
        if splits:
            buffers.write(where, ("weight", rank, int(arrays.weight_slot[at])), work)
        if is_late:
            buffers.read(where, ("weight", rank, int(arrays.weight_slot[at])), work)
        if not is_late and work.stage < schedule.layout.stages - 1:
            buffers.read(where, ("gradient", rank, int(arrays.gradient_slot[at])), work)
        elif arrays.gradient_slot[at] != NONE:
            raise AssertionError(f"{where} of {work} needs no gradient")
    if (work := action.forward) is not None:
        if work.stage > 0:
            buffers.read(where, ("activation", rank, int(arrays.activation_slot[at])), work)
        elif arrays.activation_slot[at] != NONE:
            raise AssertionError(f"{where} of {work} needs no activation")
        buffers.write(where, ("residual", rank, int(arrays.forward_residual_slot[at])), work)


def _deliver(buffers: _Buffers, arrays: ScheduleArrays, schedule: Schedule, tick: int) -> None:
    """Every message sent in this tick lands where its work is next, and nothing else does."""
    step = {Peer.PREVIOUS: -1, Peer.NEXT: 1, Peer.SELF: 0}
    mirror = {Peer.PREVIOUS: Peer.NEXT, Peer.NEXT: Peer.PREVIOUS, Peer.SELF: Peer.SELF}
    for payload, sends, receives, onward in (
        ("activation", arrays.send_activation, arrays.receive_activation, 1),
        ("gradient", arrays.send_gradient, arrays.receive_gradient, -1),
    ):
        sent = 0
        for rank, action in enumerate(schedule.table[tick]):
            if sends[tick, rank] == NONE:
                continue
            work = action.forward if onward == 1 else action.backward
            where = f"tick {tick}, rank {rank}: {payload}"
            assert work is not None, where
            peer = Peer(int(sends[tick, rank]))
            target = rank + step[peer]
            if not 0 <= target < schedule.ranks:
                raise AssertionError(f"{where} is sent to rank {target}")
            slot = int(receives[tick, target, mirror[peer]])
            receiver = Work(work.micro_batch, work.stage + onward)
            buffers.write(where, (payload, target, slot), receiver)
            sent += 1
        stored = int(np.sum(receives[tick] != NONE))
        if sent != stored:
            raise AssertionError(f"tick {tick}: {sent} {payload}s are sent, {stored} stored")
