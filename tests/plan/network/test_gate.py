"""Drawn experts against a gate that scores all 256, and against combinatorics."""

import math

import numpy as np
import pytest

from dsv3_jax.plan.network.gate import Gate, gpus_touched, nodes_touched, sample_experts


def choose_slowly(gate: Gate, scores: np.ndarray) -> np.ndarray:
    """The gate as DeepSeek-V3's inference code states it, on all scores."""
    grouped = scores.reshape(len(scores), gate.n_group, -1)
    of_group = np.sort(grouped, axis=2)[:, :, -gate.scores_of_group :].sum(axis=2)
    kept = np.argsort(-of_group, axis=1)[:, : gate.topk_group]
    masked = np.full_like(grouped, -np.inf)
    rows = np.arange(len(scores))[:, None]
    masked[rows, kept] = grouped[rows, kept]
    return np.argsort(-masked.reshape(scores.shape), axis=1)[:, : gate.num_experts_per_tok]


@pytest.mark.parametrize(
    "gate",
    [
        Gate(),
        Gate(scores_of_group=1),
        Gate(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2),
    ],
    ids=["DeepSeek-V3", "the best expert of a group", "small"],
)
def test_draws_are_as_likely_as_those_of_all_scores(gate):
    """Shares of tokens by groups, by GPUs, and by most experts of a group: 5 standard errors."""
    tokens, rng = 10_000, np.random.default_rng(1)
    drawn = sample_experts(gate, tokens, rng)
    slow = choose_slowly(gate, rng.random((tokens, gate.n_routed_experts)))
    for count in (groups_of, gpus_of, fullest):
        ours, theirs = (
            np.bincount(count(experts, gate), minlength=9) / tokens for experts in (drawn, slow)
        )
        error = np.sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / tokens)
        assert (np.abs(ours - theirs) <= 5 * error).all()
        assert (ours < 1).all()  # there is something to compare


def groups_of(experts: np.ndarray, gate: Gate) -> np.ndarray:
    return 1 + (np.diff(np.sort(experts // gate.group_size, axis=1), axis=1) > 0).sum(axis=1)


def gpus_of(experts: np.ndarray, gate: Gate) -> np.ndarray:
    """Two GPUs a group in the small case, eight else."""
    gpus = 8 if gate.n_routed_experts == 16 else 64
    return gpus_touched(experts, gate.n_routed_experts, gpus).sum(axis=1)


def fullest(experts: np.ndarray, gate: Gate) -> np.ndarray:
    group = experts // gate.group_size
    return np.stack([(group == g).sum(axis=1) for g in range(gate.n_group)]).max(axis=0)


def test_experts_differ_and_stay_within_the_limit():
    experts = sample_experts(Gate(), 5_000, np.random.default_rng(0))
    assert experts.shape == (5_000, 8)
    assert (np.diff(np.sort(experts, axis=1), axis=1) > 0).all()
    groups = nodes_touched(gpus_touched(experts, 256, 64)).sum(axis=1)
    assert groups.max() == 4
    load = np.bincount(experts.ravel(), minlength=256) / (5_000 * 8 / 256)
    assert load.min() > 0.6 and load.max() < 1.4  # 156 a slot: 5 standard errors


def test_without_a_limit_every_choice_is_as_likely():
    """8 of 256 without groups touch 8 (1 - C(224,8)/C(256,8)) = 5.29 of 8 nodes."""
    experts = sample_experts(Gate(topk_group=8), 20_000, np.random.default_rng(2))
    touched = gpus_touched(experts, 256, 64)
    nodes = 8 * (1 - math.comb(224, 8) / math.comb(256, 8))
    gpus = 64 * (1 - math.comb(252, 8) / math.comb(256, 8))
    assert round(nodes, 2) == 5.29
    assert nodes_touched(touched).sum(axis=1).mean() == pytest.approx(nodes, rel=0.005)
    assert touched.sum(axis=1).mean() == pytest.approx(gpus, rel=0.005)


def test_touched_by_hand():
    experts = np.array([[0, 3, 4, 255], [32, 33, 34, 35]])
    touched = gpus_touched(experts, 256, 64)
    assert [np.flatnonzero(row).tolist() for row in touched] == [[0, 1, 63], [8]]
    assert [np.flatnonzero(row).tolist() for row in nodes_touched(touched)] == [[0, 7], [1]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_group": 7}, "n_group is 7, expected a divisor of n_routed_experts = 256"),
        ({"topk_group": 9}, "topk_group is 9, expected 1 to 8"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok is 129, expected 1 to 128"),
        ({"scores_of_group": 33}, "scores_of_group is 33, expected 1 to 32"),
        ({"n_routed_experts": 0}, "n_routed_experts is 0, expected at least 1"),
    ],
)
def test_a_gate_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        Gate(**fields)


def test_experts_out_of_range():
    with pytest.raises(ValueError, match="experts is 256, expected numbers from 0 to 255"):
        gpus_touched(np.array([[256]]), 256, 64)
    with pytest.raises(ValueError, match="experts is -1"):
        gpus_touched(np.array([[-1]]), 256, 64)
