"""Routes against all shortest paths, counted one by one."""

import numpy as np
import pytest

from dsv3_jax.plan.network.fat_tree import build_ft2, build_ft3, build_mpft
from dsv3_jax.plan.network.low_diameter import build_dragonfly, build_slim_fly
from dsv3_jax.plan.network.routes import Graph, Routes, hash_of, single_paths, spray
from dsv3_jax.plan.network.topology import hops_between


def pairs_of(topology):
    """All pairs of switches with endpoints."""
    ends = np.unique(topology.endpoint_switch)
    source, target = (grid.ravel() for grid in np.meshgrid(ends, ends))
    return source[source != target], target[source != target]


def neighbours(topology, failed=()):
    found = {switch: [] for switch in range(topology.switches)}
    for link, (a, b) in enumerate(topology.links.tolist()):
        if link not in failed:
            found[a].append((2 * link, b))
            found[b].append((2 * link + 1, a))
    return found


def split_evenly(topology, source: int, target: int, failed=()) -> dict[int, float]:
    """Share of each directed link, walking every shortest path and splitting at each switch."""
    near = neighbours(topology, failed)
    hops = {target: 0}
    edge = [target]
    while edge:
        edge = [b for a in edge for _, b in near[a] if hops.setdefault(b, hops[a] + 1) > hops[a]]
        edge = list(dict.fromkeys(b for b in edge if b != target))
        if source in hops:
            break
    shares: dict[int, float] = {}

    def walk(at: int, share: float) -> None:
        closer = [(link, b) for link, b in near[at] if hops.get(b, 1 << 30) == hops[at] - 1]
        for link, b in closer:
            shares[link] = shares.get(link, 0.0) + share / len(closer)
            walk(b, share / len(closer))

    walk(source, 1.0)
    return shares


TOPOLOGIES = (
    build_ft2(32, radix=8),
    build_ft2(24, radix=16),  # parallel links
    build_ft3(32, radix=4 * 2),
    build_slim_fly(54, q=3),
    build_dragonfly(32, p=2),
)


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.name}-{t.endpoints}")
def test_spray_splits_over_all_shortest_paths(topology):
    source, target = pairs_of(topology)
    routes = spray(Graph(topology), source, target)
    for r in range(0, len(source), 7):
        part = slice(routes.start[r], routes.start[r + 1])
        found = dict(zip(routes.link[part].tolist(), routes.share[part].tolist(), strict=True))
        assert found == pytest.approx(split_evenly(topology, int(source[r]), int(target[r])))


def test_spray_goes_round_a_failed_link():
    tree = build_ft2(32, radix=8)  # 8 leaves, 4 spines
    routes = spray(Graph(tree, frozenset({0})), np.array([0, 1]), np.array([1, 0]))
    for r, (a, b) in enumerate(((0, 1), (1, 0))):
        part = slice(routes.start[r], routes.start[r + 1])
        found = dict(zip(routes.link[part].tolist(), routes.share[part].tolist(), strict=True))
        assert found == pytest.approx(split_evenly(tree, a, b, failed={0}))
        assert len(found) == 6 and 0 not in found and 1 not in found


@pytest.mark.parametrize("routing", ["ecmp", "static"])
@pytest.mark.parametrize("topology", TOPOLOGIES, ids=lambda t: f"{t.name}-{t.endpoints}")
def test_single_paths_are_shortest_paths(topology, routing):
    source, target = pairs_of(topology)
    key = np.arange(len(source)).astype(np.uint64)
    routes = single_paths(Graph(topology), source, target, key, routing)
    assert (routes.share == 1).all()
    step = {link: (a, b) for a, near in neighbours(topology).items() for link, b in near}
    for r, (a, b) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        links = routes.link[routes.start[r] : routes.start[r + 1]].tolist()
        steps = [step[link] for link in links]
        assert len(links) == hops_between(topology, a)[b]
        ends = [a, *(end for _, end in steps)]
        assert [start for start, _ in steps] == ends[:-1] and ends[-1] == b


@pytest.mark.parametrize(
    "topology",
    [build_ft2(32, 8), build_ft2(64, 64), build_ft3(128, 8), build_ft3(64, 8), build_ft3(48, 8)],
    ids=["FT2", "FT2 of one spine", "FT3", "half an FT3", "FT3 of 3 pods"],
)
def test_static_tables_carry_every_shift_without_conflict(topology):
    """D-mod-K: each endpoint sending to the one `shift` further, no link carries two of them.

    Source: Zahavi, "D-Mod-K Routing Providing Non-Blocking Traffic for Shift Permutations on Real
    Life Fat Trees", 2010. It holds where every leaf is full.
    """
    endpoint, graph = np.arange(topology.endpoints), Graph(topology)
    for shift in range(1, topology.endpoints, 1 + topology.endpoints // 32):
        to = (endpoint + shift) % topology.endpoints
        at, end = topology.endpoint_switch[endpoint], topology.endpoint_switch[to]
        moves = at != end
        key = to[moves].astype(np.uint64)
        routes = single_paths(graph, at[moves], end[moves], key, "static")
        assert np.bincount(routes.link).max(initial=0) <= 1


def test_ecmp_depends_on_the_flow_alone():
    tree = build_ft2(2048)
    flows = np.arange(400)
    source, target = np.zeros(400, dtype=int), np.ones(400, dtype=int)
    graph = Graph(tree)
    first = single_paths(graph, source, target, hash_of(flows.astype(np.uint64), 0), "ecmp")
    again = single_paths(graph, source, target, hash_of(flows.astype(np.uint64), 0), "ecmp")
    other = single_paths(graph, source, target, hash_of(flows.astype(np.uint64), 1), "ecmp")
    assert (first.link == again.link).all()
    assert (first.link != other.link).any()
    # 400 balls in 32 bins: chi-squared of 31 degrees of freedom is below 61 in 999 of 1,000.
    load = np.bincount(first.link[::2] // 2, minlength=32)
    assert load.sum() == 400
    assert ((load - 12.5) ** 2 / 12.5).sum() < 61


def test_no_way_is_an_error():
    planes = build_mpft(512, radix=16)
    graph = Graph(planes)
    at, to = planes.endpoint_switch[:1], planes.endpoint_switch[1:2]
    with pytest.raises(ValueError, match="links that still lead from leaf 0 to leaf"):
        spray(graph, at, to)
    with pytest.raises(ValueError, match="topology is 'MPFT' with its failures"):
        single_paths(graph, at, to, np.zeros(1, dtype=np.uint64), "static")
    with pytest.raises(ValueError, match="link is 900, expected 0 to"):
        Graph(build_ft2(32, 8), frozenset({900}))


def test_some_routes():
    routes = Routes(
        start=np.array([0, 2, 2, 3]), link=np.array([5, 6, 7]), share=np.array([0.5, 0.5, 1.0])
    )
    some = routes.take(np.array([2, 1, 0]))
    assert some.start.tolist() == [0, 1, 1, 3]
    assert some.link.tolist() == [7, 5, 6]
    assert some.owner.tolist() == [0, 2, 2]
