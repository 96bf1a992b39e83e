"""Expert choice against a slow loop in plain Python, ties included; closed forms of the loss."""

import numpy as np
import pytest

from . import router, tape
from .cases import tiny_config


def choose_by_loops(config, scores, bias):
    """One token's experts, best first: sorted() and sums of Python floats only."""
    method, groups = config["topk_method"], config["n_group"]
    ranked = [float(s + b) for s, b in zip(scores, bias, strict=True)]
    if method != "noaux_tc":
        ranked = [float(s) for s in scores]
    candidates = list(range(len(ranked)))
    if method != "greedy":
        size = len(ranked) // groups
        members = [range(group * size, (group + 1) * size) for group in range(groups)]
        counted = 2 if method == "noaux_tc" else 1
        totals = [
            sum(sorted((ranked[expert] for expert in group), reverse=True)[:counted])
            for group in members
        ]
        kept = sorted(range(groups), key=lambda group: (-totals[group], group))
        kept = kept[: config["topk_group"]]
        candidates = [expert for group in kept for expert in members[group]]
    order = sorted(candidates, key=lambda expert: (-ranked[expert], expert))
    return order[: config["num_experts_per_tok"]]


@pytest.mark.parametrize("method", ["noaux_tc", "group_limited_greedy", "greedy"])
@pytest.mark.parametrize("steps", [None, 4], ids=["distinct", "many ties"])
@pytest.mark.parametrize("bias_std", [0.05, 3.0], ids=["small bias", "negative sums"])
def test_choice_equals_plain_loops(method, steps, bias_std):
    config = tiny_config(
        topk_method=method, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4
    )
    generator = np.random.default_rng(0)
    scores, bias = generator.uniform(size=(50, 2, 16)), bias_std * generator.standard_normal(16)
    if steps is not None:  # quarters: sums are exact, so equal values really tie
        scores, bias = np.round(scores * steps) / steps, np.round(bias * steps) / steps
    found = router.choose(config, scores, bias)
    for place in np.ndindex(50, 2):
        assert list(found[place]) == choose_by_loops(config, scores[place], bias)


def test_bias_chooses_but_does_not_weigh():
    config = tiny_config(n_routed_experts=4, n_group=1, topk_group=1)
    scores = np.array([[[0.5, 0.4, 0.3, 0.1]]])
    choices = router.choose(config, scores, np.array([0.0, 0.0, 0.0, 9.0]))
    np.testing.assert_array_equal(choices, [[[3, 0]]])
    weights = router.combine_weights(config, tape.as_tensor(scores), choices).value
    np.testing.assert_allclose(weights, [[[2.5 * 0.1 / 0.6, 2.5 * 0.5 / 0.6]]])


def test_unselected_groups_lose_even_to_negative_scores():
    """Masking with 0.0, as older transformers did, would pick expert 0 or 1 here."""
    config = tiny_config(n_routed_experts=4, n_group=2, topk_group=1)
    scores = np.array([[0.1, 0.1, 0.2, 0.2]])
    choices = router.choose(config, scores, np.array([-5.0, -5.0, -1.0, -1.1]))
    np.testing.assert_array_equal(choices, [[2, 3]])


def test_weights_are_scaled_scores_when_not_normalised():
    config = tiny_config(norm_topk_prob=False, routed_scaling_factor=16.0)
    scores = tape.as_tensor(np.full((1, 1, 8), 0.125))
    weights = router.combine_weights(config, scores, np.array([[[1, 5]]]))
    np.testing.assert_allclose(weights.value, [[[2.0, 2.0]]])


def test_softmax_affinities_add_up_to_one():
    config = tiny_config(scoring_func="softmax")
    generator = np.random.default_rng(0)
    weights = {"mlp.gate.weight": generator.standard_normal((8, 12))}
    scores = router.affinities(config, weights, "mlp", generator.standard_normal((2, 3, 12)))
    np.testing.assert_allclose(scores.value.sum(axis=-1), 1.0)


@pytest.mark.parametrize("level", [0.01, 0.5, 1.0])
def test_balance_loss_of_uniform_scores_is_one(level):
    """Ties all go to experts 0 and 1, so f = (4, 4, 0, ...) for E / K = 4; P = 1/8 everywhere."""
    scores = tape.as_tensor(np.full((3, 5, 8), level))
    assert router.balance_loss(tiny_config(), scores).value == pytest.approx(1.0)


def test_balance_loss_of_total_collapse_is_experts_over_active():
    """All affinity on the K chosen: sum f P = E / K."""
    scores = np.zeros((2, 5, 8))
    scores[..., [3, 6]] = 0.7
    found = router.balance_loss(tiny_config(), tape.as_tensor(scores)).value
    assert found == pytest.approx(4.0)


def test_balance_loss_equals_plain_loops():
    config = tiny_config(num_experts_per_tok=3)
    scores = np.random.default_rng(0).uniform(size=(2, 5, 8))
    rows = []
    for row in scores:
        loss = 0.0
        for expert in range(8):
            hits = sum(expert in sorted(range(8), key=lambda e: -token[e])[:3] for token in row)
            share = np.mean([token[expert] / token.sum() for token in row])
            loss += 8 / (3 * 5) * hits * share
        rows.append(loss)
    found = router.balance_loss(config, tape.as_tensor(scores)).value
    assert found == pytest.approx(np.mean(rows), rel=1e-13)


def test_balance_loss_pulls_down_the_share_of_frequent_experts():
    """d loss / d s' is f: with f constant, gradients follow P alone."""
    scores = tape.parameter(np.random.default_rng(0).uniform(size=(1, 4, 8)))
    loss = router.balance_loss(tiny_config(), scores)
    (found,) = tape.gradients(loss, [scores])
    best = router.best(scores.value, 2)
    frequency = np.bincount(best.ravel(), minlength=8) * 8 / (2 * 4)
    sums = scores.value.sum(axis=-1, keepdims=True)
    average = (scores.value * frequency).sum(axis=-1, keepdims=True) / sums
    np.testing.assert_allclose(found, (frequency - average) / sums / 4, rtol=1e-12)
