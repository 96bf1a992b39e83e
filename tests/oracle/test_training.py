"""Losses by their formulas, gradients by central differences, the optimizer by hand."""

import math

import numpy as np
import pytest

from .cases import TWO_DEPTHS, V2_CHANGES, YARN, random_tokens, tiny_config
from .model import forward
from .training import (
    adamw_step,
    compute_losses,
    loss_and_gradients,
    start_adamw,
    update_selection_bias,
)
from .weights import random_weights

DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2], [5, 5, 5, 5, 5, 6, 6, 6]])
CASES = {
    "v3": (tiny_config(), None),
    "v3, yarn, documents": (tiny_config(rope_scaling=YARN), DOCUMENTS),
    "v2": (tiny_config(**V2_CHANGES), None),
    "two MTP depths, documents": (tiny_config(**TWO_DEPTHS), DOCUMENTS),
}


def build(config):
    return random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 8)


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_every_tensor_equal_central_differences(name):
    """Along one random direction a tensor; a balance weight of 0.5 so that its part is seen."""
    config, documents = CASES[name]
    weights, tokens = build(config)
    losses, gradients = loss_and_gradients(config, weights, tokens, 0.3, 0.5, documents)
    plain = compute_losses(config, weights, tokens, 0.3, 0.5, documents)
    assert losses.loss == plain.loss
    generator = np.random.default_rng(0)
    step = 1e-6
    for tensor, gradient in gradients.items():
        direction = generator.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = weights | {tensor: weights[tensor] + sign * step * direction}
            ends.append(compute_losses(config, moved, tokens, 0.3, 0.5, documents).loss)
        expected = (ends[0] - ends[1]) / (2 * step)
        found = np.sum(gradient * direction)
        assert found == pytest.approx(expected, rel=1e-6, abs=2e-9), tensor


