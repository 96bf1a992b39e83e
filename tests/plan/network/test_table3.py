"""Table 3 of "Insights into DeepSeek-V3": by formula, by building, and its prices."""

import itertools

import numpy as np
import pytest

from dsv3_jax.plan.network.fat_tree import build_ft2, build_ft3, build_mpft, build_mrft
from dsv3_jax.plan.network.low_diameter import build_dragonfly, build_slim_fly, slim_fly_room
from dsv3_jax.plan.network.table3 import (
    PUBLISHED,
    count_dragonfly,
    count_ft2,
    count_ft3,
    count_mpft,
    count_slim_fly,
    count_topology,
    fit_prices,
    table3_counts,
)


def test_formulas_give_the_table():
    for ours, paper in zip(table3_counts(), PUBLISHED, strict=True):
        assert (ours.name, ours.endpoints) == (paper.name, paper.endpoints)
        assert (ours.switches, ours.links) == (paper.switches, paper.links)


@pytest.mark.parametrize(
    ("column", "build"),
    [
        ("FT2", lambda n: build_ft2(n)),
        ("MPFT", lambda n: build_mpft(n)),
        ("FT3", lambda n: build_ft3(n)),
        ("DF", lambda n: build_dragonfly(n, p=16, groups=511)),
    ],
)
def test_full_networks_have_the_table_s_counts(column, build):
    paper = next(network for network in PUBLISHED if network.name == column)
    built = count_topology(build(paper.endpoints))
    assert (built.switches, built.links) == (paper.switches, paper.links)


@pytest.mark.parametrize("radix", [4, 8, 12])
def test_formulas_are_those_of_the_graphs(radix):
    assert count_topology(build_ft2(radix**2 // 2, radix)) == count_ft2(radix)
    assert count_topology(build_ft3(radix**3 // 4, radix)) == count_ft3(radix)
    assert count_topology(build_mpft(4 * radix**2, radix)) == count_mpft(radix)
    rails = count_topology(build_mrft(8 * 8 * 8 * 2, 16))  # a full three-layer tree of radix 16
    assert (rails.switches, rails.links) == (count_ft3(16).switches, count_ft3(16).links)


def test_formulas_of_low_diameter_networks():
    for q in (3, 5, 7, 11):
        assert count_topology(build_slim_fly(slim_fly_room(q), q=q)) == count_slim_fly(q)
    for p, groups in ((1, 3), (2, 9), (3, 19)):
        size = {"p": p, "a": 2 * p, "h": p, "groups": groups}
        full = build_dragonfly(2 * p * p * groups, p=p, groups=groups)
        assert count_topology(full) == count_dragonfly(**size)


def test_prices_explain_the_costs():
    """Within 2 % everywhere, as the facts' own arithmetic found; each end-point's cost too."""
    prices = fit_prices()
    assert prices.worst_relative_error < 0.02
    assert prices.switch_dollars == pytest.approx(83_500, rel=0.01)
    assert 430 < prices.link_dollars < 500
    for paper in PUBLISHED:
        cost = prices.cost_dollars(paper)
        assert cost / paper.endpoints / 1e3 == pytest.approx(
            paper.thousand_dollars_per_endpoint, rel=0.02
        )


def test_no_prices_near_them_fit_better():
    prices = fit_prices()

    def misfit(switch: float, link: float) -> float:
        costs = [switch * n.switches + link * n.links for n in PUBLISHED]
        paper = [n.cost_million_dollars * 1e6 for n in PUBLISHED]
        return float(sum((c / p - 1) ** 2 for c, p in zip(costs, paper, strict=True)))

    best = misfit(prices.switch_dollars, prices.link_dollars)
    for a, b in itertools.product(np.linspace(0.98, 1.02, 9), repeat=2):
        assert misfit(a * prices.switch_dollars, b * prices.link_dollars) >= best
