"""Routed experts against a loop over experts in float64, for routings from even to adversarial."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.experts import (
    AfterSwiglu,
    Experts,
    LocalDispatcher,
    expert_products,
    swiglu,
)
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch_plan import choose_capacity, overflow_block, plan_dispatch
from dsv3_jax.quant.matmul import QuantisedProduct, SwigluProduct
from dsv3_jax.quant.recipe import RULES, make_recipe
from tests.kernels.test_target import mesh_of
from tests.oracle import tape
from tests.parallel.routings import KINDS, draw_routing
from tests.programs import dot_flops, quick_jit
from tests.tolerances import BFLOAT16_OP, FLOAT32_GRADIENTS_OP, FLOAT32_OP, assert_close
from tests.train.models import relative_error

TOP_K, EXPERTS, HIDDEN, WIDTH = 3, 8, 12, 6
TOKENS = [2, 20, 300]
"""Fewer pairs than experts; a slot for every pair; slots and overflow blocks."""


def build(dtype=jnp.float32, dispatcher=None):
    sizes = {"std": 0.4, "dtype": jnp.dtype(dtype), "rngs": nnx.Rngs(0)}
    return Experts(EXPERTS, HIDDEN, WIDTH, **sizes, dispatcher=dispatcher)


def draw_inputs(tokens, seed=0):
    """x, combine weights, and the cotangent of the output."""
    random = np.random.default_rng(seed)
    shapes = ((tokens, HIDDEN), (tokens, TOP_K), (tokens, HIDDEN))
    return [random.standard_normal(shape).astype(np.float32) for shape in shapes]


def run(module, x, weights, chosen):
    return module(x, Routing(chosen, weights, jnp.zeros((x.shape[0], EXPERTS))))


@quick_jit
def run_with_gradients(module, x, weights, chosen, cotangent):
    """The output, and the gradients of x, combine weights, gate_up_proj and down_proj."""
    graph, state = nnx.split(module)

    def forward(x, weights, state):
        return run(nnx.merge(graph, state), x, weights, chosen)

    out, pull_back = jax.vjp(forward, x, weights, state)
    d_x, d_weights, d_state = pull_back(cotangent)
    return out, (d_x, d_weights, d_state["gate_up_proj"][...], d_state["down_proj"][...])


def expert_by_expert(module, x, weights, chosen, cotangent):
    """The same on the oracle's tape: one expert after the other, on exactly its tokens."""
    arrays = (x, weights, module.gate_up_proj[...], module.down_proj[...])
    x, weights, gate_up, down = inputs = [
        tape.parameter(np.asarray(array, np.float64)) for array in arrays
    ]
    parts, rows_of_parts = [], []
    for expert in range(EXPERTS):
        rows, columns = np.nonzero(chosen == expert)
        if len(rows):
            gate = tape.matmul(x[rows], tape.transpose(gate_up[expert, 0]))
            up = tape.matmul(x[rows], tape.transpose(gate_up[expert, 1]))
            y = tape.matmul(gate * tape.sigmoid(gate) * up, tape.transpose(down[expert]))
            parts.append(y * tape.reshape(weights[rows, columns], (len(rows), 1)))
            rows_of_parts.append(rows)
    out = tape.scatter_add(tape.concatenate(parts), np.concatenate(rows_of_parts), len(x.value))
    return out.value, tape.gradients(tape.total(out * cotangent), inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_output_and_gradients_are_exact_for_any_routing(tokens, kind):
    module = build()
    x, weights, cotangent = draw_inputs(tokens)
    chosen = draw_routing(tokens, TOP_K, EXPERTS, kind, seed=1)
    given = (jnp.asarray(a) for a in (x, weights, chosen.astype(np.int32), cotangent))
    found, gradients = run_with_gradients(module, *given)
    expected, expected_gradients = expert_by_expert(module, x, weights, chosen, cotangent)
    assert_close(found, expected, FLOAT32_OP)
    names = ("x", "weights", "gate_up_proj", "down_proj")
    for name, one, other in zip(names, gradients, expected_gradients, strict=True):
        assert_close(one, other, FLOAT32_GRADIENTS_OP, name)
    unused = np.setdiff1d(np.arange(EXPERTS), chosen)
    np.testing.assert_array_equal(gradients[3][unused], 0)
    wrong = chosen.copy()
    wrong[-1] = np.roll(wrong[-1], 1)  # one token's weights go to each other's experts
    expected, _ = expert_by_expert(module, x, weights, wrong, cotangent)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(found, expected, FLOAT32_OP)


def test_gate_comes_before_up():
    gate, up = np.array([[1.0, -2.0]]), np.array([[3.0, 5.0]])
    expected = gate / (1 + np.exp(-gate)) * up
    found = swiglu(jnp.asarray(np.concatenate([gate, up], axis=-1), jnp.float32))
    assert_close(found, expected, FLOAT32_OP)


def test_bfloat16_stays_bfloat16():
    module = build(jnp.bfloat16)
    x, weights, _ = draw_inputs(300)
    chosen = draw_routing(300, TOP_K, EXPERTS, "same experts", seed=1)
    x = jnp.asarray(x, jnp.bfloat16)
    found = quick_jit(run)(module, x, jnp.asarray(weights), jnp.asarray(chosen, jnp.int32))
    assert found.dtype == jnp.bfloat16
    expected, _ = expert_by_expert(module, x, weights, chosen, np.zeros(x.shape))
    assert_close(found, expected, BFLOAT16_OP)


SWIGLU_INSIDE = {"published", "e5m2_gradients"}


@pytest.mark.parametrize("rules", RULES)
def test_in_fp8_swiglu_is_part_of_the_product_where_the_rule_allows_it(rules):
    down = expert_products(make_recipe("fp8", rules)).down
    rule = RULES[rules]["down_proj"]
    apart = AfterSwiglu(QuantisedProduct(rule))
    assert down == (SwigluProduct(rule) if rules in SWIGLU_INSIDE else apart)


@pytest.mark.parametrize("tokens", TOKENS)
def test_in_fp8_swiglu_as_part_of_the_product_is_the_one_before_it(tokens):
    """A value in ten thousand, in FP32 a last place away, may round to another of FP8."""
    products = expert_products(make_recipe("fp8"))
    apart = replace(products, down=AfterSwiglu(QuantisedProduct(RULES["published"]["down_proj"])))
    x, weights, cotangent = map(jnp.asarray, draw_inputs(tokens))
    chosen = jnp.asarray(draw_routing(tokens, TOP_K, EXPERTS, "same experts", 1), jnp.int32)
    inside, before, unquantised = (
        jax.tree.leaves(
            run_with_gradients(build(dispatcher=dispatcher), x, weights, chosen, cotangent)
        )
        for dispatcher in (LocalDispatcher(products), LocalDispatcher(apart), LocalDispatcher())
    )
    for found, expected, far in zip(inside, before, unquantised, strict=True):
        assert relative_error(found, expected) < 1e-3 < relative_error(far, expected)


@pytest.mark.parametrize(
    ("dtype", "gpu", "expected"),
    [("bfloat16", "NVIDIA H800", 4), ("float32", "NVIDIA H800", 0), ("bfloat16", "NVIDIA B200", 0)],
)
def test_on_hopper_bfloat16_products_are_of_filled_rows(dtype, gpu, expected):
    """Both products and both gradients of their inputs."""
    module = nnx.eval_shape(lambda: build(dtype))
    rows, top_k = jax.ShapeDtypeStruct((300, HIDDEN), dtype), (300, TOP_K)
    weights, chosen = (jax.ShapeDtypeStruct(top_k, kind) for kind in (dtype, "int32"))

    def value(module, x, weights, chosen):
        return jnp.sum(run(module, x, weights, chosen), dtype=jnp.float32)

    with jax.sharding.use_abstract_mesh(mesh_of(gpu)):
        traced = jax.make_jaxpr(jax.grad(value, argnums=(0, 1, 2)))(module, rows, weights, chosen)
    assert str(traced).count("name=masked_rows") == expected


def trips_of(chosen: np.ndarray, experts: int) -> int:
    """Overflow blocks of a routing, by counting."""
    tokens, top_k = chosen.shape
    capacity = choose_capacity(tokens, top_k, experts, tokens)
    over = np.maximum(np.bincount(chosen.ravel(), minlength=experts) - capacity, 0)
    return int(np.sum(-(-over // overflow_block(tokens))))


def test_products_are_those_of_the_chosen_pairs():
    """Forward and backward of 2,048 tokens, 4 of 16 experts each: all experts would cost 4 times.

    With the load even, 1.14 times the products of the pairs themselves; at the worst, with every
    token on the same 4 experts, 2.14 times (blocks compute their inner layer again in backward, and
    before XLA drops it their output too, 0.08 of this).
    """
    tokens, top_k, experts = 2048, 4, 16
    module = nnx.eval_shape(
        lambda: Experts(
            experts, HIDDEN, WIDTH, std=1.0, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)
        )
    )
    x, weights, chosen = (
        jax.ShapeDtypeStruct((tokens, width), dtype)
        for width, dtype in ((HIDDEN, "float32"), (top_k, "float32"), (top_k, "int32"))
    )

    def value(module, x, weights, chosen):
        scores = jnp.zeros((tokens, experts))
        return jnp.sum(module(x, Routing(chosen, weights, scores)))

    traced = jax.make_jaxpr(jax.grad(value, argnums=(0, 1, 2)))(module, x, weights, chosen)
    pairs = 3 * 2 * 3 * HIDDEN * WIDTH * tokens * top_k  # three products, three passes
    even = np.arange(tokens * top_k).reshape(tokens, top_k) % experts
    assert trips_of(even, experts) == 0
    assert 1.0 <= dot_flops(traced, trips_of(even, experts)) / pairs <= 1.15
    worst = np.tile(np.arange(top_k), (tokens, 1))
    assert 1.5 <= dot_flops(traced, trips_of(worst, experts)) / pairs <= 2.2
    plan = plan_dispatch(jnp.asarray(worst, jnp.int32), experts, choose_capacity(2048, 4, 16, 2048))
    assert int(plan.block_end[-1]) == trips_of(worst, experts) == 48
