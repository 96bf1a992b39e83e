"""Flows that share links max-min fairly, as fluids, until the last has ended.

Rates are by progressive filling: all flows grow together until a link is full, whose flows then
stay; the others grow on. It is done for all links at once that are the tightest of every flow on
them, which gives the same rates. Between two ends of flows rates are constant. Groups of flows that
share no link that could ever be full have clocks of their own, so that the ends of one group do not
make the rates of the others be computed again. Both are exact.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from dsv3_jax.config.checks import require
from dsv3_jax.plan.network.routes import Routes, expand

NO_LINK = -1
EXACT_FLOWS = 1_000
"""A group of up to so many flows is run exactly whatever the tolerance: it is cheap."""
_BLOCK = 2_000_000
"""Entries of routes looked at together, for the sake of memory."""
_TIE = 1e-9
"""Relative: shares and times nearer than that are equal, of which rounding alone makes two."""

PerFlow = Float[np.ndarray, " flows"]
PerLink = Float[np.ndarray, " links"]


@dataclass(frozen=True, kw_only=True)
class Flows:
    """Bytes on their way; each flow has links of its own, and a route or `NO_LINK`.

    Own links (NIC, NVLink) carry all of a flow, the links of its route their shares.
    """

    size_bytes: PerFlow
    own: Int[np.ndarray, "flows own"]
    """Padded with `NO_LINK`."""
    route: Int[np.ndarray, " flows"]
    routes: Routes

    def __len__(self) -> int:
        return len(self.size_bytes)

    def take(self, chosen: Int[np.ndarray, " some"] | Bool[np.ndarray, " flows"]) -> "Flows":
        """Some of the flows; the routes stay."""
        return replace(
            self,
            size_bytes=self.size_bytes[chosen],
            own=self.own[chosen],
            route=self.route[chosen],
        )

    def compact(self) -> "Flows":
        """The same flows, without the routes that none takes if those are the most."""
        if 2 * len(self) >= len(self.routes):
            return self
        used, route = np.unique(self.route, return_inverse=True)
        first = int(used[0] < 0) if len(used) else 0
        return replace(self, route=route - first, routes=self.routes.take(used[first:]))

    def load(self, amount: PerFlow, links: int) -> PerLink:
        """What the links carry where each flow carries `amount`."""
        own = np.bincount((self.own + 1).ravel(), np.repeat(amount, self.own.shape[1]), links + 1)
        by_route = np.bincount(self.route + 1, amount, len(self.routes) + 1)[1:]
        taken = np.flatnonzero(by_route)
        which, entry = expand(self.routes.start[taken], np.diff(self.routes.start)[taken])
        entries = by_route[taken][which] * self.routes.share[entry]
        return own[1:] + np.bincount(self.routes.link[entry], entries, links)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """When each flow ends, and what each link has carried, with its capacity."""

    end_seconds: PerFlow
    link_bytes: PerLink
    capacity: PerLink
    rounds: int
    """How often rates were computed."""

    @property
    def total_seconds(self) -> float:
        return float(self.end_seconds.max(initial=0.0))

    @property
    def bound_seconds(self) -> float:
        """What the busiest link needs alone: no order of sending is faster."""
        return float(self.link_use.max(initial=0.0)) * self.total_seconds

    @property
    def link_use(self) -> PerLink:
        """Share of each link's capacity used over the whole time; 0 of a failed one."""
        possible = self.capacity * self.total_seconds
        return np.divide(self.link_bytes, possible, np.zeros_like(possible), where=possible > 0)


def run_flows(
    flows: Flows, capacity: PerLink, *, tolerance: float = 0.0, exact_flows: int = EXACT_FLOWS
) -> Outcome:
    """Sends all `flows` from time 0 over links of `capacity` bytes/s.

    With a `tolerance`, flows of a group of more than `exact_flows` that would end within that share
    of the elapsed time end before rates are computed again: each at its own time, but what it
    leaves is used a little late. Raises ValueError for a flow that has no link, or one without
    capacity.
    """
    require(0 <= tolerance < 1, "tolerance", tolerance, "0 to 1")
    require(bool((flows.size_bytes > 0).all()), "flows", "an empty flow", "bytes in each")
    links = len(capacity)
    active = _without_slack(flows, capacity)
    group = _groups(active, links)
    members = np.bincount(group)
    clock, window = np.zeros(len(members)), np.where(members > exact_flows, tolerance, 0.0)
    window = 1 + np.maximum(window, _TIE)
    left, end, index = flows.size_bytes.copy(), np.zeros(len(flows)), np.arange(len(flows))
    rounds = 0
    while index.size:
        rate = max_min_rates(active, capacity)
        rounds += 1
        ends = clock[group] + left / rate
        first = np.full(len(clock), np.inf)
        np.minimum.at(first, group, ends)
        has_ended = ends <= (first * window)[group]
        end[index[has_ended]] = ends[has_ended]
        then = clock.copy()
        np.maximum.at(then, group[has_ended], ends[has_ended])
        left = left - rate * (then - clock)[group]
        clock = then
        stays = ~has_ended
        left, index, group = left[stays], index[stays], group[stays]
        active = active.take(stays).compact()
    return Outcome(
        end_seconds=end,
        link_bytes=flows.load(flows.size_bytes, links),
        capacity=capacity,
        rounds=rounds,
    )


