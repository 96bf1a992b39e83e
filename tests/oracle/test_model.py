"""The whole model: its forms against each other, and properties any DeepSeek-V3 must have."""

import numpy as np
import pytest

from . import tape
from .attention import rms_norm
from .cases import TWO_DEPTHS, V2_CHANGES, YARN, random_tokens, tiny_config
from .model import forward, forward_cached, greedy, moe, swiglu
from .weights import random_weights

CONFIGS = {
    "v3": tiny_config(),
    "yarn": tiny_config(rope_scaling=YARN),
    "v2": tiny_config(**V2_CHANGES),
    "two MTP depths": tiny_config(**TWO_DEPTHS),
}


def build(config, rows=2, length=9):
    return random_weights(config, seed=3, std=0.3), random_tokens(config, rows, length)


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_and_expanded_forms_agree(name):
    config = CONFIGS[name]
    weights, tokens = build(config)
    expanded = forward(config, weights, tokens)
    absorbed = forward(config, weights, tokens, absorbed=True)
    np.testing.assert_allclose(absorbed.logits, expanded.logits, atol=1e-12)
    for one, other in zip(absorbed.mtp_logits, expanded.mtp_logits, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", ["v3", "yarn", "v2"])
def test_latent_cache_in_pieces_equals_the_whole(name, absorbed):
    config = CONFIGS[name]
    weights, tokens = build(config)
    cache, pieces = None, []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        logits, cache = forward_cached(config, weights, tokens[:, start:end], cache, absorbed)
        pieces.append(logits)
    whole = forward(config, weights, tokens).logits
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=1e-12)


def test_a_later_token_changes_nothing_earlier():
    config = CONFIGS["two MTP depths"]
    weights, tokens = build(config)
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % config["vocab_size"]
    one, other = (forward(config, weights, batch) for batch in (tokens, changed))
    assert changed_positions(one.logits, other.logits) == [6, 7, 8]
    for depth in (1, 2):  # position i reads tokens up to i + depth
        first, second = one.mtp_logits[depth - 1], other.mtp_logits[depth - 1]
        assert changed_positions(first, second) == list(range(6 - depth, 9 - depth))


def changed_positions(one, other):
    """Where rows differ by more than rounding, which in BLAS varies with memory alignment."""
    assert one.shape == other.shape
    changed = np.max(np.abs(one - other), axis=-1) > 1e-12
    np.testing.assert_array_equal(changed, changed[:1].repeat(len(changed), axis=0))
    return np.flatnonzero(changed[0]).tolist()


def test_packed_documents_equal_documents_alone():
    config = CONFIGS["two MTP depths"] | {"rope_scaling": YARN}
    weights, tokens = build(config, rows=1, length=11)
    documents = np.array([[4] * 5 + [7] * 6])
    packed = forward(config, weights, tokens, documents)
    alone = [forward(config, weights, part) for part in (tokens[:, :5], tokens[:, 5:])]
    expected = np.concatenate([output.logits for output in alone], axis=1)
    np.testing.assert_allclose(packed.logits, expected, atol=1e-12)
    for depth in (1, 2):
        logits = packed.mtp_logits[depth - 1]
        first, second = (output.mtp_logits[depth - 1] for output in alone)
        np.testing.assert_allclose(logits[:, : 5 - depth], first, atol=1e-12)
        np.testing.assert_allclose(logits[:, 5:], second, atol=1e-12)


def test_copies_of_embedding_and_head_are_ignored():
    config = tiny_config()
    weights, tokens = build(config)
    noise = {
        "model.layers.2.embed_tokens.weight": np.full((23, 12), np.nan),
        "model.layers.2.shared_head.head.weight": np.full((23, 12), np.nan),
    }
    one, other = (forward(config, w, tokens) for w in (weights, weights | noise))
    np.testing.assert_allclose(one.mtp_logits[0], other.mtp_logits[0], atol=1e-12)


