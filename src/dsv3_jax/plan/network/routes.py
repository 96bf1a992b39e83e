"""Ways between switches: sprayed over all shortest ones, hashed onto one, or by fixed tables.

A directed link 2i goes from the first switch of link i to its second, 2i + 1 back. A route is a
list of directed links, each with the share of the route's bytes that it carries: 1 on a single
path, less where packets are sprayed.

    adaptive  every switch spreads what it has evenly over all its links that lead closer
    ecmp      every switch takes one of those by a hash of the flow; flows may collide
    static    every switch takes one of those by the destination alone: going up digit after digit
              of the endpoint's number (D-mod-K), coming down the same ones in reverse, so that in a
              fat tree each NIC has a way down of its own

All choose among the links that work: tables and hash groups are taken to be up to date.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int, UInt64

from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.plan.network.topology import Topology

ROUTINGS = ("ecmp", "adaptive", "static")

Flat = Int[np.ndarray, " entries"]
_Part = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Route, link and share of some entries."""


@dataclass(frozen=True, kw_only=True)
class Routes:
    """Links of route r are `link[start[r] : start[r + 1]]`; a route may have none."""

    start: Int[np.ndarray, " routes_and_end"]
    link: Flat
    share: Float[np.ndarray, " entries"]

    def __len__(self) -> int:
        return len(self.start) - 1

    @cached_property
    def owner(self) -> Flat:
        """The route of each entry."""
        return np.repeat(np.arange(len(self)), np.diff(self.start))

    def take(self, routes: Int[np.ndarray, " some"]) -> "Routes":
        """Some of the routes, renumbered in the order given."""
        count = np.diff(self.start)[routes]
        _, entry = expand(self.start[routes], count)
        start = np.concatenate([[0], np.cumsum(count)])
        return Routes(start=start, link=self.link[entry], share=self.share[entry])


@dataclass(frozen=True, kw_only=True)
class _Exits:
    """Links that lead closer to one destination; those of switch s from `first[s]`, `count[s]`."""

    hops: Int[np.ndarray, " switches"]
    """To the destination; -1 from where there is no way."""
    first: Int[np.ndarray, " switches"]
    count: Int[np.ndarray, " switches"]
    link: Int[np.ndarray, " kept"]
    target: Int[np.ndarray, " kept"]


