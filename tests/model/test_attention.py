"""Multi-head latent attention: both forms against the oracle, the causal core against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.attention import QUERY_CHUNK, causal_attention
from dsv3_jax.model.rope import rotary
from tests.model.weights import build_transformer, model_config
from tests.oracle import attention as oracle
from tests.oracle import random_weights
from tests.oracle.cases import V2_CHANGES, YARN, tiny_config
from tests.programs import dot_flops, quick_jit
from tests.tolerances import BFLOAT16_OP, FLOAT32_OP, assert_close

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


def full_square(q, k, v, scale, documents):
    """softmax(scale q k^T) v with every score computed, in float64."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    seq = q.shape[2]
    visible = np.tri(seq, dtype=bool)[None, None]
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    scores = np.where(visible, scale * np.einsum("bhqd,bhkd->bhqk", q, k), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bhqk,bhkd->bhqd", weights, v)


def draw_qkv(seq, dtype=jnp.float32):
    random = np.random.default_rng(seq)
    shapes = ((2, 2, seq, 6), (2, 2, seq, 6), (2, 2, seq, 4))
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


core = quick_jit(causal_attention, static_argnums=3)


@pytest.mark.parametrize("seq", [1, QUERY_CHUNK, 3 * QUERY_CHUNK + 5, 9 * QUERY_CHUNK + 7])
def test_causal_attention_equals_the_full_square(seq):
    """One query, one chunk of queries, four chunks, and eight larger ones; the last is cut."""
    qkv = draw_qkv(seq)
    documents = np.sort(np.random.default_rng(0).integers(0, 4, (2, seq)), axis=-1)
    for numbers in (None, documents):
        found = core(*qkv, 0.7, None if numbers is None else jnp.asarray(numbers))
        assert_close(found, full_square(*qkv, 0.7, numbers), FLOAT32_OP)


def test_gradients_of_causal_attention_equal_differences():
    qkv = draw_qkv(130)
    random = np.random.default_rng(1)
    weight = random.standard_normal((2, 2, 130, 4))
    gradients = quick_jit(
        jax.grad(lambda qkv: jnp.sum(causal_attention(*qkv, 0.7, None) * jnp.asarray(weight, "f4")))
    )(qkv)
    directions = [random.standard_normal(a.shape) for a in qkv]
    step = 1e-6

    def at(sign):
        moved = [np.asarray(a) + sign * step * d for a, d in zip(qkv, directions, strict=True)]
        return np.sum(full_square(*moved, 0.7, None) * weight)

    slope = (at(1) - at(-1)) / (2 * step)
    found = sum(np.sum(np.asarray(g) * d) for g, d in zip(gradients, directions, strict=True))
    assert found == pytest.approx(slope, rel=1e-4)


def test_a_bfloat16_softmax_is_taken_in_float32():
    """Over 2,000 equal keys a bfloat16 sum of weights would stop growing at 256."""
    qkv = draw_qkv(40, jnp.bfloat16)
    found = core(*qkv, 0.7, None)
    assert found.dtype == jnp.bfloat16
    assert_close(found, full_square(*qkv, 0.7, None), BFLOAT16_OP)
    ones = jnp.ones((1, 1, 2000, 2), jnp.bfloat16)
    assert_close(core(ones, ones, ones, 1.0, None), np.ones((1, 1, 2000, 2)), BFLOAT16_OP)


def test_at_most_nine_sixteenths_of_a_long_square_are_computed():
    """n chunks of queries: (n + 1) / 2n of the square, and n stops at 8."""
    for chunks, share in ((1, 1.0), (2, 3 / 4), (4, 5 / 8), (8, 9 / 16), (32, 9 / 16)):
        seq = chunks * QUERY_CHUNK
        shapes = [jax.ShapeDtypeStruct((1, 3, seq, dim), jnp.float32) for dim in (8, 8, 4)]
        attend = partial(causal_attention, scale=1.0, documents=None)
        square = 2 * 3 * seq**2 * (8 + 4)
        assert dot_flops(jax.make_jaxpr(attend)(*shapes), while_trips=0) == share * square