def test_every_weight_but_the_bias_has_a_gradient_and_idle_experts_have_zero():
    config, _ = CASES["v3"]
    weights, tokens = build(config)
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][5] = -100.0
    losses, gradients = loss_and_gradients(config, weights, tokens, 0.3, 1e-4)
    biases = {name for name in weights if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2 and gradients.keys() == weights.keys() - biases
    assert losses.load_by_layer[1][5] == 0
    for name, gradient in gradients.items():
        assert gradient.shape == weights[name].shape
        if name.startswith("model.layers.1.mlp.experts.5."):
            assert not gradient.any()
    assert gradients["model.layers.1.mlp.gate.weight"][5].any()  # the balance loss reaches it


def test_losses_equal_their_definitions():
    config, _ = CASES["two MTP depths, documents"]
    weights, tokens = build(config)
    losses = compute_losses(config, weights, tokens, 0.3, 0.01)
    output = forward(config, weights, tokens[:, :-1])

    def log_probability(logits, row, position, token):
        return logits[row, position, token] - np.log(np.exp(logits[row, position]).sum())

    main = -np.mean(
        [log_probability(output.logits, b, i, tokens[b, i + 1]) for b in (0, 1) for i in range(7)]
    )
    depths = []
    for depth, logits in enumerate(output.mtp_logits, start=1):
        terms = [
            log_probability(logits, b, i, tokens[b, i + depth + 1])
            for b in (0, 1)
            for i in range(7 - depth)
        ]
        assert len(terms) == 2 * (7 - depth)
        depths.append(-sum(terms) / (2 * 7))
    balance = sum(routing.balance_loss for routing in output.routing.values())
    assert losses.main == pytest.approx(main, rel=1e-13)
    assert losses.mtp_by_depth == pytest.approx(depths, rel=1e-13)
    assert losses.mtp == pytest.approx(sum(depths) / 2, rel=1e-13)
    assert losses.balance == pytest.approx(balance, rel=1e-13)
    assert sorted(losses.balance_by_layer) == [0, 1, 2]
    expected = main + 0.3 * losses.mtp + 0.01 * balance
    assert losses.loss == pytest.approx(expected, rel=1e-13)


def test_uniform_logits_lose_the_logarithm_of_the_vocabulary():
    config, _ = CASES["v3"]
    weights, tokens = build(config)
    weights["lm_head.weight"] = np.zeros((23, 12))
    losses = compute_losses(config, weights, tokens, 0.3, 0.0)
    assert losses.main == pytest.approx(math.log(23))
    assert losses.mtp == pytest.approx(math.log(23) * 6 / 7)  # T - 1 terms, divided by T


def test_documents_drop_targets_across_borders():
    """Two documents in a row weigh like the two rows alone, by their number of targets."""
    config, _ = CASES["two MTP depths, documents"]
    weights, tokens = build(config)
    documents = np.array([[0] * 4 + [1] * 4])
    packed = compute_losses(config, weights, tokens[:1], 0.3, 0.0, documents)
    first, second = (
        compute_losses(config, weights, part, 0.3, 0.0) for part in (tokens[:1, :4], tokens[:1, 4:])
    )
    assert packed.main == pytest.approx((first.main + second.main) / 2, rel=1e-12)
    assert packed.mtp == pytest.approx((first.mtp + second.mtp) / 2, rel=1e-12)


def test_one_document_a_row_changes_nothing():
    config, _ = CASES["v3"]
    weights, tokens = build(config)
    plain = compute_losses(config, weights, tokens, 0.3, 0.1)
    same = compute_losses(config, weights, tokens, 0.3, 0.1, np.array([[1] * 8, [2] * 8]))
    assert same.loss == plain.loss


def test_first_adamw_step_moves_by_the_learning_rate():
    """With m and v corrected, step 1 is g / (|g| + eps) = sign(g); decay comes on top."""
    weights = {"matrix": np.array([[2.0, -4.0]]), "norm": np.array([1.0]), "bias": np.ones(1)}
    gradients = {"matrix": np.array([[0.3, -0.4]]), "norm": np.array([0.0])}
    updated, state, norm = adamw_step(
        weights, gradients, start_adamw(gradients), learning_rate=0.1, weight_decay=0.5
    )
    assert norm == pytest.approx(0.5) and state.step == 1
    expected = np.array([[2.0 - 0.1 - 0.1, -4.0 + 0.1 + 0.2]])
    np.testing.assert_allclose(updated["matrix"], expected, rtol=1e-7)
    np.testing.assert_array_equal(updated["norm"], [1.0])
    np.testing.assert_array_equal(updated["bias"], weights["bias"])


def test_adamw_over_several_steps_equals_scalar_arithmetic():
    weight, first, second = 0.7, 0.0, 0.0
    weights = {"w": np.full((1, 1), weight)}
    state = start_adamw(weights)
    for step, gradient in enumerate([0.5, -3.0, 0.01, 2.0], start=1):
        weights, state, _ = adamw_step(
            weights, {"w": np.full((1, 1), gradient)}, state, learning_rate=0.01, clip_norm=1.0
        )
        clipped = gradient * min(1.0, 1.0 / (abs(gradient) + 1e-6))
        first = 0.9 * first + 0.1 * clipped
        second = 0.95 * second + 0.05 * clipped**2
        weight -= 0.01 * 0.1 * weight  # PyTorch's order: decay first, then the step
        weight -= (
            0.01 / (1 - 0.9**step) * first / (math.sqrt(second) / math.sqrt(1 - 0.95**step) + 1e-8)
        )
        assert weights["w"][0, 0] == pytest.approx(weight, rel=1e-13)


def test_clipping_uses_the_norm_of_all_gradients_together():
    gradients = {"a": np.array([[3.0]]), "b": np.array([[4.0]])}
    weights = {"a": np.zeros((1, 1)), "b": np.zeros((1, 1))}
    _, state, norm = adamw_step(weights, gradients, start_adamw(weights), learning_rate=0.1)
    assert norm == 5.0
    np.testing.assert_allclose(state.first["a"], 0.1 * 3.0 / (5.0 + 1e-6))
    _, state, _ = adamw_step(
        weights, gradients, start_adamw(weights), learning_rate=0.1, clip_norm=None
    )
    np.testing.assert_allclose(state.first["b"], 0.1 * 4.0)


def test_selection_bias_moves_against_the_load():
    found = update_selection_bias(np.array([0.0, 0.5, -0.5, 0.1]), np.array([4, 0, 2, 2]), 0.001)
    np.testing.assert_allclose(found, [-0.001, 0.501, -0.5, 0.1])


def test_a_few_steps_learn_a_batch_and_even_out_the_load():
    """A whole training step, as a program would put it together."""
    config, _ = CASES["v3"]
    weights, tokens = build(config)
    state, history = None, []
    for _ in range(25):
        losses, gradients = loss_and_gradients(config, weights, tokens, 0.3, 1e-4)
        state = state or start_adamw(gradients)
        weights, state, _ = adamw_step(weights, gradients, state, learning_rate=0.03)
        for layer, load in losses.load_by_layer.items():
            name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
            weights[name] = update_selection_bias(weights[name], load, 0.02)
        history.append(losses)
    assert history[-1].main < 0.3 * history[0].main
    assert history[-1].mtp < 0.7 * history[0].mtp
    assert history[-1].load_by_layer[1].max() <= history[0].load_by_layer[1].max()
