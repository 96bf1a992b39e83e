"""Groups in all of XLA's spellings, and the bytes that a collective sends over each link."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.plan.links import Traffic, group_traffic, pairs_traffic, parse_groups, parse_pairs


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("{{}}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # An axis of 8 as 4 x 2: its first 4 steps, then its last factor of 2.
        ("mesh['x'=8] {'x':(1)4}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['x'=8] {'x':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", ((0, 3), (1, 2))),
    ],
)
def test_groups(text, groups):
    assert parse_groups(text, 8) == groups


def test_pairs():
    assert parse_pairs("{{0,8},{8,0},{1,1}}") == ((0, 8), (8, 0), (1, 1))


def group_of(nodes: int, local: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(8 * node + gpu for node in range(nodes) for gpu in range(local)),)


@pytest.mark.parametrize(
    ("kind", "nodes", "local", "nvlink", "network"),
    [
        # 64 experts' GPUs on 8 nodes (DeepSeek-V3): 7/64 to the node's others, 56/64 elsewhere.
        ("all-to-all", 8, 8, 64 * 7 / 64, 64 * 56 / 64),
        ("all-to-all", 1, 8, 64 * 7 / 8, 0),  # the hop inside a node
        ("all-to-all", 8, 1, 0, 64 * 7 / 8),  # the hop between nodes
        ("ragged-all-to-all", 8, 1, 0, 64 * 7 / 8),
        ("all-gather", 1, 8, 64 * 7 / 8, 0),
        ("reduce-scatter", 4, 1, 0, 64 * 3 / 4),
        ("all-reduce", 1, 8, 2 * 64 * 7 / 8, 0),
        # A ring of 16: 15/16 of the bytes pass every GPU, an eighth of the steps leave the node.
        ("all-gather", 2, 8, 60 * 7 / 8, 60 / 8),
        ("all-reduce", 2, 8, 120 * 7 / 8, 120 / 8),
        ("all-reduce", 1, 1, 0, 0),
    ],
)
def test_bytes_of_a_group(kind, nodes, local, nvlink, network):
    assert group_traffic(kind, 64, group_of(nodes, local), 8) == Traffic(nvlink, network)


def test_the_group_that_crosses_nodes_counts():
    groups = ((0, 1, 2, 3), (6, 7, 8, 9))
    assert group_traffic("all-to-all", 4, groups, 8) == Traffic(1, 2)


def test_pairs_cross_nodes_if_one_does():
    assert pairs_traffic(10, ((0, 1), (7, 8)), 8) == Traffic(0, 10)
    assert pairs_traffic(10, ((0, 1), (1, 0)), 8) == Traffic(10, 0)
    assert pairs_traffic(10, ((0, 0), (9, 9)), 8) == Traffic(0, 0)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]))
def test_an_all_to_all_is_counted_pair_by_pair(nodes, local):
    (group,) = group_of(nodes, local)
    share = 1 / len(group)
    pairs = [(a, b) for a, b in itertools.permutations(group, 2) if a == group[0]]
    network = sum(share for a, b in pairs if a // 8 != b // 8)
    traffic = group_traffic("all-to-all", 1, (group,), 8)
    assert traffic.network_bytes == pytest.approx(network)
    assert traffic.total_bytes == pytest.approx(share * len(pairs))
