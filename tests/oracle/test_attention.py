"""Latent attention: its two forms against each other and against a loop over heads and keys."""

import numpy as np
import pytest

from . import rope, tape
from .attention import attention, rms_norm, visible
from .cases import V2_CHANGES, YARN, tiny_config
from .weights import random_weights

PREFIX = "model.layers.0.self_attn"
CONFIGS = {
    "v3": tiny_config(),
    "yarn": tiny_config(rope_scaling=YARN),
    "no query compression": tiny_config(**V2_CHANGES),
}


def attention_by_loops(config, weights, x):
    """One row x [S, hidden], one head, query and key at a time."""
    w = {name.split(".")[-2]: value for name, value in weights.items() if PREFIX in name}

    def norm(vector, scale):
        return vector / np.sqrt(np.mean(vector**2) + 1e-6) * scale

    rank, nope, dim = config["kv_lora_rank"], config["qk_nope_head_dim"], config["v_head_dim"]
    queries, keys, values = [], [], []
    for position, token in enumerate(x):
        if config["q_lora_rank"] is None:
            query = w["q_proj"] @ token
        else:
            query = w["q_b_proj"] @ norm(w["q_a_proj"] @ token, w["q_a_layernorm"])
        compressed = w["kv_a_proj_with_mqa"] @ token
        rotary = rope.rotate(config, compressed[None, None, rank:], position).value[0, 0]
        key_value = w["kv_b_proj"] @ norm(compressed[:rank], w["kv_a_layernorm"])
        for head, part in enumerate(query.reshape(config["num_attention_heads"], -1)):
            turned = rope.rotate(config, part[None, None, nope:], position).value[0, 0]
            queries.append((position, head, np.concatenate([part[:nope], turned])))
        for part in key_value.reshape(config["num_attention_heads"], -1):
            keys.append(np.concatenate([part[:nope], rotary]))
            values.append(part[nope:])
    heads = config["num_attention_heads"]
    result = np.zeros((len(x), heads * dim))
    for position, head, query in queries:
        seen = range(head, (position + 1) * heads, heads)
        scores = np.array([query @ keys[i] for i in seen]) * rope.softmax_scale(config)
        shares = np.exp(scores) / np.exp(scores).sum()
        mixed = sum(share * values[i] for share, i in zip(shares, seen, strict=True))
        result[position, head * dim : (head + 1) * dim] = mixed
    return result @ w["o_proj"].T


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_forms_equal_plain_loops(name, absorbed):
    config = CONFIGS[name]
    weights = random_weights(config, seed=1, std=0.4)
    x = np.random.default_rng(0).standard_normal((2, 6, config["hidden_size"]))
    found, _ = attention(config, weights, PREFIX, x, absorbed=absorbed)
    expected = [attention_by_loops(config, weights, row) for row in x]
    np.testing.assert_allclose(found.value, expected, rtol=1e-10, atol=1e-12)


def test_cache_holds_latents_and_one_rotary_key_a_token():
    config = tiny_config()
    weights = random_weights(config, seed=1)
    x = np.random.default_rng(0).standard_normal((2, 6, config["hidden_size"]))
    _, known = attention(config, weights, PREFIX, x)
    assert known.latent.shape == (2, 6, config["kv_lora_rank"])
    assert known.rope_key.shape == (2, 6, config["qk_rope_head_dim"])


@pytest.mark.parametrize("absorbed", [False, True])
def test_pieces_with_a_cache_equal_the_whole(absorbed):
    config = tiny_config(rope_scaling=YARN)
    weights = random_weights(config, seed=1, std=0.4)
    x = np.random.default_rng(0).standard_normal((2, 7, config["hidden_size"]))
    documents = np.array([[0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])
    whole, _ = attention(config, weights, PREFIX, x, documents=documents)
    pieces, known = [], None
    for start, end in ((0, 3), (3, 4), (4, 7)):
        piece, known = attention(
            config, weights, PREFIX, x[:, start:end], known, documents[:, :end], absorbed
        )
        pieces.append(piece.value)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole.value, atol=1e-12)


def test_visible_is_causal_and_keeps_to_the_document():
    documents = np.array([[5, 5, 9, 9]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(visible(documents, 4, 4)[0], np.array(expected, dtype=bool))
    np.testing.assert_array_equal(visible(documents, 1, 4)[0], [[False, False, True, True]])
    np.testing.assert_array_equal(visible(None, 2, 3)[0], [[True, True, False], [True] * 3])


def test_rms_norm_of_a_known_vector():
    found = rms_norm(tape.as_tensor([[3.0, 4.0]]), np.array([1.0, 2.0]), eps=0.0)
    np.testing.assert_allclose(found.value, [[3 / 12.5**0.5, 8 / 12.5**0.5]])
