"""Transfers against loops over tokens, and against what a device sends elsewhere counted."""

from collections import Counter

import numpy as np
import pytest

from dsv3_jax.plan.links import group_traffic
from dsv3_jax.plan.network.gate import Gate
from dsv3_jax.plan.network.transfers import (
    Transfers,
    all_to_all,
    combine,
    count_tokens,
    dispatch,
    pipeline,
    ring_reduce,
    sample_counts,
)

GATE = Gate(n_routed_experts=64, num_experts_per_tok=4, n_group=2, topk_group=2)
EP, TOKENS = 16, 5


def routing(rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(64, 4, replace=False) for _ in range(rows)])


def as_counter(transfers: Transfers) -> Counter:
    found: Counter = Counter()
    columns = (transfers.source, transfers.target, transfers.size_bytes)
    for source, target, size in zip(*(column.tolist() for column in columns), strict=True):
        found[source, target] += size
    return found


def walk_tokens(experts: np.ndarray, first_gpu: int) -> Counter:
    """Copies between GPUs, token by token: once to each other node, from there to each GPU."""
    copies: Counter = Counter()
    for row, chosen in enumerate(experts.tolist()):
        sender = row // TOKENS
        for node in {expert // 4 // 8 for expert in chosen}:
            landing = 8 * node + sender % 8
            if landing // 8 != sender // 8:
                copies[first_gpu + sender, first_gpu + landing] += 1
            for gpu in {expert // 4 for expert in chosen if expert // 4 // 8 == node}:
                if gpu != landing:
                    copies[first_gpu + landing, first_gpu + gpu] += 1
    return copies


@pytest.mark.parametrize("shared", [True, False])
def test_dispatch_sends_each_token_once_to_a_node_and_once_to_a_gpu(shared):
    """Two groups, with one routing for both or one each."""
    experts = routing(EP * TOKENS * (1 if shared else 2))
    parts = [experts, experts] if shared else np.split(experts, 2)
    if shared:  # five tokens a GPU do not split over two groups of GPUs
        assert len(experts) % (2 * EP) != 0
    counts = count_tokens(experts, GATE, EP, groups=2)
    expected = walk_tokens(parts[0], 0) + walk_tokens(parts[1], EP)
    assert as_counter(dispatch(counts, 1.0)) == expected
    back = {(target, source): copies for (source, target), copies in expected.items()}
    assert as_counter(combine(counts, 1.0)) == back
    nodes = [{expert // 32 for expert in row} for part in parts for row in part.tolist()]
    assert counts.copies == pytest.approx(sum(map(len, nodes)) / (2 * EP))


def test_sampled_counts_are_possible_and_balanced():
    """Groups differ, but a token of each still touches as many nodes and GPUs as it may."""
    tokens, groups = 480, 3
    counts = sample_counts(GATE, tokens, EP, groups, np.random.default_rng(0))
    assert counts.to_node.shape == (groups, EP, 2) and counts.to_gpu.shape == (groups, EP, EP)
    assert counts.to_node.max() <= tokens
    assert (counts.to_node.sum(axis=2) >= tokens).all()
    assert (counts.to_gpu.sum(axis=2) <= 4 * tokens).all()
    assert (counts.to_gpu.reshape(groups, EP, 2, 8).sum(axis=3) >= counts.to_node).all()
    totals = counts.to_gpu.sum(axis=(1, 2))
    assert (totals == totals[0]).all()  # the same tokens, dealt anew
    assert (counts.to_gpu[0] != counts.to_gpu[1]).any()
    load = counts.to_gpu.sum(axis=1) / counts.to_gpu.sum(axis=1).mean()
    assert load.min() > 0.9 and load.max() < 1.1


def test_all_to_all_keeps_its_own_part():
    found = as_counter(all_to_all(16, 1600.0))
    assert len(found) == 16 * 15 and set(found.values()) == {100.0}


@pytest.mark.parametrize(("nodes", "local"), [(1, 8), (2, 8), (4, 1), (8, 2), (16, 8)])
def test_rings_send_what_a_reduce_scatter_is_counted_to(nodes, local):
    """As `plan.links` counts a group's reduce-scatter: over the network and over NVLink."""
    group = [8 * node + gpu for node in range(nodes) for gpu in range(local)]
    found = as_counter(ring_reduce([np.array(group)], 1e6))
    expected = group_traffic("reduce-scatter", 10**6, (tuple(group),), 8)
    for gpu in group:
        network = sum(size for (s, t), size in found.items() if s == gpu and s // 8 != t // 8)
        nvlink = sum(size for (s, t), size in found.items() if s == gpu and s // 8 == t // 8)
        assert network == pytest.approx(expected.network_bytes)
        assert nvlink == pytest.approx(expected.nvlink_bytes)


def test_pipeline_neighbours():
    found = as_counter(pipeline(48, 3, 7.0))
    forward = {(gpu, gpu + 16): 7.0 for gpu in range(32)}
    assert found == forward | {(b, a): size for (a, b), size in forward.items()}


def test_placement_moves_whole_nodes():
    moved = all_to_all(16, 16.0).on_nodes(np.array([5, 2]))
    assert set(moved.source.tolist()) == {*range(40, 48), *range(16, 24)}
    assert (moved.source % 8 == all_to_all(16, 16.0).source % 8).all()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="ep is 48, expected a divisor of n_routed_experts = 256"):
        sample_counts(Gate(), 8, 48, 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="experts is 79, expected a multiple of the 16 GPUs"):
        count_tokens(routing(79), GATE, EP, 1)
    with pytest.raises(ValueError, match=r"group is \[0, 1, 8\], expected groups with the same"):
        ring_reduce([np.array([0, 1, 8])], 1.0)
    with pytest.raises(ValueError, match="gpus is 2056, expected at most 2048 in an alltoall"):
        all_to_all(2056, 1.0)
    with pytest.raises(ValueError, match="stages is 5, expected a divisor of the 16 GPUs"):
        pipeline(16, 5, 1.0)
    with pytest.raises(ValueError, match="stages is 1, expected 2 to 16"):
        pipeline(16, 1, 1.0)