def max_min_rates(flows: Flows, capacity: PerLink) -> PerFlow:
    """Bytes/s of each flow: none can have more but at the cost of one that has no more than it.

    Source: Bertsekas and Gallager, "Data Networks", §6.5.2.
    """
    links = len(capacity)
    rate, index = np.zeros(len(flows)), np.arange(len(flows))
    free, weight = capacity.astype(np.float64), flows.load(np.ones(len(flows)), links)
    while index.size:
        used = weight > _TIE
        fair = np.divide(np.maximum(free, 0.0), weight, np.full(links, np.inf), where=used)
        level = _levels(flows, fair)
        if not np.isfinite(level).all():
            raise ValueError("flows hold one without a link, expected a link with an end for each")
        if (level <= 0).any():
            raise ValueError("flows cross a link without capacity, expected a way round it")
        least = _least_level(flows, level, links)
        is_full = used & (fair <= least * (1 + _TIE))
        stays = ~_crosses(flows, is_full)
        frozen = flows.take(~stays)
        rate[index[~stays]] = level[~stays]
        free = free - frozen.load(level[~stays], links)
        weight = weight - frozen.load(np.ones(len(frozen)), links)
        flows, index = flows.take(stays).compact(), index[stays]
    return rate


def _levels(flows: Flows, fair: PerLink) -> PerFlow:
    """The least fair share on each flow's links."""
    padded = np.concatenate([[np.inf], fair])
    own = padded[flows.own + 1].min(axis=1, initial=np.inf)
    by_route = _reduce(np.minimum, fair[flows.routes.link], flows.routes, np.inf)
    return np.minimum(own, np.concatenate([by_route, [np.inf]])[flows.route])


def _least_level(flows: Flows, level: PerFlow, links: int) -> PerLink:
    """The least level among the flows of each link."""
    least = np.full(links + 1, np.inf)
    np.minimum.at(least, (flows.own + 1).ravel(), np.repeat(level, flows.own.shape[1]))
    by_route = np.full(len(flows.routes) + 1, np.inf)
    np.minimum.at(by_route, flows.route, level)  # the last place takes the flows without a route
    np.minimum.at(least, flows.routes.link + 1, by_route[flows.routes.owner])
    return least[1:]


def _crosses(flows: Flows, marked: Bool[np.ndarray, " links"]) -> Bool[np.ndarray, " flows"]:
    """Whether a flow has a marked link."""
    own = np.concatenate([[False], marked])[flows.own + 1].any(axis=1)
    by_route = _reduce(np.logical_or, marked[flows.routes.link], flows.routes, False)
    return own | np.concatenate([by_route, [False]])[flows.route]


def _reduce(
    operation: np.ufunc, values: np.ndarray, routes: Routes, empty: float | int | bool
) -> np.ndarray:
    """`operation` over the entries of each route, `empty` for one without."""
    result = np.full(len(routes), empty, dtype=values.dtype)
    has_links = np.diff(routes.start) > 0
    if has_links.any():
        result[has_links] = operation.reduceat(values, routes.start[:-1][has_links])
    return result


def _without_slack(flows: Flows, capacity: PerLink) -> Flows:
    """The same flows on routes without the links that can never be full.

    What an own link lets through bounds what its flows bring to a link of their routes: its
    capacity times the largest of their shares there. Where the sum of those is within the link's
    capacity, it limits nothing that the own links do not.
    """
    routes, links = flows.routes, len(capacity)
    routed = flows.route >= 0
    is_own = np.bincount((flows.own + 1).ravel(), minlength=links + 1)[1:] > 0
    keep = np.ones(len(routes.link), dtype=bool)
    for gate in flows.own[routed].T:
        if (gate == NO_LINK).any():
            continue
        bound = _bound_by_gates(gate, flows.route[routed], routes, capacity)
        keep &= (is_own | (bound > capacity * (1 + _TIE)))[routes.link]
    start = np.concatenate([[0], np.cumsum(keep)])[routes.start]
    kept = Routes(start=start, link=routes.link[keep], share=routes.share[keep])
    return replace(flows, routes=kept)


def _bound_by_gates(
    gate: Int[np.ndarray, " routed"],
    route: Int[np.ndarray, " routed"],
    routes: Routes,
    capacity: PerLink,
) -> PerLink:
    """The most that the links of routes can get through the gates: an own link of each flow."""
    links = len(capacity)
    gate, route = np.unique(np.stack([gate, route]), axis=1)  # in the order of the gates
    count = np.diff(routes.start)[route]
    block = np.cumsum(count)[np.searchsorted(gate, gate)] // _BLOCK  # a gate is never cut
    bound = np.zeros(links)
    for first, last in itertools.pairwise([*np.unique(block, return_index=True)[1], len(gate)]):
        which, entry = expand(routes.start[route[first:last]], count[first:last])
        pair = gate[first:last][which] * links + routes.link[entry]
        pair, place = np.unique(pair, return_inverse=True)
        share = np.zeros(len(pair))
        np.maximum.at(share, place, routes.share[entry])
        bound += np.bincount(pair % links, share * capacity[pair // links], links)
    return bound


def _groups(flows: Flows, links: int) -> Int[np.ndarray, " flows"]:
    """A number for each flow, the same for those that links join, directly or not."""
    label = np.arange(len(flows))
    while True:
        of_link = np.full(links + 1, len(flows))
        np.minimum.at(of_link, (flows.own + 1).ravel(), np.repeat(label, flows.own.shape[1]))
        of_route = np.full(len(flows.routes) + 1, len(flows))
        np.minimum.at(of_route, flows.route, label)
        of_route[-1] = len(flows)
        np.minimum.at(of_link, flows.routes.link + 1, of_route[flows.routes.owner])
        of_link[0] = len(flows)  # of no link
        near = _reduce(np.minimum, of_link[flows.routes.link + 1], flows.routes, len(flows))
        lower = np.minimum(label, of_link[flows.own + 1].min(axis=1, initial=len(flows)))
        lower = np.minimum(lower, np.concatenate([near, [len(flows)]])[flows.route])
        lower = lower[lower]
        if (lower == label).all():
            return np.unique(label, return_inverse=True)[1]
        label = lower
