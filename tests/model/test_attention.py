"""Multi-head latent attention: both forms against the oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.rope import rotary
from tests.model.weights import build_transformer, model_config
from tests.oracle import attention as oracle
from tests.oracle import random_weights
from tests.oracle.cases import V2_CHANGES, YARN, tiny_config
from tests.programs import quick_jit
from tests.tolerances import FLOAT32_OP, assert_close

DENSE = {"num_hidden_layers": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
CASES = {
    "query latent": tiny_config(**DENSE, rope_scaling=YARN),
    "direct queries": tiny_config(**V2_CHANGES | DENSE),
}
PREFIX = "model.layers.0.self_attn"


def build(name, rows=2, seq=9):
    """The oracle's config and weights, the same layer of ours, and inputs [rows, seq, hidden]."""
    config = CASES[name]
    weights = random_weights(config, seed=3, std=0.3)
    model = build_transformer(model_config(config), weights)
    x = np.random.default_rng(0).standard_normal((rows, seq, 12)).astype(np.float32)
    return config, weights, model.layers("dense_layers")[0].self_attn, x


@quick_jit
def expanded(layer, x, documents):
    return layer(x, rotary(layer.config, jnp.arange(x.shape[1])[None]), documents)


@quick_jit
def absorbed(layer, x, positions, cache):
    return layer.decode(x, rotary(layer.config, positions), cache, positions)


@pytest.mark.parametrize("name", CASES)
def test_expanded_form_and_latents_equal_the_oracle(name):
    config, weights, layer, x = build(name)
    documents = np.array([[0] * 9, [3] * 4 + [5] * 5])
    for numbers in (None, documents):
        expected, cached = oracle.attention(config, weights, PREFIX, x, documents=numbers)
        given = None if numbers is None else jnp.asarray(numbers)
        found, latents = expanded(layer, jnp.asarray(x), given)
        assert_close(found, expected.value, FLOAT32_OP)
        rank = config["kv_lora_rank"]
        assert_close(latents[..., :rank], cached.latent.value, FLOAT32_OP)
        assert_close(latents[..., rank:], cached.rope_key.value, FLOAT32_OP)
    with pytest.raises(AssertionError, match="off by"):  # the documents did matter
        assert_close(expanded(layer, jnp.asarray(x), None)[0], expected.value, FLOAT32_OP)


@pytest.mark.parametrize("name", CASES)
def test_absorbed_form_equals_the_oracle_at_any_position(name):
    """Two queries a row, rows at different positions, what lies behind them in the cache wild."""
    config, weights, layer, x = build(name)
    expected, cached = oracle.attention(config, weights, PREFIX, x, absorbed=True)
    latents = np.concatenate([cached.latent.value, cached.rope_key.value], axis=-1)
    positions = np.array([[2, 3], [6, 7]])
    wild = np.arange(16)[:, None] > positions[:, 1, None, None]
    cache = np.where(wild, 1e3, np.pad(latents, ((0, 0), (0, 7), (0, 0))))
    rows = np.arange(2)[:, None]
    found = absorbed(
        layer, jnp.asarray(x[rows, positions]), jnp.asarray(positions), jnp.asarray(cache, "f4")
    )
    assert_close(found, expected.value[rows, positions], FLOAT32_OP)


def test_latent_norms_keep_their_own_eps():
    """Inputs so small that eps decides: 1e-6 for the latents, whatever rms_norm_eps says."""
    config, weights, layer, x = build("query latent")
    x = 1e-3 * x
    assert config["rms_norm_eps"] == 1e-5
    expected, cached = oracle.attention(config, weights, PREFIX, x)
    found, latents = expanded(layer, jnp.asarray(x), None)
    assert_close(found, expected.value, FLOAT32_OP)
    assert_close(latents[..., :5], cached.latent.value, FLOAT32_OP)
    assert np.abs(cached.latent.value).mean() < 0.7  # without eps the mean square would be one