def test_mtp_module_takes_embedding_first_and_the_normed_hidden_state():
    """With attention and experts silenced the block is the identity, so depth 1 has a formula."""
    config = tiny_config()
    weights, tokens = build(config)
    for name in weights:
        if name.startswith("model.layers.2.") and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            weights[name] = np.zeros_like(weights[name])
    output = forward(config, weights, tokens)

    def norm(x, name):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weights[name]

    prefix = "model.layers.2"
    embedding, hidden = np.split(weights[f"{prefix}.eh_proj.weight"], 2, axis=1)
    following = weights["model.embed_tokens.weight"][tokens[:, 1:]]
    mixed = norm(following, f"{prefix}.enorm.weight") @ embedding.T
    mixed = mixed + norm(output.hidden[:, :-1], f"{prefix}.hnorm.weight") @ hidden.T
    expected = norm(mixed, f"{prefix}.shared_head.norm.weight") @ weights["lm_head.weight"].T
    np.testing.assert_allclose(output.mtp_logits[0], expected, atol=1e-12)


def test_logits_are_the_head_of_the_hidden_state():
    config = tiny_config()
    weights, tokens = build(config)
    output = forward(config, weights, tokens)
    assert output.hidden.shape == (2, 9, 12)
    np.testing.assert_allclose(output.logits, output.hidden @ weights["lm_head.weight"].T)


def test_moe_equals_a_loop_over_tokens():
    config = tiny_config(n_shared_experts=2)
    weights = random_weights(config, seed=3, std=0.3)
    prefix = "model.layers.1.mlp"
    x = np.random.default_rng(0).standard_normal((2, 5, 12))
    found, routing = moe(config, weights, prefix, x)
    for place in np.ndindex(2, 5):
        expected = swiglu(weights, f"{prefix}.shared_experts", x[place][None]).value[0]
        chosen = zip(routing.choices[place], routing.weights.value[place], strict=True)
        for expert, weight in chosen:
            name = f"{prefix}.experts.{expert}"
            expected = expected + weight * swiglu(weights, name, x[place][None]).value[0]
        np.testing.assert_allclose(found.value[place], expected, atol=1e-13)
    np.testing.assert_array_equal(routing.load, np.bincount(routing.choices.ravel(), minlength=8))


def test_swiglu_of_known_numbers():
    weights = {"m.gate_proj.weight": [[2.0]], "m.up_proj.weight": [[3.0]]}
    weights |= {"m.down_proj.weight": [[5.0]]}
    weights = {name: np.array(value) for name, value in weights.items()}
    expected = 5.0 * 3.0 * 2.0 / (1 + np.exp(-2.0))
    assert swiglu(weights, "m", np.ones((1, 1))).value[0, 0] == pytest.approx(expected)


def test_routing_covers_main_and_mtp_layers_and_drops_no_token():
    config = tiny_config(num_hidden_layers=3, num_nextn_predict_layers=2)
    weights, tokens = build(config)
    routing = forward(config, weights, tokens).routing
    assert sorted(routing) == [1, 2, 3, 4]
    assert [routing[layer].load.sum() for layer in (1, 2, 3, 4)] == [36, 36, 32, 28]
    assert routing[4].choices.shape == routing[4].weights.shape == (2, 7, 2)


def test_greedy_follows_the_logits():
    config = tiny_config()
    weights, _ = build(config)
    prompt = [3, 1, 4]
    found = greedy(config, weights, prompt, 5)
    text = prompt + found
    logits = forward(config, weights, np.array([text])).logits[0]
    assert found == [int(np.argmax(logits[i])) for i in range(2, 7)]
    assert len(set(found)) > 1


def test_a_row_too_short_for_a_depth_is_refused():
    config = CONFIGS["two MTP depths"]
    weights, tokens = build(config, length=2)
    with pytest.raises(ValueError, match="depth 2"):
        forward(config, weights, tokens)
    assert forward(config, weights, tokens, mtp=False).mtp_logits == ()


def test_norm_eps_of_the_config_reaches_block_norms_only():
    """A huge rms_norm_eps shrinks block norms; the latents' own norms keep 1e-6."""
    config = tiny_config(num_nextn_predict_layers=0)
    weights, tokens = build(config)
    plain, damped = (
        forward(config | {"rms_norm_eps": eps}, weights, tokens).hidden for eps in (1e-6, 1e6)
    )
    assert np.abs(damped).max() < 0.01 < np.abs(plain).max()
    x = tape.as_tensor(np.full((1, 4), 1e-3))
    assert rms_norm(x, np.ones(4), 1e-6).value[0, 0] == pytest.approx(0.5**0.5)
