"""What networks cost: Table 3 of "Insights into DeepSeek-V3" (arXiv 2505.09343), and its prices.

Every count follows from the radix k (links join two switches; those to endpoints are not counted):

    FT2   k²/2 endpoints, 3k/2 switches, k²/2 links
    MPFT  eight times that
    FT3   k³/4 endpoints, 5k²/4 switches, k³/2 links
    SF    2q² switches of d = (3q - δ)/2 links, ceil(d/2) endpoints each
    DF    g groups of a switches, each with p endpoints and h links to other groups

The paper gives no prices of a switch and of a link. They are what fits its five costs best: least
squares of the relative errors. Cables to endpoints and NICs are in neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsv3_jax.plan.network.low_diameter import slim_fly_degree, slim_fly_room
from dsv3_jax.plan.network.topology import GPUS_PER_NODE, Topology


@dataclass(frozen=True, kw_only=True)
class NetworkCounts:
    """How much there is of a network."""

    name: str
    endpoints: int
    switches: int
    links: int


@dataclass(frozen=True, kw_only=True)
class PublishedNetwork(NetworkCounts):
    """A column of Table 3."""

    cost_million_dollars: float
    thousand_dollars_per_endpoint: float


@dataclass(frozen=True, kw_only=True)
class UnitPrices:
    """Dollars, as fitted; the error is that of the worst column."""

    switch_dollars: float
    link_dollars: float
    worst_relative_error: float

    def cost_dollars(self, counts: NetworkCounts) -> float:
        return self.switch_dollars * counts.switches + self.link_dollars * counts.links


def _published(
    name: str, endpoints: int, switches: int, links: int, cost: float, each: float
) -> PublishedNetwork:
    return PublishedNetwork(
        name=name,
        endpoints=endpoints,
        switches=switches,
        links=links,
        cost_million_dollars=cost,
        thousand_dollars_per_endpoint=each,
    )


PUBLISHED = (
    _published("FT2", 2_048, 96, 2_048, 9.0, 4.39),
    _published("MPFT", 16_384, 768, 16_384, 72.0, 4.39),
    _published("FT3", 65_536, 5_120, 131_072, 491.0, 7.5),
    _published("SF", 32_928, 1_568, 32_928, 146.0, 4.4),
    _published("DF", 261_632, 16_352, 384_272, 1_522.0, 5.8),
)
RADIX = 64
SLIM_FLY_Q = 28
DRAGONFLY = {"p": 16, "a": 32, "h": 16, "groups": 511}


def count_ft2(radix: int) -> NetworkCounts:
    half_square = radix**2 // 2
    return NetworkCounts(
        name="FT2", endpoints=half_square, switches=3 * radix // 2, links=half_square
    )


def count_mpft(radix: int) -> NetworkCounts:
    plane = count_ft2(radix)
    return NetworkCounts(
        name="MPFT",
        endpoints=GPUS_PER_NODE * plane.endpoints,
        switches=GPUS_PER_NODE * plane.switches,
        links=GPUS_PER_NODE * plane.links,
    )


def count_ft3(radix: int) -> NetworkCounts:
    cube = radix**3
    return NetworkCounts(
        name="FT3", endpoints=cube // 4, switches=5 * radix**2 // 4, links=cube // 2
    )


def count_slim_fly(q: int) -> NetworkCounts:
    """By formula alone, so for a q too that no graph exists for."""
    switches = 2 * q * q
    links = switches * slim_fly_degree(q) // 2
    return NetworkCounts(name="SF", endpoints=slim_fly_room(q), switches=switches, links=links)


def count_dragonfly(*, p: int, a: int, h: int, groups: int) -> NetworkCounts:
    """All ports of every switch in use."""
    links = groups * (math.comb(a, 2) + a * h // 2)
    return NetworkCounts(name="DF", endpoints=p * a * groups, switches=a * groups, links=links)


def count_topology(topology: Topology) -> NetworkCounts:
    """What is there of one that is built."""
    return NetworkCounts(
        name=topology.name,
        endpoints=topology.endpoints,
        switches=topology.switches,
        links=len(topology.links),
    )


def table3_counts() -> tuple[NetworkCounts, ...]:
    """The five columns of Table 3, by formula."""
    return (
        count_ft2(RADIX),
        count_mpft(RADIX),
        count_ft3(RADIX),
        count_slim_fly(SLIM_FLY_Q),
        count_dragonfly(**DRAGONFLY),
    )


def fit_prices(columns: Sequence[PublishedNetwork] = PUBLISHED) -> UnitPrices:
    """The prices that explain the published costs best: about $84,100 a switch, $437 a link.

    The worst column, Dragonfly, is then 1.3 % off.
    """
    costs = np.array([column.cost_million_dollars * 1e6 for column in columns])
    counts = np.array([(column.switches, column.links) for column in columns], dtype=np.float64)
    relative = counts / costs[:, None]
    (switch, link), *_ = np.linalg.lstsq(relative, np.ones(len(columns)))
    errors = relative @ np.array([switch, link]) - 1
    return UnitPrices(
        switch_dollars=float(switch),
        link_dollars=float(link),
        worst_relative_error=float(np.abs(errors).max()),
    )
