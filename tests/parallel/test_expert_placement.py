"""Expert placement: DeepSeek's published example, and what must hold for any load."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

from dsv3_jax.parallel.expert_placement import gpu_loads, pack, place_experts, replicate

# The README of DeepSeek's EPLB: 2 layers of 12 experts in 4 groups, 16 slots on 2 nodes of 4 GPUs.
LOAD = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ],
    float,
)
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_the_published_example():
    placement = place_experts(LOAD, slots=16, groups=4, nodes=2, gpus=8)
    assert placement.expert_of_slot.tolist() == PUBLISHED
    assert placement.replicas.sum(axis=1).tolist() == [16, 16]


@given(
    load=arrays(float, (2, 16), elements=st.floats(0, 1e4, allow_subnormal=False)),
    extra=st.integers(0, 2),
    shape=st.sampled_from([(4, 2, 4), (4, 4, 4), (2, 1, 8), (8, 3, 6), (1, 1, 1)]),
)
def test_every_expert_has_its_replicas_and_groups_stay_on_a_node(load, extra, shape):
    groups, nodes, gpus = shape
    slots = 24 + 24 * extra
    placement = place_experts(load, slots=slots, groups=groups, nodes=nodes, gpus=gpus)
    for layer, row in enumerate(placement.expert_of_slot):
        assert np.array_equal(np.bincount(row, minlength=16), placement.replicas[layer])
        assert placement.replicas[layer].min() >= 1
        if groups % nodes == 0:
            node = np.arange(slots) // (slots // nodes)
            for group in range(groups):
                on = {
                    int(n) for n, e in zip(node, row, strict=True) if e // (16 // groups) == group
                }
                assert len(on) == 1
    slots_of = placement.slots_of()
    for layer in range(2):
        for expert in range(16):
            mine = slots_of[layer, expert]
            mine = mine[mine >= 0]
            assert len(mine) == placement.replicas[layer, expert]
            assert np.all(placement.expert_of_slot[layer, mine] == expert)
    np.testing.assert_allclose(gpu_loads(load, placement, gpus).sum(1), load.sum(1), rtol=1e-9)


def test_replicas_even_out_a_hot_expert():
    load = np.ones((1, 32))
    load[0, 3] = 40.0
    alone = place_experts(load, slots=32, groups=1, nodes=1, gpus=8)
    spread = place_experts(load, slots=40, groups=1, nodes=1, gpus=8)

    def worst(placement):
        loads = gpu_loads(load, placement, 8)
        return loads.max() / loads.mean()

    assert worst(alone) == pytest.approx((40 + 3) / (71 / 8))  # with three experts of load 1
    # Nine replicas on eight GPUs: one has two of them, and three others.
    assert worst(spread) == pytest.approx((2 * 40 / 9 + 3) / (71 / 8))


@given(load=arrays(float, 6, elements=st.floats(0, 100)), bins=st.sampled_from([1, 2, 3, 6]))
def test_packing_fills_bins_equally_and_within_the_greedy_bound(load, bins):
    packed = pack(load, bins)
    assert sorted(i for items in packed for i in items) == list(range(6))
    assert {len(items) for items in packed} == {6 // bins}


@given(load=arrays(float, 5, elements=st.floats(0.1, 100)), slots=st.integers(5, 12))
def test_no_other_replication_has_a_smaller_largest_share(load, slots):
    """The greedy choice is optimal for this: checked against every other division."""
    expert, _ = replicate(load, slots)
    largest = (load / np.bincount(expert)).max()

    def divisions(left, count):
        if count == 1:
            yield (left,)
            return
        for first in range(1, left - count + 2):
            for rest in divisions(left - first, count - 1):
                yield (first, *rest)

    best = min((load / np.array(counts)).max() for counts in divisions(slots, 5))
    assert largest == pytest.approx(best)


def test_errors():
    for changes, message in (
        (dict(slots=8), "slots is 8, expected at least the number of experts, 12"),
        (dict(slots=17), "slots is 17, expected a multiple of the number of GPUs, 8"),
        (dict(nodes=3), "gpus is 8, expected a multiple of the number of nodes, 3"),
        (dict(groups=5), "groups is 5, expected a divisor of the 12 experts"),
    ):
        with pytest.raises(ValueError, match=message):
            place_experts(LOAD, **dict(slots=16, groups=4, nodes=2, gpus=8) | changes)
