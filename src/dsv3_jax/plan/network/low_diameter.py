"""Slim Fly and Dragonfly: switches that are few hops apart, without layers above them.

Slim Fly is the McKay-Miller-Širáň graph: switches (0, x, y) and (1, m, c) over the field of q
elements, q = 4w + δ with δ of -1, 0 or 1. (0, x, y) meets (0, x, y') where y - y' is in X,
(1, m, c) meets (1, m, c') where c - c' is in X', and (0, x, y) meets (1, m, c) where y = m x + c.
X and X' are the even and odd powers of a primitive element (for δ = -1 each with its opposites).
Any two switches are at most two hops apart. Table 3's Slim Fly has q = 28, which is no prime power,
so there is no such field and no such graph: that column is arithmetic (see `table3`).
Sources: Besta and Hoefler, "Slim Fly: A Cost Effective Low-Diameter Network Topology", SC 2014;
Kim et al., "Technology-Driven, Highly-Scalable Dragonfly Topology", ISCA 2008.
"""

import math

import numpy as np

from dsv3_jax.config.checks import require
from dsv3_jax.plan.network.topology import Topology, single_plane


def build_slim_fly(gpus: int, q: int | None = None) -> Topology:
    """A Slim Fly of `q` (an odd prime), by default the smallest with room for `gpus` endpoints.

    Every switch takes half its degree of endpoints, rounded up; `gpus` fill them in order.
    """
    if q is None:
        q = next(n for n in range(3, gpus + 5) if _is_odd_prime(n) and slim_fly_room(n) >= gpus)
    require(_is_odd_prime(q), "q", q, "an odd prime")
    rule = f"1 to {slim_fly_room(q)} endpoints in a Slim Fly of q = {q}"
    require(1 <= gpus <= slim_fly_room(q), "endpoints", gpus, rule)
    even, odd = _generators(q)
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(q), np.arange(q), indexing="ij"))
    own, parts = x * q + y, []
    for half, steps in ((0, even), (1, odd)):
        for step in steps:
            other = x * q + (y + step) % q
            parts.append(half * q * q + np.stack([own, other], axis=1))
    for m in range(q):  # y = m x + c
        parts.append(np.stack([own, q * q + m * q + (y - m * x) % q], axis=1))
    links = np.unique(np.sort(np.concatenate(parts), axis=1), axis=0)
    concentration = slim_fly_room(q) // (2 * q * q)
    layer = np.zeros(2 * q * q, dtype=np.int64)
    return single_plane("SF", np.arange(gpus) // concentration, links, layer, ("switch",))


def slim_fly_room(q: int) -> int:
    """Endpoints of a full Slim Fly: ceil(degree / 2) on each of its 2 q² switches."""
    return 2 * q * q * math.ceil(slim_fly_degree(q) / 2)


def slim_fly_degree(q: int) -> int:
    """Links of a switch to others: (3 q - δ) / 2."""
    require(q % 4 != 2, "q", q, "4w - 1, 4w or 4w + 1")
    return (3 * q - (0, 1, 0, -1)[q % 4]) // 2


def _generators(q: int) -> tuple[list[int], list[int]]:
    """X and X', each equal to its own negatives, so that links go both ways."""
    root = next(g for g in range(2, q + 1) if len({pow(g, n, q) for n in range(q - 1)}) == q - 1)
    powers = [pow(root, n, q) for n in range(q - 1)]
    if q % 4 == 1:  # -1 is an even power
        return powers[0::2], powers[1::2]
    w = (q + 1) // 4
    even, odd = powers[0 : 2 * w - 1 : 2], powers[1 : 2 * w : 2]
    return even + [q - n for n in even], odd + [q - n for n in odd]


def _is_odd_prime(n: int) -> bool:
    return n > 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def build_dragonfly(gpus: int, *, p: int | None = None, groups: int | None = None) -> Topology:
    """A balanced Dragonfly: p endpoints and p global links on each of a group's 2p switches.

    Inside a group every switch meets every other; groups meet over at most 2 p² global links each,
    so that there are at most 2 p² + 1. By default p is the smallest with room for `gpus`, and the
    groups only as many as they need. Global links are dealt round the circle of groups; where there
    are fewer groups than links, the nearest are met twice. A link that fits no pair is left out.
    """
    if p is None:
        p = next(n for n in range(1, gpus + 1) if 2 * n * n * (2 * n * n + 1) >= gpus)
    require(p >= 1, "p", p, "at least 1")
    size = 2 * p * p
    groups = max(-(-gpus // size), 2) if groups is None else groups
    require(2 <= groups <= size + 1, "groups", groups, f"2 to {size + 1} where p is {p}")
    rule = f"1 to {size * groups} endpoints in a Dragonfly of p = {p} and {groups} groups"
    require(1 <= gpus <= size * groups, "endpoints", gpus, rule)
    a = 2 * p
    first, second = np.triu_indices(a, 1)
    inside = np.stack([first, second], axis=1)[None] + a * np.arange(groups)[:, None, None]
    links = np.concatenate([inside.reshape(-1, 2), _global_links(groups, a, p)])
    layer = np.zeros(a * groups, dtype=np.int64)
    return single_plane("DF", np.arange(gpus) // p, links, layer, ("switch",))


def _global_links(groups: int, switches: int, per_switch: int) -> np.ndarray:
    """Every group's ports dealt to the groups at distances 1, -1, 2, -2, ... again and again."""
    ports = switches * per_switch
    group, free, parts = np.arange(groups), 0, []
    distances = list(range(1, groups // 2 + 1))
    while True:
        for distance in distances:
            is_half_way = 2 * distance == groups  # there and back are one link
            if free + (1 if is_half_way else 2) > ports:
                return np.concatenate(parts)
            here = group[: groups // 2] if is_half_way else group
            there = (here + distance) % groups
            back = free if is_half_way else free + 1
            out_switch, in_switch = free // per_switch, back // per_switch
            parts.append(np.stack([here * switches + out_switch, there * switches + in_switch], 1))
            free = back + 1
