"""Max-min rates and fluid times: hand examples, the theorem, and a slow simulator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.plan.network.fluid import Flows, max_min_rates, run_flows
from dsv3_jax.plan.network.routes import Routes


def make_flows(sizes, own, shared=()) -> Flows:
    """Flows with links of their own; `shared[i]` are (link, share) of flow i's route, if any."""
    width = max(map(len, own))
    padded = [list(links) + [-1] * (width - len(links)) for links in own]
    route, start, link, share = [], [0], [], []
    for i in range(len(sizes)):
        entries = shared[i] if shared else ()
        route.append(len(start) - 1 if entries else -1)
        if entries:
            link += [entry for entry, _ in entries]
            share += [part for _, part in entries]
            start.append(len(link))
    return Flows(
        size_bytes=np.array(sizes, dtype=np.float64),
        own=np.array(padded, dtype=np.int64).reshape(len(sizes), width),
        route=np.array(route),
        routes=Routes(
            start=np.array(start),
            link=np.array(link, dtype=np.int64),
            share=np.array(share, dtype=np.float64),
        ),
    )


def uses(flows: Flows, links: int) -> np.ndarray:
    """Share of each flow on each link, [flows, links]."""
    matrix = np.zeros((len(flows), links))
    for i in range(len(flows)):
        for link in flows.own[i][flows.own[i] >= 0]:
            matrix[i, link] += 1
        if flows.route[i] >= 0:
            part = slice(*flows.routes.start[flows.route[i] :][:2])
            np.add.at(matrix[i], flows.routes.link[part], flows.routes.share[part])
    return matrix


