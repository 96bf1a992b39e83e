"""Exchange plans by NumPy alone: everyone is served once, in order, whatever the routing."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.parallel.exchange_plan import (
    NO_EXPERT,
    localise,
    plan_round,
    rounds_needed,
    rows_by_hop,
    wanted_by,
)


@st.composite
def exchanges(draw):
    """(experts [rows, top_k], peers, experts a peer, capacity), some experts being nobody's."""
    peers, per_peer = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rows, top_k = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    ids = st.integers(NO_EXPERT, peers * per_peer - 1)
    experts = draw(
        st.lists(st.lists(ids, min_size=top_k, max_size=top_k), min_size=rows, max_size=rows)
    )
    return np.array(experts, np.int32), peers, per_peer, draw(st.integers(1, 13))


@given(exchanges())
def test_every_row_reaches_every_peer_it_needs_once(exchange):
    experts, peers, per_peer, capacity = exchange
    rows = len(experts)
    wanted = wanted_by(experts, peers, per_peer)
    needed = [{e // per_peer for e in row if e >= 0} for row in experts.tolist()]
    assert [set(np.flatnonzero(row)) for row in wanted] == needed
    rounds = int(rounds_needed(wanted, capacity))
    fullest = max(sum(peer in peers_of for peers_of in needed) for peer in range(peers))
    assert rounds == max(-(-fullest // capacity), 1)
    received = [[] for _ in range(peers)]
    for index in range(rounds):
        plan = plan_round(wanted, index, capacity)
        for peer in range(peers):
            got = plan.slot_row[peer][plan.slot_row[peer] < rows]
            assert len(got) <= capacity and (plan.slot_row[peer][len(got) :] == rows).all()
            slots = plan.row_slot[got, peer]
            assert slots.tolist() == [peer * capacity + c for c in range(len(got))]
            received[peer] += got.tolist()
        assert ((plan.row_slot < peers * capacity).sum()) == (plan.slot_row < rows).sum()
    assert received == [[row for row in range(rows) if p in needed[row]] for p in range(peers)]


@given(exchanges(), st.integers(0, 2))
def test_a_plan_without_the_peers_that_a_row_does_not_go_to(exchange, index):
    """Its slots are those of the whole plan, in the same order, in no more columns than experts."""
    experts, peers, per_peer, capacity = exchange
    wanted, top_k = wanted_by(experts, peers, per_peer), experts.shape[1]
    whole = plan_round(wanted, index, capacity)
    short = plan_round(wanted, index, capacity, most=top_k)
    assert short.slot_row.tolist() == whole.slot_row.tolist()
    assert short.row_slot.shape == (len(experts), min(top_k, peers))
    nothing = peers * capacity
    for few, all_of in zip(short.row_slot.tolist(), whole.row_slot.tolist(), strict=True):
        assert [s for s in few if s < nothing] == [s for s in all_of if s < nothing]


@given(exchanges())
def test_experts_are_numbered_anew_by_their_holder(exchange):
    experts, peers, per_peer, _ = exchange
    for peer in range(peers):
        found = localise(experts, peer, per_peer).tolist()
        for row, of_row in zip(experts.tolist(), found, strict=True):
            for expert, local in zip(row, of_row, strict=True):
                here = expert >= 0 and expert // per_peer == peer
                assert local == (expert - peer * per_peer if here else NO_EXPERT)


@pytest.mark.parametrize("capacity", [1, 7, 20, 45])
@pytest.mark.parametrize("density", [0, 0.1, 0.5, 1])
def test_jax_arrays_give_the_same_plan_without_a_loop(density, capacity):
    """Rounds past the last one too."""
    wanted = np.random.default_rng(capacity).random((40, 3)) < density
    wanted[:, 1] = False  # a peer that wants nothing
    compiled = jax.jit(plan_round, static_argnums=2).lower(jnp.asarray(wanted), 0, capacity)
    compiled = compiled.compile()
    assert " while(" not in (compiled.as_text() or "")
    for index in range(int(rounds_needed(wanted, capacity)) + 2):
        expected = plan_round(wanted, index, capacity)
        for found, array in zip(compiled(jnp.asarray(wanted), index), expected, strict=True):
            assert found.dtype == array.dtype == np.int32
            np.testing.assert_array_equal(found, array)


def test_the_example_of_the_module():
    experts = np.array([[0, 1], [0, 2], [1, 3], [0, 3]], np.int32)
    wanted = wanted_by(experts, peers=2, experts_per_peer=2)
    assert int(rounds_needed(wanted, 2)) == 2
    assert plan_round(wanted, 0, 2).slot_row.tolist() == [[0, 1], [1, 2]]
    assert plan_round(wanted, 1, 2).slot_row.tolist() == [[2, 3], [3, 4]]


NODES, GPUS, EXPERTS, TOP_K, TOKENS = 8, 8, 256, 8, 64
SENDERS = NODES * GPUS


def routed(choose) -> dict[str, float]:
    """Rows of each kind a token, for `choose(generator)` experts of every token."""
    generator = np.random.default_rng(0)
    chosen = [[choose(generator) for _ in range(TOKENS)] for _ in range(SENDERS)]
    rows = rows_by_hop(np.array(chosen), NODES, GPUS, EXPERTS)
    return {name: count / (SENDERS * TOKENS) for name, count in rows.items()}


def test_rows_on_the_wire_of_routings_with_a_closed_form():
    """Every expert on another node: 8 copies, one of which stays; all on one GPU: 1 copy."""
    spread = routed(lambda g: np.arange(NODES) * (EXPERTS // NODES))
    assert spread == {"flat": 8 - 8 / 64, "between_nodes": 7, "inside_nodes": 8 - 1}
    together = routed(lambda g: np.arange(TOP_K // 2))
    assert together == {"flat": 63 / 64, "between_nodes": 7 / 8, "inside_nodes": 7 / 8}


def test_node_limited_routing_sends_at_most_four_copies_between_nodes():
    """Facts §7.4: 8 of 256 in 4 of 8 groups touch 3.63 nodes, unrestricted 5.29; 7/8 of the nodes
    are not the sender's own."""

    def limited(generator):
        groups = generator.choice(NODES, 4, replace=False)
        within = generator.choice(4 * 32, TOP_K, replace=False)
        return groups[within // 32] * 32 + within % 32

    rows = routed(limited)
    assert rows["between_nodes"] == pytest.approx(3.63 * 7 / 8, rel=0.01)
    assert rows["between_nodes"] <= 4
    free = routed(lambda g: g.choice(EXPERTS, TOP_K, replace=False))
    assert free["between_nodes"] == pytest.approx(5.29 * 7 / 8, rel=0.01)
    assert rows["flat"] > 2 * rows["between_nodes"]


def test_plans_need_no_jax():
    program = "import dsv3_jax.parallel.exchange_plan, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
