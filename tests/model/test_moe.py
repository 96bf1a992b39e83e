"""The MoE layer against the oracle's, its cost against accounting's, and with a user's router."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.accounting import expert_parameters
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.router import Routing
from tests.model.weights import build_transformer, model_config
from tests.oracle import random_weights
from tests.oracle.cases import tiny_config
from tests.oracle.model import moe, swiglu
from tests.programs import dot_flops, quick_jit
from tests.tolerances import FLOAT32_OP, assert_close

ONE_LAYER = {"num_hidden_layers": 1, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
PREFIX = "model.layers.0.mlp"


def build(**changes):
    """The oracle's config and weights, our layer of the same, and inputs."""
    config = tiny_config(**ONE_LAYER | changes)
    weights = random_weights(config, seed=3, std=0.3)
    layer = build_transformer(model_config(config), weights).layers("moe_layers")[0].mlp
    x = np.random.default_rng(0).standard_normal((2, 20, 12)).astype(np.float32)
    return config, weights, layer, x


@partial(quick_jit, static_argnames="valid")
def run(layer, x, valid=None):
    return layer(x, valid)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_output_and_load_equal_the_oracle(shared):
    config, weights, layer, x = build(n_shared_experts=shared)
    found, statistics = run(layer, jnp.asarray(x))
    expected, routing = moe(config, weights, PREFIX, x)
    assert_close(found, expected.value, FLOAT32_OP)
    np.testing.assert_array_equal(statistics.load, routing.load)
    expected_loss = float(routing.balance_loss.value)
    assert float(statistics.balance_loss) == pytest.approx(expected_loss, rel=1e-6)


def test_positions_without_a_target_are_computed_but_do_not_count():
    config, weights, layer, x = build()
    found, statistics = run(layer, jnp.asarray(x), valid=17)
    assert_close(found, moe(config, weights, PREFIX, x)[0].value, FLOAT32_OP)
    _, routing = moe(config, weights, PREFIX, x[:, :17])
    np.testing.assert_array_equal(statistics.load, routing.load)
    assert float(statistics.load.sum()) == 2 * 17 * config["num_experts_per_tok"]


def round_robin(x):
    """A router as a user may write one: token t to experts t and t + 1, weights 1/4 and 3/4."""
    tokens = jnp.arange(x.shape[0])
    experts = jnp.stack([tokens % 8, (tokens + 1) % 8], axis=-1)
    weights = jnp.tile(jnp.asarray([0.25, 0.75]), (x.shape[0], 1))
    return Routing(experts, weights, jnp.full((x.shape[0], 8), 0.5))


def test_a_function_may_take_the_place_of_the_router():
    _, weights, layer, x = build()
    layer.gate = nnx.static(round_robin)
    found, statistics = run(layer, jnp.asarray(x))
    np.testing.assert_array_equal(statistics.load, np.full(8, 10))
    assert float(statistics.balance_loss) == pytest.approx(1)
    rows = x.reshape(40, 12)
    expected = swiglu(weights, f"{PREFIX}.shared_experts", rows).value
    for token in range(40):
        for expert, weight in ((token % 8, 0.25), ((token + 1) % 8, 0.75)):
            y = swiglu(weights, f"{PREFIX}.experts.{expert}", rows[token : token + 1]).value
            expected[token] += weight * y[0]
    assert_close(found.reshape(40, 12), expected, FLOAT32_OP)


def test_forward_and_backward_cost_what_accounting_says():
    """bench_tiny's layer on its 2,048 tokens, load even: 1.11 times the active parameters' FLOPs.

    A product of every token with all 16 experts would be 3.3 times.
    """
    shape = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16}
    config = ModelConfig(**shape, num_experts_per_tok=4, n_group=4, topk_group=2)
    layer = nnx.eval_shape(lambda: MoE(config, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    graph, params, bias = nnx.split(layer, nnx.Param, ...)
    x = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)

    def value(params, x, bias):
        y, statistics = nnx.merge(graph, params, bias)(x)
        return jnp.sum(y) + statistics.balance_loss

    traced = jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(params, x, bias)
    active = 5 * expert_parameters(config) + 16 * 256
    expected = 6 * active * 8 * 256
    assert 1.0 <= dot_flops(traced, while_trips=0) / expected <= 1.13
