"""The executor's constants: as many slots as the memory formulas say; wrong slots are found out."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.parallel.pipeline.arrays import BUFFERS, NONE, Peer, lower_schedule
from dsv3_jax.parallel.pipeline.orders import IDLE, Action, Kind, Work
from dsv3_jax.parallel.pipeline.schedule import make_schedule
from dsv3_jax.parallel.pipeline.simulate import simulate_ticks
from tests.parallel.pipeline.cases import NAMES, PAPER, schedule_arguments
from tests.parallel.pipeline.follow import check_all, check_crossings, check_losses


@settings(max_examples=50)
@given(schedule_arguments())
def test_slots_are_as_many_as_values_alive(arguments):
    """`check_arrays` runs them (test_schedule); here: no slot more than needed is counted."""
    schedule = make_schedule(*arguments)
    arrays = lower_schedule(schedule)
    peak = simulate_ticks(schedule, PAPER).peak_activations
    np.testing.assert_array_equal(arrays.residual_slots, peak)
    for counts, slots in (
        (arrays.residual_slots, [arrays.forward_residual_slot]),
        (arrays.weight_slots, [arrays.weight_slot]),
        (arrays.activation_slots, [arrays.activation_slot, *_sources(arrays.receive_activation)]),
        (arrays.gradient_slots, [arrays.gradient_slot, *_sources(arrays.receive_gradient)]),
        (arrays.loss_slots, [arrays.loss_slot]),
        (arrays.loss_slots, [arrays.receive_loss]),
    ):
        used = np.max([table.max(axis=0) for table in slots], axis=0) + 1
        np.testing.assert_array_equal(used, counts)


def _sources(receive: np.ndarray) -> list[np.ndarray]:
    return [receive[..., peer] for peer in Peer]


@settings(max_examples=50)
@given(schedule_arguments())
def test_losses_and_crossings_are_those_of_the_table(arguments):
    schedule = make_schedule(*arguments)
    arrays = lower_schedule(schedule)
    check_losses(schedule, arrays)
    check_crossings(schedule, arrays)


def test_buffers_of_sixteen_stages():
    """Residuals as published; ZB1P queues r + 1 weight gradients on rank r; few messages wait."""
    sizes = {name: lower_schedule(make_schedule(name, 16, 40)) for name in NAMES}
    np.testing.assert_array_equal(sizes["1f1b"].residual_slots, np.arange(16, 0, -1))
    np.testing.assert_array_equal(sizes["zb1p"].residual_slots, np.full(16, 16))
    np.testing.assert_array_equal(sizes["dualpipe"].residual_slots, np.full(16, 17))
    np.testing.assert_array_equal(sizes["dualpipev"].residual_slots, np.full(8, 17))
    np.testing.assert_array_equal(sizes["1f1b"].weight_slots, np.zeros(16))
    np.testing.assert_array_equal(sizes["zb1p"].weight_slots, np.arange(16) + 1)
    depth = np.minimum(np.arange(16), 15 - np.arange(16))
    np.testing.assert_array_equal(sizes["dualpipe"].weight_slots, depth + 1)
    np.testing.assert_array_equal(sizes["dualpipev"].weight_slots, np.arange(8) + 1)
    for arrays in sizes.values():
        assert max(arrays.activation_slots.max(), arrays.gradient_slots.max()) <= 2
    # One loss waits at a time, where the last stage is: the last rank, both ends, the first.
    for name, slots in (
        ("1f1b", [0] * 15 + [1]),
        ("zb1p", [0] * 15 + [1]),
        ("dualpipe", [1] + [0] * 14 + [1]),
        ("dualpipev", [1] + [0] * 7),
    ):
        np.testing.assert_array_equal(sizes[name].loss_slots, slots)


def test_the_first_ticks_of_two_ranks():
    """1F1B of 2 stages, 2 micro-batches: f0 f1 b0 . b1 ., and . f0 b0 f1 b1 shifted by one."""
    arrays = lower_schedule(make_schedule("1f1b", 2, 2))
    f, b, idle = Kind.FORWARD, Kind.BACKWARD, Kind.IDLE
    expected = [[f, idle], [f, f], [idle, b], [b, f], [idle, b], [b, idle]]
    np.testing.assert_array_equal(arrays.kind, expected)
    np.testing.assert_array_equal(
        arrays.forward_micro_batch, [[0, -1], [1, 0], [-1, -1], [-1, 1], [-1, -1], [-1, -1]]
    )
    np.testing.assert_array_equal(arrays.send_activation[:2], [[Peer.NEXT, NONE]] * 2)
    np.testing.assert_array_equal(arrays.send_gradient[2], [NONE, Peer.PREVIOUS])
    np.testing.assert_array_equal(arrays.receive_activation[0, 1], [0, NONE, NONE])
    np.testing.assert_array_equal(arrays.receive_gradient[2, 0], [NONE, 0, NONE])
    np.testing.assert_array_equal(arrays.forward_residual_slot[:2], [[0, NONE], [1, 0]])
    np.testing.assert_array_equal(arrays.stage_of_chunk, [[0], [1]])
    # What arrives in tick 1 takes the slot that the forward of tick 1 has just read.
    assert (arrays.activation_slot[1, 1], arrays.receive_activation[1, 1, Peer.PREVIOUS]) == (0, 0)
    np.testing.assert_array_equal(arrays.enters[:, 0], [0, 1, -1, -1, -1, -1])
    np.testing.assert_array_equal(arrays.leaves[:, 0], [-1, 0, -1, 1, -1, -1])
    np.testing.assert_array_equal(arrays.turns[:, 0], [-1, -1, 0, -1, 1, -1])
    np.testing.assert_array_equal(arrays.returns[:, 0], [-1, -1, -1, 0, -1, 1])
    np.testing.assert_array_equal(arrays.receive_loss[:, 1], [-1, 0, -1, 0, -1, -1])
    np.testing.assert_array_equal(arrays.loss_slot[:, 1], [-1, -1, 0, -1, 0, -1])


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("1f1b", [0], [3]), ("zb1p", [0], [3]), ("dualpipe", [0, 3], [3, 0]), ("dualpipev", [0], [0])],
)
def test_ranks_of_the_ends(name, first, last):
    arrays = lower_schedule(make_schedule(name, 4, 8))
    np.testing.assert_array_equal(arrays.first_rank, first)
    np.testing.assert_array_equal(arrays.last_rank, last)


def test_a_late_weight_backward_turns_and_does_not_return():
    """Its recomputation reads the embeddings again; the gradient of them is out by then."""
    schedule = make_schedule("zb1p", 2, 4)
    arrays = lower_schedule(schedule)
    late = [Kind.BACKWARD_WEIGHT in row for row in arrays.kind[:, 1:].tolist()]
    assert sum(late) == 4 and (arrays.turns[late, 0] != NONE).all()
    for name, times in (("enters", 1), ("leaves", 1), ("turns", 2), ("returns", 1)):
        found = getattr(arrays, name)
        np.testing.assert_array_equal(np.bincount(found[found != NONE]), [times] * 4)


def test_only_the_turn_of_a_v_stays_on_its_rank():
    for name in NAMES:
        arrays = lower_schedule(make_schedule(name, 4, 8))
        for receive in (arrays.receive_activation, arrays.receive_gradient):
            local = (receive[..., Peer.SELF] != NONE).sum(axis=0)
            np.testing.assert_array_equal(local, [0, 8] if name == "dualpipev" else [0] * 4)


@pytest.mark.parametrize(("name", "directions", "chunks"), [("zb1p", 1, 1), ("dualpipe", 2, 2)])
def test_arrays_are_int32_of_the_annotated_shapes(name, directions, chunks):
    schedule = make_schedule(name, 4, 8)
    arrays = lower_schedule(schedule)
    sizes = {"ticks": schedule.ticks, "ranks": 4, "peers": 3}
    sizes |= {"directions": directions, "chunks": chunks}
    for field in fields(arrays):
        value = getattr(arrays, field.name)
        dims = field.type.dim_str.split()
        assert (value.dtype, value.shape) == (np.int32, tuple(sizes[dim] for dim in dims))


HALVES = ((Kind.FORWARD, "forward"), (Kind.BACKWARD, "backward"))
ALSO_UNUSED = ("loss_slot", "receive_loss", "enters", "leaves", "turns", "returns")
SIZES = ("residuals_of_chunk", "weights_of_chunk", *(f"{buffer}_slots" for buffer in BUFFERS))
"""Too large a buffer is no wrong program: `test_slots_are_as_many_as_values_alive` counts."""


@pytest.mark.parametrize("name", NAMES)
def test_every_wrong_entry_is_found(name):
    """Each array with an entry raised by one, a few of those in use and a few of the others."""
    schedule = make_schedule(name, 4, 8)
    arrays = lower_schedule(schedule)
    check_all(schedule, arrays)
    random = np.random.default_rng(0)
    for field in fields(arrays):
        original = getattr(arrays, field.name)
        if field.name in SIZES:
            continue
        used = np.argwhere(original != NONE)
        chosen = list(random.choice(used, min(6, len(used)), replace=False)) if len(used) else []
        if field.name in ALSO_UNUSED:
            chosen += list(random.choice(np.argwhere(original == NONE), 3, replace=False))
        for at in chosen:
            wrong = original.copy()
            wrong[tuple(at)] += 1
            with pytest.raises((AssertionError, ValueError, IndexError)):
                check_all(schedule, replace(arrays, **{field.name: wrong}))


def test_two_swapped_slots_are_found():
    schedule = make_schedule("dualpipe", 4, 8)
    arrays = lower_schedule(schedule)
    wrong = arrays.forward_residual_slot.copy()
    wrong[[0, 1], 0] = wrong[[1, 0], 0]
    with pytest.raises(AssertionError, match="residual slot"):
        check_all(schedule, replace(arrays, forward_residual_slot=wrong))


def test_a_loss_that_is_overwritten_is_found():
    """A second micro-batch leaves before the first one's backward has read."""
    schedule = make_schedule("1f1b", 2, 2)
    f, b = (tuple(Action(k, **{h: Work(m, 1)}) for m in (0, 1)) for k, h in HALVES)
    late = ((schedule.table[0][0], IDLE), (schedule.table[1][0], f[0]), (IDLE, f[1]), (IDLE, b[0]))
    schedule = replace(schedule, table=(*late, (schedule.table[3][0], b[1]), *schedule.table[5:]))
    arrays = lower_schedule(schedule)
    check_all(schedule, arrays)
    np.testing.assert_array_equal(arrays.loss_slots, [0, 2])
    wrong = arrays.receive_loss.copy()
    wrong[2, 1] = wrong[1, 1]
    with pytest.raises(AssertionError, match=r"tick 2, rank 1: .* overwrites loss slot 0"):
        check_losses(schedule, replace(arrays, receive_loss=wrong))


def test_a_buffer_too_small_is_found():
    schedule = make_schedule("1f1b", 4, 8)
    arrays = lower_schedule(schedule)
    with pytest.raises(AssertionError, match=r"writes residual slot 3 of 3"):
        check_all(schedule, replace(arrays, residual_slots=arrays.residual_slots - 1))
    with pytest.raises(AssertionError, match="loss slot 0 of 0"):
        check_all(schedule, replace(arrays, loss_slots=arrays.loss_slots - 1))
