"""The router against the oracle; what the bias may and may not do; FP32 whatever the dtype."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.model.router import (
    Router,
    Routing,
    SelectionBias,
    load_statistics,
    select_experts,
)
from tests.model.weights import model_config
from tests.oracle import router as oracle
from tests.oracle import tape
from tests.oracle.cases import tiny_config
from tests.programs import quick_jit
from tests.tolerances import FLOAT32_GRADIENTS_OP, FLOAT32_OP, assert_close

SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 16.0}
CASES = {
    "v3": tiny_config(),
    "one group": tiny_config(n_group=1, topk_group=1, num_experts_per_tok=5),
    "eight groups": tiny_config(
        n_routed_experts=24, n_group=8, topk_group=3, num_experts_per_tok=9
    ),
    "all groups kept": tiny_config(topk_group=4, num_experts_per_tok=8),
    "v2": tiny_config(**SOFTMAX, topk_method="group_limited_greedy", num_experts_per_tok=3),
    "v2 lite": tiny_config(**SOFTMAX, topk_method="greedy", n_group=1, topk_group=1),
    "unnormalised": tiny_config(norm_topk_prob=False),
}


def build(config, dtype=jnp.float32, seed=0, bias_std=0.3):
    """A router with random weights, and the oracle's view of the very same numbers."""
    random = np.random.default_rng(seed)
    experts = config["n_routed_experts"]
    router = Router(model_config(config), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    router.weight[...] = jnp.asarray(random.standard_normal((experts, 12)), dtype)
    weights = {"r.gate.weight": np.asarray(router.weight[...], np.float64)}
    if config["topk_method"] == "noaux_tc":
        bias = jnp.asarray(bias_std * random.standard_normal(experts), jnp.float32)
        router.e_score_correction_bias[...] = bias
        weights["r.gate.e_score_correction_bias"] = np.asarray(bias, np.float64)
    x = jnp.asarray(random.standard_normal((1, 200, 12)), dtype)
    return router, weights, x


def routed_by_the_oracle(config, weights, x):
    scores = oracle.affinities(config, weights, "r", np.asarray(x, np.float64))
    bias = weights.get("r.gate.e_score_correction_bias")
    experts = oracle.choose(config, scores.value, bias)
    combined = oracle.combine_weights(config, scores, experts)
    return experts[0], combined.value[0], scores.value[0]


@quick_jit
def route(router, x):
    return router(x)


@pytest.mark.parametrize("name", CASES)
def test_choice_weights_and_scores_equal_the_oracle(name):
    config = CASES[name]
    router, weights, x = build(config)
    found = route(router, x[0])
    experts, combined, scores = routed_by_the_oracle(config, weights, x)
    np.testing.assert_array_equal(found.experts, experts)
    assert_close(found.weights, combined, FLOAT32_OP)
    assert_close(found.scores, scores, FLOAT32_OP)
    kept = np.unique(experts // (config["n_routed_experts"] // config["n_group"]), axis=-1)
    assert kept.min() >= 0 and len(np.unique(experts)) == config["n_routed_experts"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_model_routes_in_float32(dtype):
    """Bit-equal choices, and weights that a half-precision product could not give."""
    config = CASES["eight groups"]
    router, weights, x = build(config, dtype)
    found = route(router, x[0])
    experts, combined, scores = routed_by_the_oracle(config, weights, x)
    assert found.scores.dtype == found.weights.dtype == jnp.float32
    assert router.e_score_correction_bias[...].dtype == jnp.float32
    np.testing.assert_array_equal(found.experts, experts)
    assert_close(found.weights, combined, FLOAT32_OP)
    assert_close(found.scores, scores, FLOAT32_OP)
    product = (x[0] @ router.weight[...].T).astype(jnp.float32)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(jax.nn.sigmoid(product), scores, FLOAT32_OP)


def test_the_bias_decides_the_choice_and_never_the_weight():
    """Experts 6 and 7 lifted above all others win everywhere, with their plain scores."""
    config = tiny_config(num_experts_per_tok=2)
    router, weights, x = build(config)
    before = route(router, x[0])
    assert not np.all(np.sort(before.experts) == [6, 7])
    router.e_score_correction_bias[...] = jnp.asarray([0.0] * 6 + [50.0, 50.0])
    after = route(router, x[0])
    np.testing.assert_array_equal(np.sort(after.experts), np.tile([6, 7], (200, 1)))
    np.testing.assert_array_equal(after.scores, before.scores)
    logits = np.asarray(x[0], np.float64) @ weights["r.gate.weight"].T
    scores = 1 / (1 + np.exp(-logits))
    chosen = np.take_along_axis(scores, np.asarray(after.experts), axis=-1)
    assert_close(after.weights, 2.5 * chosen / chosen.sum(axis=-1, keepdims=True), FLOAT32_OP)


def test_groups_out_of_the_race_lose_even_where_every_biased_score_is_negative():
    """Masked with 0.0, as transformers 4 did, an expert of a masked group would win."""
    config = tiny_config()
    router, weights, x = build(config)
    bias = router.e_score_correction_bias[...] - 10
    router.e_score_correction_bias[...] = bias
    weights["r.gate.e_score_correction_bias"] = np.asarray(bias, np.float64)
    found = np.asarray(route(router, x[0]).experts)
    experts, _, scores = routed_by_the_oracle(config, weights, x)
    np.testing.assert_array_equal(found, experts)
    choice = scores + np.asarray(bias, np.float64)
    assert choice.max() < 0
    pairs = np.sort(choice.reshape(200, 4, 2), axis=-1).sum(axis=-1)
    kept = np.argsort(-pairs, axis=-1)[:, :2]
    assert all(set(row // 2) <= set(groups) for row, groups in zip(found, kept, strict=True))


def test_no_gradient_reaches_the_bias():
    config = tiny_config()
    router, _, x = build(config)
    graph, weight, bias = nnx.split(router, nnx.Param, SelectionBias)
    factors = jnp.asarray(np.random.default_rng(1).standard_normal((200, 2)), jnp.float32)

    def value(weight, bias):
        routing = nnx.merge(graph, weight, bias)(x[0])
        return jnp.sum(routing.weights * factors) + jnp.sum(routing.scores**2)

    of_weight, of_bias = quick_jit(jax.grad(value, argnums=(0, 1)))(weight, bias)
    assert float(jnp.abs(of_weight["weight"][...]).max()) > 1e-2
    np.testing.assert_array_equal(of_bias["e_score_correction_bias"][...], 0)


GROUPED = model_config(tiny_config(n_routed_experts=12, n_group=4, num_experts_per_tok=4))
select = quick_jit(select_experts, static_argnames="config")


@settings(max_examples=200)
@given(
    choice=st.lists(st.lists(st.integers(-3, 3), min_size=12, max_size=12), min_size=5, max_size=5),
    method=st.sampled_from(["noaux_tc", "group_limited_greedy", "greedy"]),
)
def test_selection_equals_the_oracle_with_ties_too(choice, method):
    """Small integers tie often: the lower index wins, among experts and among groups."""
    config = dataclasses.replace(GROUPED, topk_method=method)
    fields = dict(topk_method=method, n_group=4, topk_group=2, num_experts_per_tok=4)
    values = np.array(choice, np.float64)
    expected = oracle.choose(fields, values, np.zeros(12))
    np.testing.assert_array_equal(select(jnp.asarray(values, "f4"), config=config), expected)


def statistics_inputs(rows=3, seq=10):
    config = tiny_config()
    random = np.random.default_rng(4)
    scores = random.uniform(0.01, 1, (rows, seq, 8)).astype(np.float32)
    experts = np.argsort(random.standard_normal((rows, seq, 8)), axis=-1)[..., :2]
    routing = Routing(
        jnp.asarray(experts.reshape(-1, 2)),
        jnp.ones((rows * seq, 2)),
        jnp.asarray(scores.reshape(-1, 8)),
    )
    return config, experts, scores, routing


@pytest.mark.parametrize("valid", [10, 7])
def test_load_and_balance_loss_of_the_valid_positions(valid):
    config, experts, scores, routing = statistics_inputs()
    found = load_statistics(routing, 3, valid, config=model_config(config))
    np.testing.assert_array_equal(found.load, np.bincount(experts[:, :valid].ravel(), minlength=8))
    expected = oracle.balance_loss(config, tape.as_tensor(scores[:, :valid].astype(np.float64)))
    assert float(found.balance_loss) == pytest.approx(float(expected.value), rel=1e-6)


def test_balance_loss_of_known_scores():
    """One where all scores are equal; E/K where the same K experts take everything."""
    config = model_config(tiny_config())
    uniform = Routing(jnp.zeros((6, 2), jnp.int32), jnp.ones((6, 2)), jnp.full((6, 8), 0.3))
    assert float(load_statistics(uniform, 2, 3, config=config).balance_loss) == pytest.approx(1)
    scores = jnp.tile(jnp.asarray([0.0, 0.5, 0, 0, 0.5, 0, 0, 0]), (6, 1))
    collapsed = uniform._replace(scores=scores)
    assert float(load_statistics(collapsed, 2, 3, config=config).balance_loss) == pytest.approx(4)


def test_gradient_of_the_balance_loss_flows_through_the_mean_scores_alone():
    config, _, scores, routing = statistics_inputs()
    found = jax.grad(
        lambda scores: (
            load_statistics(
                routing._replace(scores=scores), 3, 10, config=model_config(config)
            ).balance_loss
        )
    )(routing.scores)
    tensor = tape.parameter(scores.astype(np.float64))
    (expected,) = tape.gradients(oracle.balance_loss(config, tensor), [tensor])
    assert_close(found.reshape(3, 10, 8), expected, FLOAT32_GRADIENTS_OP)