def fill_slowly(matrix: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Max-min rates by the textbook: all grow together, the flows of a full link stop."""
    rate, grows = np.zeros(len(matrix)), np.ones(len(matrix), dtype=bool)
    while grows.any():
        slope = matrix[grows].sum(axis=0)
        room = capacity - rate @ matrix
        step = min(room[k] / slope[k] for k in range(len(capacity)) if slope[k] > 0)
        rate[grows] += step
        full = (capacity - rate @ matrix <= 1e-9 * capacity) & (slope > 0)
        grows &= ~(matrix[:, full] > 0).any(axis=1)
    return rate


def end_slowly(sizes: np.ndarray, matrix: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Ends of all flows with one clock and rates anew after each."""
    left, end, now = sizes.astype(float), np.zeros(len(sizes)), 0.0
    alive = np.arange(len(sizes))
    while alive.size:
        rate = fill_slowly(matrix[alive], capacity)
        step = (left[alive] / rate).min()
        now += step
        left[alive] -= rate * step
        done = left[alive] <= 1e-9 * sizes[alive]
        end[alive[done]] = now
        alive = alive[~done]
    return end


def test_a_long_flow_and_two_short_ones():
    """Links of 1 and 2: the long flow and the first share the narrow one, the third the rest."""
    flows = make_flows([1, 1, 1], [(0, 1), (0,), (1,)])
    assert max_min_rates(flows, np.array([1.0, 2.0])) == pytest.approx([0.5, 0.5, 1.5])


def test_three_levels():
    """Four flows share link 0 (1.0): 1/4 each. What they leave of links 1 and 2 others get."""
    flows = make_flows([1] * 6, [(0,), (0,), (0, 1), (0, 2), (1, 2), (2,)])
    rates = max_min_rates(flows, np.array([1.0, 1.0, 2.0]))
    assert rates == pytest.approx([0.25, 0.25, 0.25, 0.25, 0.75, 1.0])


def test_a_sprayed_flow_meets_a_direct_one():
    """Half of the sprayed flow's bytes cross link 0: r/2 + r = 1, and link 1 is not full."""
    flows = make_flows([1, 1], [(2,), (3,)], [((0, 0.5), (1, 0.5)), ((0, 1.0),)])
    rates = max_min_rates(flows, np.array([1.0, 1.0, 9.0, 9.0]))
    assert rates == pytest.approx([2 / 3, 2 / 3])


def test_two_flows_of_one_link_end_as_processor_sharing_has_it():
    outcome = run_flows(make_flows([1, 2], [(0,), (0,)]), np.array([1.0]))
    assert outcome.end_seconds == pytest.approx([2.0, 3.0])
    assert outcome.link_use == pytest.approx([1.0])
    assert outcome.rounds == 2


def test_incast_takes_as_long_as_the_receiver():
    senders, size, speed = 12, 3e6, 40e9
    flows = make_flows([size] * senders, [(i, senders) for i in range(senders)])
    outcome = run_flows(flows, np.full(senders + 1, speed))
    assert outcome.total_seconds == pytest.approx(senders * size / speed)
    assert outcome.bound_seconds == pytest.approx(outcome.total_seconds)
    assert outcome.link_use[:senders] == pytest.approx(1 / senders)


def test_separate_groups_do_not_add_rounds():
    """Five pairs on links of their own: each ends twice, and all their first ends are one round."""
    sizes = [1, 2] * 5
    outcome = run_flows(make_flows(sizes, [(i // 2,) for i in range(10)]), np.arange(1.0, 6.0))
    expected = [end / (i // 2 + 1) for i, end in enumerate([2.0, 3.0] * 5)]
    assert outcome.end_seconds == pytest.approx(expected)
    assert outcome.rounds == 2


@st.composite
def networks(draw):
    links = draw(st.integers(2, 6))
    count = draw(st.integers(1, 9))
    capacity = [draw(st.sampled_from([1.0, 2.0, 3.5, 10.0])) for _ in range(links)]
    some = st.lists(st.integers(0, links - 1), min_size=1, max_size=3, unique=True)
    own = [draw(some) for _ in range(count)]
    shared = []
    for links_of_flow in own:
        other = [link for link in draw(some) if link not in links_of_flow]
        shared.append(tuple((link, 1 / len(other)) for link in other))
    sizes = [draw(st.sampled_from([1.0, 1.5, 4.0])) for _ in range(count)]
    return make_flows(sizes, own, shared), np.array(capacity)


@settings(max_examples=25)
@given(networks())
def test_every_flow_has_a_bottleneck(network):
    """Bertsekas and Gallager §6.5.2: rates are max-min fair if and only if every flow has a full
    link on which no flow has more than it."""
    flows, capacity = network
    rate = max_min_rates(flows, capacity)
    matrix = uses(flows, len(capacity))
    load = rate @ matrix
    assert (load <= capacity * (1 + 1e-9)).all()
    for i in range(len(flows)):
        full = (matrix[i] > 0) & (load >= capacity * (1 - 1e-7))
        assert any(
            rate[i] >= rate[matrix[:, k] > 0].max() * (1 - 1e-7) for k in np.flatnonzero(full)
        )


@settings(max_examples=25)
@given(networks())
def test_ends_are_those_of_a_slow_simulator(network):
    flows, capacity = network
    matrix = uses(flows, len(capacity))
    outcome = run_flows(flows, capacity)
    assert outcome.end_seconds == pytest.approx(
        end_slowly(flows.size_bytes, matrix, capacity), rel=1e-6
    )
    assert outcome.link_bytes == pytest.approx(flows.size_bytes @ matrix)
    assert outcome.bound_seconds <= outcome.total_seconds * (1 + 1e-9)


@settings(max_examples=25)
@given(networks(), st.sampled_from([0.01, 0.1]))
def test_a_tolerance_ends_about_then(network, tolerance):
    """On such nets the last end moves by no more than the tolerance for each round it saves."""
    flows, capacity = network
    exact, rough = (
        run_flows(flows, capacity),
        run_flows(flows, capacity, tolerance=tolerance, exact_flows=0),
    )
    assert rough.rounds <= exact.rounds
    assert rough.total_seconds >= exact.bound_seconds * (1 - 1e-9)
    again = run_flows(flows, capacity, tolerance=tolerance)  # so few flows are run exactly
    assert (again.end_seconds == exact.end_seconds).all()
    saved = exact.rounds - rough.rounds
    assert rough.total_seconds == pytest.approx(
        exact.total_seconds, rel=(1 + tolerance) ** (1 + saved) - 1
    )


def test_what_cannot_be():
    with pytest.raises(ValueError, match="expected a way round it"):
        run_flows(make_flows([1], [(0,)]), np.array([0.0]))
    with pytest.raises(ValueError, match="one without a link"):
        run_flows(make_flows([1, 1], [(0,), (-1,)]), np.array([1.0]))
    with pytest.raises(ValueError, match=r"tolerance is 1\.0, expected 0 to 1"):
        run_flows(make_flows([1], [(0,)]), np.array([1.0]), tolerance=1.0)
    with pytest.raises(ValueError, match="an empty flow"):
        run_flows(make_flows([0], [(0,)]), np.array([1.0]))
