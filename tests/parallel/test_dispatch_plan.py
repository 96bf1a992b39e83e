"""Dispatch plans against brute force: every pair is computed once, and by its own expert."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.dispatch_plan import (
    choose_capacity,
    overflow_block,
    overflow_pairs,
    plan_dispatch,
)
from dsv3_kernels.permute.plan import NOTHING
from tests.parallel.routings import KINDS, draw_routing
from tests.programs import quick_jit

SHAPES = [
    # tokens, top_k, experts, capacity
    (1, 2, 6, 0),
    (7, 3, 5, 2),
    (7, 5, 5, 7),  # every token to every expert, all in slots
    (6, 1, 4, 1),
    (300, 3, 8, 0),  # overflow of several blocks
    (300, 3, 8, 40),
]


@partial(quick_jit, static_argnums=(1, 2))
def plan_and_blocks(experts, num_experts, capacity):
    """The plan, and as many overflow blocks as any routing could need."""
    tokens, top_k = experts.shape
    plan = plan_dispatch(experts, num_experts, capacity)
    most = num_experts + tokens * top_k // overflow_block(tokens)
    blocks = jax.vmap(lambda index: overflow_pairs(plan, index, capacity, overflow_block(tokens)))(
        jnp.arange(most, dtype=experts.dtype)
    )
    return plan, blocks


def check(experts: np.ndarray, num_experts: int, capacity: int) -> None:
    """Asserts everything that a plan promises."""
    tokens, top_k = experts.shape
    plan, blocks = jax.tree.map(
        np.asarray, plan_and_blocks(jnp.asarray(experts, jnp.int32), num_experts, capacity)
    )
    pairs, expert_of = tokens * top_k, experts.ravel()
    load = np.bincount(expert_of, minlength=num_experts)
    np.testing.assert_array_equal(plan.group_size, load)

    assert plan.slot_pair.shape == plan.slot_token.shape == (num_experts, capacity)
    filled = np.minimum(load, capacity)
    is_filled = np.arange(capacity) < filled[:, None]
    np.testing.assert_array_equal(plan.slot_pair != NOTHING, is_filled)
    in_slots = plan.slot_pair[is_filled]
    np.testing.assert_array_equal(expert_of[in_slots], np.repeat(np.arange(num_experts), filled))
    expected = np.where(is_filled, plan.slot_pair // top_k, NOTHING)
    np.testing.assert_array_equal(plan.slot_token, expected)

    # The same from the pair's side.
    pair_slot = plan.pair_slot.ravel()
    assert pair_slot.size == pairs and pair_slot.min() >= NOTHING
    with_slot = np.flatnonzero(pair_slot != NOTHING)
    assert len(with_slot) == len(in_slots)
    np.testing.assert_array_equal(plan.slot_pair.ravel()[pair_slot[with_slot]], with_slot)

    size = overflow_block(tokens)
    needed = -(-np.maximum(load - capacity, 0) // size)
    np.testing.assert_array_equal(plan.block_end, np.cumsum(needed))
    in_blocks = []
    for expert, members, real in zip(*(part[: needed.sum()] for part in blocks), strict=True):
        assert real.any() and len(members) == size
        assert 0 <= members.min() <= members.max() < pairs
        np.testing.assert_array_equal(expert_of[members[real]], expert)
        in_blocks.extend(members[real])
    everything = np.concatenate([in_slots, np.array(in_blocks, int)])
    np.testing.assert_array_equal(np.sort(everything), np.arange(pairs))

    np.testing.assert_array_equal(plan.sorted_pairs, np.argsort(expert_of, kind="stable"))


@settings(max_examples=150)
@given(shape=st.sampled_from(SHAPES), kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32 - 1))
def test_every_pair_is_in_exactly_one_place(shape, kind, seed):
    *sizes, capacity = shape
    check(draw_routing(*sizes, kind, seed), sizes[-1], capacity)


@settings(max_examples=100)
@given(
    experts=st.lists(st.permutations(range(4)).map(lambda p: p[:2]), min_size=5, max_size=5),
    capacity=st.sampled_from([0, 3]),
)
def test_every_routing_of_a_few_tokens(experts, capacity):
    check(np.array(experts), 4, capacity)


def test_the_example_of_the_module():
    """T=4 tokens, K=2, E=3, C=2: expert 0 gets four pairs, 1 three, 2 one."""
    experts = jnp.asarray([[0, 1], [0, 1], [0, 1], [0, 2]])
    plan, blocks = plan_and_blocks(experts, 3, 2)
    np.testing.assert_array_equal(plan.sorted_pairs, [0, 2, 4, 6, 1, 3, 5, 7])
    np.testing.assert_array_equal(plan.slot_pair, [[0, 2], [1, 3], [7, NOTHING]])
    np.testing.assert_array_equal(plan.slot_token, [[0, 1], [0, 1], [3, NOTHING]])
    np.testing.assert_array_equal(plan.pair_slot, [[0, 2], [1, 3], [NOTHING] * 2, [NOTHING, 4]])
    np.testing.assert_array_equal(plan.block_end, [1, 2, 2])
    experts_of_blocks, pairs, real = blocks
    np.testing.assert_array_equal(experts_of_blocks[:2], [0, 1])
    np.testing.assert_array_equal(pairs[0, :2], [4, 6])
    assert pairs[1, 0] == 5
    np.testing.assert_array_equal(real[:2], [[True, True, False, False], [True] + [False] * 3])


@pytest.mark.parametrize("share", [0, 0.1, 1])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (37, 3, 5), (300, 4, 16)])
def test_pairs_of_other_devices_come_last_and_go_nowhere(tokens, top_k, experts, share):
    random = np.random.default_rng(0)
    routing = draw_routing(tokens, top_k, experts, "uniform", 0)
    routing[random.random(routing.shape) >= share] = -1
    plan, _ = plan_and_blocks(jnp.asarray(routing, jnp.int32), experts, 2)
    flat = np.where(routing < 0, experts, routing).ravel()
    load = np.bincount(flat, minlength=experts + 1)[:experts]
    np.testing.assert_array_equal(plan.group_size, load)
    np.testing.assert_array_equal(plan.group_start, np.cumsum(load) - load)
    np.testing.assert_array_equal(plan.sorted_pairs, np.argsort(flat, kind="stable"))
    assert np.all(np.asarray(plan.pair_slot)[routing < 0] == NOTHING)


def test_plans_have_no_loop():
    experts = jnp.asarray(draw_routing(300, 3, 8, "uniform", 0), jnp.int32)
    text = plan_and_blocks.lower(experts, 8, 40).compile().as_text()
    assert text and " while(" not in text


def test_the_check_sees_a_wrong_plan():
    """Negative control: two slots swapped between experts."""
    experts = draw_routing(7, 3, 5, "uniform", 0)
    plan, blocks = plan_and_blocks(jnp.asarray(experts, jnp.int32), 5, 2)
    swapped = plan.slot_pair.at[0].set(plan.slot_pair[1]).at[1].set(plan.slot_pair[0])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        wrong = plan._replace(slot_pair=swapped), blocks
        patch.setitem(globals(), "plan_and_blocks", lambda *_: wrong)
        check(experts, 5, 2)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(2048, 4, 16), (33, 1, 4), (4096, 8, 256), (40, 8, 8)]
)
def test_slots_hold_an_eighth_more_than_the_mean_load(tokens, top_k, experts):
    """So an even routing needs no overflow and at most a sixth of the slots are empty."""
    capacity, mean = choose_capacity(tokens, top_k, experts, tokens), tokens * top_k / experts
    assert mean <= capacity <= tokens
    assert capacity == tokens or 1.125 * mean <= capacity <= 1.125 * mean + 9


def test_few_tokens_overflow_only_where_an_expert_has_four_times_the_mean():
    for tokens in range(1, 33):
        assert choose_capacity(tokens, 2, 31, 8 * tokens) == 8 * tokens  # of few experts all
        capacity = choose_capacity(tokens, 4, 32, tokens)
        assert capacity == min(tokens, max(8, -(-tokens * 4 * 4 // 32)))
