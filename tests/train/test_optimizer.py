"""AdamW, moments in BF16, clipping, and which tensors decay: against the oracle and by hand."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import OptimizerConfig, RunConfig
from dsv3_jax.train.optimizer import (
    Moments,
    adamw_update,
    clip_factor,
    gradient_norm,
    init_moments,
)
from dsv3_jax.train.state import is_stacked, split_model
from tests import oracle
from tests.oracle.cases import tiny_config
from tests.train.models import hub_tensors, model_config, model_of

FIELDS = tiny_config()
CONFIG = RunConfig(model=model_config(FIELDS, max_position_embeddings=4096))


def params_like(seed: int, **stds) -> nnx.State:
    """A tree of parameters with random values; a gradient, say."""
    tensors = oracle.random_weights(FIELDS, seed, **stds)
    return split_model(model_of(CONFIG, tensors))[1]


def named(tree: nnx.State) -> dict[str, np.ndarray]:
    return hub_tensors(CONFIG.model, tree)


def run_updates(config: OptimizerConfig, params, gradients: list, learning_rate=0.01):
    """Parameters and moments after one step with each gradient."""

    @jax.jit
    def update(params, moments, gradient, step):
        return adamw_update(
            config,
            params,
            moments,
            gradient,
            step=step,
            learning_rate=jnp.float32(learning_rate),
        )

    moments = init_moments(config, params)
    for step, gradient in enumerate(gradients, start=1):
        params, moments = update(params, moments, gradient, jnp.int32(step))
    return params, moments


def test_several_steps_equal_the_oracles():
    """Gradients of very different sizes, one expert's zero, an epsilon that shows."""
    gradients = [params_like(seed, std=0.1**seed, gate_std=1e-3) for seed in (1, 2, 3)]
    gradients[1] = jax.tree.map(jnp.zeros_like, gradients[1])
    params = params_like(0)
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3)
    found, moments = run_updates(config, params, gradients)
    weights, state = named(params), oracle.start_adamw(named(params))
    for gradient in gradients:
        weights, state, _ = oracle.adamw_step(
            weights,
            named(gradient),
            state,
            learning_rate=0.01,
            beta1=0.8,
            beta2=0.9,
            eps=1e-3,
            weight_decay=0.3,
            clip_norm=None,
        )
    for tree, expected in ((found, weights), (moments.first, state.first)):
        for name, value in named(tree).items():
            np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=1e-8, err_msg=name)
    for name, value in named(moments.second).items():
        np.testing.assert_allclose(value, state.second[name], rtol=2e-6, atol=1e-12, err_msg=name)


def test_moments_in_bfloat16_are_rounded_between_steps_only():
    """By hand: float32 arithmetic on moments that were stored in BF16; weights stay in float32."""
    config = OptimizerConfig(moment_dtype="bfloat16")
    params = params_like(0)
    gradients = [params_like(seed) for seed in (1, 2, 3)]
    found, moments = run_updates(config, params, gradients)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}

    trees = (found, moments.first, moments.second)
    found, found_first, found_second = (named(tree) for tree in trees)
    gradients = [named(gradient) for gradient in gradients]
    for name, weight in named(params).items():
        first = second = np.zeros(weight.shape)
        decay = 0.1 if weight.ndim > 1 else 0.0
        for step, gradient in enumerate((g[name] for g in gradients), start=1):
            m = 0.9 * first + 0.1 * gradient
            v = 0.95 * second + 0.05 * gradient**2
            direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
            weight = weight - 0.01 * (direction + decay * weight)
            first, second = (stored_in_bfloat16(moment) for moment in (m, v))
        np.testing.assert_allclose(found[name], weight, rtol=1e-5, atol=1e-6, err_msg=name)
        for moment, expected in ((found_first[name], first), (found_second[name], second)):
            # A float32 sum may fall on the other side of a rounding border than the float64 one.
            np.testing.assert_allclose(moment, expected, rtol=2**-7, atol=1e-12)
            assert np.mean(moment == expected) > 0.9


def stored_in_bfloat16(moment: np.ndarray) -> np.ndarray:
    return moment.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_every_matrix_decays_and_no_norm():
    params = params_like(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(weight_decay=0.5)
    found, _ = run_updates(config, params, [zeros], learning_rate=0.5)
    before, after = named(params), named(found)
    assert len(before) == len(oracle.weight_shapes(FIELDS)) - 2  # all but two selection biases
    for name, weight in before.items():
        expected = weight * 0.75 if weight.ndim > 1 else weight
        np.testing.assert_array_equal(after[name], expected.astype(np.float32), err_msg=name)


def test_the_first_step_is_the_learning_rate_whatever_the_gradient():
    params = params_like(0)
    tiny = jax.tree.map(lambda p: jnp.full(p.shape, -1e-3, p.dtype), params)
    config = OptimizerConfig(weight_decay=0.0)
    found, _ = run_updates(config, params, [tiny], learning_rate=0.5)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(after - before, 0.5, rtol=1e-4)


def test_norms_of_the_whole_and_of_every_layer():
    fields = tiny_config(num_hidden_layers=4, num_nextn_predict_layers=2)
    config = RunConfig(model=model_config(fields, max_position_embeddings=4096))
    tensors = oracle.random_weights(fields, seed=5)
    gradients = split_model(model_of(config, tensors))[1]
    norm = gradient_norm(gradients, is_stacked(gradients))
    names = [name for name in tensors if not name.endswith("e_score_correction_bias")]
    expected = np.sqrt(sum(np.sum(tensors[name] ** 2) for name in names))
    assert float(norm.total) == pytest.approx(expected, rel=1e-6)
    assert norm.squares["lm_head"]["weight"][...].shape == ()
    norm_of = lambda name: np.sum(tensors[name] ** 2)  # noqa: E731
    np.testing.assert_allclose(
        norm.squares["moe_layers"]["self_attn"]["o_proj"]["weight"][...],
        [norm_of(f"model.layers.{layer}.self_attn.o_proj.weight") for layer in (1, 2, 3)],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        norm.squares["mtp"]["enorm"]["weight"][...],
        [norm_of(f"model.layers.{layer}.enorm.weight") for layer in (4, 5)],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    ("norm", "limit", "factor"),
    [(5.0, 1.0, 1 / 5.000001), (5.0, 10.0, 1.0), (0.0, 1.0, 1.0), (0.5, 0.25, 0.25 / 0.500001)],
)
def test_clipping_scales_to_the_limit_and_never_up(norm, limit, factor):
    assert float(clip_factor(jnp.float32(norm), limit)) == pytest.approx(factor, rel=1e-7)


def test_moments_begin_at_zero():
    params = params_like(0)
    for dtype in ("float32", "bfloat16"):
        moments = init_moments(OptimizerConfig(moment_dtype=dtype), params)
        assert isinstance(moments, Moments)
        for moment in moments:
            assert jax.tree.structure(moment) == jax.tree.structure(params)
            for leaf, param in zip(jax.tree.leaves(moment), jax.tree.leaves(params), strict=True):
                assert (leaf.shape, leaf.dtype) == (param.shape, jnp.dtype(dtype))
                assert not leaf.any()
