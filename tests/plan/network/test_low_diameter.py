"""Slim Fly and Dragonfly against what is known of their graphs."""

import itertools

import numpy as np
import pytest

from dsv3_jax.plan.network.low_diameter import build_dragonfly, build_slim_fly, slim_fly_room
from dsv3_jax.plan.network.topology import diameter


def adjacency(topology) -> np.ndarray:
    matrix = np.zeros((topology.switches, topology.switches), dtype=int)
    np.add.at(matrix, (topology.links[:, 0], topology.links[:, 1]), 1)
    return matrix + matrix.T


def test_slim_fly_of_5_is_the_hoffman_singleton_graph():
    """The only graph of 50 vertices, degree 7 and A² + A = J + 6 I (a Moore graph)."""
    graph = build_slim_fly(slim_fly_room(5), q=5)
    matrix = adjacency(graph)
    assert matrix.shape == (50, 50)
    assert (matrix @ matrix + matrix == 1 + 6 * np.eye(50)).all()


@pytest.mark.parametrize(("q", "degree"), [(3, 5), (5, 7), (7, 11), (11, 17), (13, 19), (17, 25)])
def test_slim_fly(q, degree):
    """(3q - δ)/2 neighbours, none twice and none itself, everything within two hops."""
    graph = build_slim_fly(slim_fly_room(q), q=q)
    matrix = adjacency(graph)
    assert len(matrix) == 2 * q * q
    assert (matrix.sum(axis=0) == degree).all()
    assert matrix.max() == 1 and matrix.trace() == 0
    assert ((matrix @ matrix + matrix + np.eye(len(matrix))) > 0).all()
    assert np.bincount(graph.endpoint_switch).tolist() == [-(-degree // 2)] * (2 * q * q)


def test_the_smallest_slim_fly_with_room():
    assert build_slim_fly(2048).switches == 242  # q = 11 has room for 2,178, q = 7 for 588
    assert build_slim_fly(588).switches == 98
    assert build_slim_fly(589).switches == 242


@pytest.mark.parametrize("q", [4, 9, 15, 28])
def test_slim_fly_needs_a_prime(q):
    with pytest.raises(ValueError, match=f"q is {q}, expected an odd prime"):
        build_slim_fly(8, q=q)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_largest_dragonfly_has_one_link_between_any_two_groups(p):
    """Kim et al. §3.1: a = 2p = 2h, g = a h + 1, radix 4p - 1."""
    a, groups = 2 * p, 2 * p * p + 1
    graph = build_dragonfly(p * a * groups, p=p, groups=groups)
    matrix = adjacency(graph)
    assert (matrix.sum(axis=0) == (a - 1) + p).all()
    between = matrix.reshape(groups, a, groups, a).sum(axis=(1, 3))
    assert (between + (1 - a * (a - 1)) * np.eye(groups) == 1).all()
    assert diameter(graph) == 3
    assert np.bincount(graph.endpoint_switch).tolist() == [p] * (a * groups)


def test_fewer_groups_share_the_global_links():
    """p = 4 has 32 links a group; 5 groups meet 8 times each, or as near as can be."""
    graph = build_dragonfly(160, p=4)
    matrix = adjacency(graph).reshape(5, 8, 5, 8).sum(axis=(1, 3))
    assert [matrix[a, b] for a, b in itertools.combinations(range(5), 2)] == [8] * 10
    assert np.bincount(graph.links.ravel()).tolist() == [7 + 4] * 40


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="groups is 10, expected 2 to 9 where p is 2"):
        build_dragonfly(8, p=2, groups=10)
    with pytest.raises(ValueError, match="endpoints is 100, expected 1 to 72"):
        build_dragonfly(100, p=2, groups=9)
    with pytest.raises(ValueError, match="endpoints is 201, expected 1 to 200"):
        build_slim_fly(201, q=5)
