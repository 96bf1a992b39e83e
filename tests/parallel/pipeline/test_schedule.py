"""The table: every dependency holds, for any size; a wrong table is found out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings

from dsv3_jax.parallel.pipeline.check import check_schedule, check_table
from dsv3_jax.parallel.pipeline.orders import IDLE, Action, Kind, Layout, Work
from dsv3_jax.parallel.pipeline.schedule import make_schedule, place_in_ticks
from tests.parallel.pipeline.cases import NAMES, schedule_arguments


@settings(max_examples=60)
@given(schedule_arguments())
def test_any_schedule_is_correct(arguments):
    schedule = make_schedule(*arguments)
    check_schedule(schedule)
    assert place_in_ticks(schedule.layout, schedule.orders) == schedule.table


@pytest.mark.parametrize("name", NAMES)
def test_sixteen_stages_are_correct(name):
    check_schedule(make_schedule(name, 16, 40))


def test_the_drawn_example():
    """The table in the module's docstring."""
    kinds = {Kind.IDLE: ".", Kind.FORWARD: "f", Kind.BACKWARD: "b"}
    rows = [
        " ".join(
            kinds[a.kind] + "".join(str(w[0]) for w in (a.forward, a.backward) if w) for a in r
        )
        for r in zip(*make_schedule("1f1b", 3, 4).table, strict=True)
    ]
    assert rows == [
        "f0 f1 f2 . . b0 f3 b1 . b2 . b3",
        ". f0 f1 . b0 f2 b1 f3 b2 . b3 .",
        ". . f0 b0 f1 b1 f2 b2 f3 b3 . .",
    ]


def test_ticks_of_1f1b():
    """Two for each micro-batch, and the way there and back."""
    for stages in (1, 2, 5, 8):
        for count in (stages, stages + 3):
            assert make_schedule("1f1b", stages, count).ticks == 2 * (count + stages - 1)


@pytest.mark.parametrize("name", NAMES)
def test_any_two_swapped_neighbours_of_a_rank_are_found(name):
    """Swaps two actions that follow each other in time, where their order matters."""
    schedule = make_schedule(name, 4, 8)
    swaps = 0
    for tick in range(schedule.ticks - 1):
        for rank in range(schedule.ranks):
            first, second = schedule.table[tick][rank], schedule.table[tick + 1][rank]
            if is_chained(first, second):
                swaps += 1
                table = [list(row) for row in schedule.table]
                table[tick][rank], table[tick + 1][rank] = second, first
                with pytest.raises(AssertionError, match=rf"tick {tick}, rank {rank}: .* before"):
                    check_schedule(replace(schedule, table=tuple(map(tuple, table))))
    assert swaps > 0


def is_chained(first: Action, second: Action) -> bool:
    """The second needs the first on the same rank: its forward, or its input gradient."""
    if second.backward is None or first.kind == Kind.IDLE:
        return False
    if second.kind == Kind.BACKWARD_WEIGHT:
        return first.backward == second.backward
    return first.forward == second.backward


def edited(schedule, old, new):
    """The schedule with every action `old` replaced by `new`, which must happen."""
    assert any(old in row for row in schedule.table)
    table = tuple(tuple(new if a == old else a for a in row) for row in schedule.table)
    return replace(schedule, table=table)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (Action(Kind.FORWARD, Work(0, 0)), IDLE, r"FORWARD of .* before the forward of"),
        (Action(Kind.FORWARD, Work(3, 2)), IDLE, r"INPUT of .* before its forward"),
        (
            Action(Kind.BACKWARD_INPUT, None, Work(1, 2)),
            IDLE,
            r"tick \d+, rank 1: BACKWARD_INPUT of .* before the input gradient of",
        ),
        (
            Action(Kind.BACKWARD_INPUT, None, Work(3, 0)),
            IDLE,
            r"BACKWARD_WEIGHT of .* before its input gradient",
        ),
        (Action(Kind.BACKWARD_WEIGHT, None, Work(2, 1)), IDLE, "1 of the weight works are never"),
        (
            Action(Kind.BACKWARD_WEIGHT, None, Work(2, 1)),
            Action(Kind.BACKWARD_WEIGHT, None, Work(1, 1)),
            "for the second time",
        ),
        (
            Action(Kind.FORWARD, Work(2, 1)),
            Action(Kind.FORWARD, Work(1, 1)),
            "FORWARD of .* for the second time",
        ),
        (Action(Kind.FORWARD, Work(2, 1)), Action(Kind.FORWARD, Work(2, 2)), "which is elsewhere"),
        (Action(Kind.FORWARD, Work(2, 1)), Action(Kind.FORWARD, Work(4, 1)), "does not exist"),
        (Action(Kind.FORWARD, Work(2, 1)), Action(Kind.FORWARD), "has the wrong halves"),
    ],
)
def test_wrong_tables_are_named(old, new, message):
    schedule = make_schedule("zb1p", 3, 4)
    check_table(schedule)
    with pytest.raises(AssertionError, match=message):
        check_schedule(edited(schedule, old, new))


def test_a_message_takes_until_the_next_tick():
    """The same orders, everything one rank further in the same tick as what it needs."""
    schedule = make_schedule("1f1b", 2, 1)
    row = (Action(Kind.FORWARD, Work(0, 0)), Action(Kind.FORWARD, Work(0, 1)))
    with pytest.raises(AssertionError, match=r"tick 0, rank 1: FORWARD .* before the forward of"):
        check_table(replace(schedule, table=(row, *schedule.table[2:])))


def test_orders_that_wait_for_each_other_are_refused():
    layout = Layout("1f1b", 1, 1)
    backward_first = (Action(Kind.BACKWARD, None, Work(0, 0)), Action(Kind.FORWARD, Work(0, 0)))
    with pytest.raises(AssertionError, match="tick 0: every rank waits"):
        place_in_ticks(layout, (backward_first,))
