"""What `check_arrays` does not follow: the loss buffer, and what crosses the model's two ends.

Works from the table alone, with names in the buffers instead of numbers. Both checks raise
AssertionError for the first wrong entry.
"""

import numpy as np

from dsv3_jax.parallel.pipeline.arrays import NONE, ScheduleArrays
from dsv3_jax.parallel.pipeline.check import check_arrays
from dsv3_jax.parallel.pipeline.orders import Kind, Work
from dsv3_jax.parallel.pipeline.schedule import Schedule


def check_all(schedule: Schedule, arrays: ScheduleArrays) -> None:
    check_arrays(schedule, arrays)
    check_losses(schedule, arrays)
    check_crossings(schedule, arrays)


def check_losses(schedule: Schedule, arrays: ScheduleArrays) -> None:
    """What the last stage puts out waits in a slot of its rank until its backward reads it."""
    last, sizes = schedule.layout.stages - 1, arrays.loss_slots
    slots: dict[tuple[int, int], Work] = {}
    for tick, row in enumerate(schedule.table):
        for rank, action in enumerate(row):
            where, slot = f"tick {tick}, rank {rank}", int(arrays.loss_slot[tick, rank])
            work = action.backward
            if work is None or work.stage < last or action.kind == Kind.BACKWARD_WEIGHT:
                assert slot == NONE, f"{where}: nothing to read from loss slot {slot}"
                continue
            found = slots.pop((rank, slot), None)
            assert found == work, f"{where}: {work} finds {found} in loss slot {slot}"
        for rank, action in enumerate(row):  # when the tick is over
            where, slot = f"tick {tick}, rank {rank}", int(arrays.receive_loss[tick, rank])
            work = action.forward
            if work is None or work.stage < last:
                assert slot == NONE, f"{where}: nothing to write to loss slot {slot}"
                continue
            assert 0 <= slot < sizes[rank], f"{where}: loss slot {slot} of {sizes[rank]}"
            assert (rank, slot) not in slots, f"{where}: {work} overwrites loss slot {slot}"
            slots[rank, slot] = work
    assert not slots, f"never used: {slots}"


def check_crossings(schedule: Schedule, arrays: ScheduleArrays) -> None:
    """Who meets the embedding (`enters`, `returns`) or the head (`leaves`, `turns`), and where."""
    layout = schedule.layout
    both_ways = layout.name == "dualpipe"
    half = layout.micro_batches // 2 if both_ways else layout.micro_batches
    expected = {name: {} for name in ("enters", "leaves", "turns", "returns")}
    for tick, row in enumerate(schedule.table):
        for rank, action in enumerate(row):
            for name in _crossings_of(action, layout.stages - 1):
                work = action.forward if name in ("enters", "leaves") else action.backward
                assert work is not None
                direction = int(work.micro_batch >= half)
                assert (tick, direction) not in expected[name], "two at a time"
                expected[name][tick, direction] = work.micro_batch
                ranks = arrays.first_rank if name in ("enters", "returns") else arrays.last_rank
                assert ranks[direction] == rank, f"{work}: {name} on rank {rank}, not {ranks}"
    for name, entries in expected.items():
        found = getattr(arrays, name)
        assert found.shape == (schedule.ticks, 1 + both_ways), (name, found.shape)
        for at, value in np.ndenumerate(found):
            assert value == entries.get(at, NONE), f"{name} at {at}: {value}, {entries.get(at)}"


def _crossings_of(action, last: int) -> list[str]:
    names = []
    if action.forward is not None:
        names += ["enters"] * (action.forward.stage == 0)
        names += ["leaves"] * (action.forward.stage == last)
    if action.backward is not None:
        names += ["turns"] * (action.backward.stage == last)
        is_late = action.kind == Kind.BACKWARD_WEIGHT
        names += ["returns"] * (action.backward.stage == 0 and not is_late)
    return names
