"""The executor's constants: as many slots as the memory formulas say; wrong slots are found out."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings

from dsv3_jax.parallel.pipeline.arrays import NONE, Peer, lower_schedule
from dsv3_jax.parallel.pipeline.check import check_arrays
from dsv3_jax.parallel.pipeline.orders import Kind
from dsv3_jax.parallel.pipeline.schedule import make_schedule
from dsv3_jax.parallel.pipeline.simulate import simulate_ticks
from tests.parallel.pipeline.cases import NAMES, PAPER, schedule_arguments


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
    ):
        used = np.max([table.max(axis=0) for table in slots], axis=0) + 1
        np.testing.assert_array_equal(used, counts)


def _sources(receive: np.ndarray) -> list[np.ndarray]:
    return [receive[..., peer] for peer in Peer]


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


def test_only_the_turn_of_a_v_stays_on_its_rank():
    for name in NAMES:
        arrays = lower_schedule(make_schedule(name, 4, 8))
        for receive in (arrays.receive_activation, arrays.receive_gradient):
            local = (receive[..., Peer.SELF] != NONE).sum(axis=0)
            np.testing.assert_array_equal(local, [0, 8] if name == "dualpipev" else [0] * 4)


def test_arrays_are_int32_of_the_table_s_shape():
    schedule = make_schedule("dualpipe", 4, 8)
    arrays = lower_schedule(schedule)
    for field in fields(arrays):
        value = getattr(arrays, field.name)
        assert value.dtype == np.int32
        assert value.shape[:2] == (schedule.ticks, 4) or value.shape[0] == 4


@pytest.mark.parametrize("name", ["zb1p", "dualpipe", "dualpipev"])
def test_every_wrong_entry_is_found(name):
    """Each entry of each array raised by one, a few at a time for speed."""
    schedule = make_schedule(name, 4, 8)
    arrays = lower_schedule(schedule)
    check_arrays(schedule, arrays)
    random = np.random.default_rng(0)
    for field in fields(arrays):
        original = getattr(arrays, field.name)
        if original.shape[0] != schedule.ticks or not (original != NONE).any():
            continue
        used = np.argwhere(original != NONE)
        for at in random.choice(used, min(6, len(used)), replace=False):
            wrong = original.copy()
            wrong[tuple(at)] += 1
            with pytest.raises((AssertionError, ValueError, IndexError)):
                check_arrays(schedule, replace(arrays, **{field.name: wrong}))


def test_two_swapped_slots_are_found():
    schedule = make_schedule("dualpipe", 4, 8)
    arrays = lower_schedule(schedule)
    wrong = arrays.forward_residual_slot.copy()
    wrong[[0, 1], 0] = wrong[[1, 0], 0]
    with pytest.raises(AssertionError, match="residual slot"):
        check_arrays(schedule, replace(arrays, forward_residual_slot=wrong))


def test_a_buffer_too_small_is_found():
    schedule = make_schedule("1f1b", 4, 8)
    arrays = lower_schedule(schedule)
    with pytest.raises(AssertionError, match=r"writes residual slot 3 of 3"):
        check_arrays(schedule, replace(arrays, residual_slots=arrays.residual_slots - 1))