class Graph:
    """A topology's directed links, without the failed ones, for searching."""

    def __init__(self, topology: Topology, failed_links: frozenset[int] = frozenset()):
        count = len(topology.links)
        for link in failed_links:
            require(0 <= link < count, "link", link, f"0 to {count - 1} in {topology.name}")
        ends = np.stack([topology.links, topology.links[:, ::-1]], axis=1).reshape(-1, 2)
        works = ~np.isin(np.arange(2 * count) // 2, list(failed_links))
        ids = np.flatnonzero(works)
        order = np.argsort(ends[ids, 0], kind="stable")
        self.topology = topology
        self.link = ids[order]
        self.source, self.target = ends[self.link].T

    def exits(self, destination: int) -> _Exits:
        """The links on shortest ways to `destination`."""
        switches = self.topology.switches
        hops = np.full(switches, -1)
        hops[destination] = 0
        for step in range(1, switches):
            # Links go both ways, so what can be reached from the destination can reach it.
            reached = self.target[hops[self.source] == step - 1]
            reached = reached[hops[reached] < 0]
            if not reached.size:
                break
            hops[reached] = step
        is_closer = (hops[self.source] > 0) & (hops[self.target] == hops[self.source] - 1)
        source = self.source[is_closer]
        count = np.bincount(source, minlength=switches)
        first = np.concatenate([[0], np.cumsum(count)[:-1]])
        return _Exits(
            hops=hops,
            first=first,
            count=count,
            link=self.link[is_closer],
            target=self.target[is_closer],
        )


def spray(
    graph: Graph, source: Int[np.ndarray, " routes"], target: Int[np.ndarray, " routes"]
) -> Routes:
    """Routes between switches over all shortest ways, each switch splitting evenly."""
    parts = []
    for destination, routes in _by_destination(target):
        exits = graph.exits(destination)
        route, at, share = routes, source[routes], np.ones(len(routes))
        _require_ways(graph, exits, at, destination)
        while True:
            on_way = at != destination
            route, at, share = route[on_way], at[on_way], share[on_way]
            if not route.size:
                break
            which, chosen = expand(exits.first[at], exits.count[at])
            route, share = route[which], (share / exits.count[at])[which]
            parts.append((route, exits.link[chosen], share))
            route, at, share = _merge(route, exits.target[chosen], share, graph.topology.switches)
    return _assemble(parts, len(source))


def single_paths(
    graph: Graph,
    source: Int[np.ndarray, " routes"],
    target: Int[np.ndarray, " routes"],
    key: UInt64[np.ndarray, " routes"],
    routing: str,
) -> Routes:
    """One path each; `key` is the flow's hash for ecmp, the destination endpoint for static."""
    require_one_of("routing", routing, "ecmp", "static")
    parts = []
    for destination, routes in _by_destination(target):
        exits = graph.exits(destination)
        at, digits = source[routes], key[routes]
        _require_ways(graph, exits, at, destination)
        hops = exits.hops[at]
        upward: list[UInt64[np.ndarray, " some"]] = []
        for hop in range(int(hops.max())):
            on_way = np.flatnonzero(hops > hop)
            here = at[on_way]
            count = exits.count[here].astype(np.uint64)
            if routing == "ecmp":
                choice = hash_of(key[routes[on_way]], here.astype(np.uint64))
            else:
                upward.append(digits.copy())
                mirror = np.minimum(hop, hops[on_way] - 1 - hop)
                choice = np.stack(upward)[mirror, on_way]
                digits[on_way] = digits[on_way] // count
            chosen = exits.first[here] + (choice % count).astype(np.int64)
            parts.append((routes[on_way], exits.link[chosen], np.ones(len(on_way))))
            at[on_way] = exits.target[chosen]
    return _assemble(parts, len(source))


def expand(first: Int[np.ndarray, " n"], count: Int[np.ndarray, " n"]) -> tuple[Flat, Flat]:
    """For ranges of `count` places from `first` on: the range of each place, and the place."""
    which = np.repeat(np.arange(len(count)), count)
    before = np.cumsum(count) - count
    return which, np.arange(len(which)) + (first - before)[which]


def hash_of(
    key: UInt64[np.ndarray, " n"], salt: UInt64[np.ndarray, " n"] | int
) -> UInt64[np.ndarray, " n"]:
    """Well-mixed bits of both (the finaliser of SplitMix64)."""
    salts = np.atleast_1d(np.asarray(salt, dtype=np.uint64))  # arrays wrap round without a warning
    mixed = key + (salts + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _by_destination(
    target: Int[np.ndarray, " routes"],
) -> Iterator[tuple[int, Int[np.ndarray, " some"]]]:
    """Each destination, with the routes that go there."""
    order = np.argsort(target, kind="stable")
    destinations, first = np.unique(target[order], return_index=True)
    last = np.append(first, len(order))[1:]
    for destination, start, end in zip(destinations, first, last, strict=True):
        yield int(destination), order[start:end]


def _require_ways(graph: Graph, exits: _Exits, at: Flat, destination: int) -> None:
    stuck = exits.hops[at] < 0
    if stuck.any():
        name = graph.topology.switch_name
        rule = f"links that still lead from {name(int(at[stuck][0]))} to {name(destination)}"
        raise ValueError(f"topology is {graph.topology.name!r} with its failures, expected {rule}")


def _merge(
    route: Flat, at: Flat, share: Float[np.ndarray, " entries"], switches: int
) -> tuple[Int[np.ndarray, " merged"], Int[np.ndarray, " merged"], Float[np.ndarray, " merged"]]:
    """What meets again at a switch goes on as one."""
    keys, place = np.unique(route * switches + at, return_inverse=True)
    return keys // switches, keys % switches, np.bincount(place, share, len(keys))


def _assemble(parts: list[_Part], routes: int) -> Routes:
    if not parts:
        start = np.zeros(routes + 1, dtype=np.int64)
        return Routes(start=start, link=start[:0], share=np.zeros(0))
    route, link, share = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(route, kind="stable")
    start = np.concatenate([[0], np.cumsum(np.bincount(route, minlength=routes))])
    return Routes(start=start, link=link[order], share=share[order])
