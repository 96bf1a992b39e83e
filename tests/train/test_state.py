"""What a state holds, and that nothing but parameters reaches the optimizer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import OptimizerConfig, RunConfig, TrainConfig
from dsv3_jax.model.accounting import count_parameters
from dsv3_jax.model.linear import BlockScale
from dsv3_jax.train.state import build_model, init_state, is_stacked, split_model
from tests import oracle
from tests.oracle.cases import TWO_DEPTHS, tiny_config
from tests.train.models import hub_tensors, model_config, model_of

FIELDS = tiny_config(**TWO_DEPTHS)
CONFIG = RunConfig(model=model_config(FIELDS, max_position_embeddings=4096))


@pytest.fixture(scope="module")
def model():
    return model_of(CONFIG, oracle.random_weights(FIELDS, seed=0))


def test_parameters_and_biases_are_apart_and_complete(model):
    _, params, bias = split_model(model)
    shapes = oracle.weight_shapes(FIELDS)
    is_bias = {name: name.endswith("e_score_correction_bias") for name in shapes}
    for tree, expected in ((params, False), (bias, True)):
        found = {name: t.shape for name, t in hub_tensors(CONFIG.model, tree).items()}
        assert found == {n: shape for n, shape in shapes.items() if is_bias[n] is expected}
    count = count_parameters(CONFIG.model)
    values = sum(leaf.size for leaf in jax.tree.leaves((params, bias)))
    assert values == count.total + count.mtp


def test_block_scales_of_a_checkpoint_are_left_behind(model):
    marked = nnx.clone(model)
    marked.lm_head.weight_scale_inv = BlockScale(jnp.ones((1, 1)))
    assert len(jax.tree.leaves(nnx.state(marked))) == len(jax.tree.leaves(nnx.state(model))) + 1
    _, *states = split_model(marked)
    _, *expected = split_model(model)
    assert jax.tree.structure(states) == jax.tree.structure(expected)


def test_split_and_merge_is_the_same_model(model):
    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    merged = nnx.merge(*split_model(model))
    np.testing.assert_array_equal(merged(tokens), model(tokens))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_state(model, dtype):
    _, params, bias = split_model(model)
    state = init_state(OptimizerConfig(moment_dtype=dtype), params, bias)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    assert state.params is params and state.selection_bias is bias
    assert {leaf.dtype for leaf in jax.tree.leaves(state.moments)} == {jnp.dtype(dtype)}
    sizes = [leaf.size for leaf in jax.tree.leaves(state.moments)]
    assert sum(sizes) == 2 * sum(leaf.size for leaf in jax.tree.leaves(params))
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.moments))


def test_stacked_tensors_have_the_layer_first():
    fields = tiny_config(num_hidden_layers=5, first_k_dense_replace=2, num_nextn_predict_layers=4)
    config = RunConfig(model=model_config(fields, max_position_embeddings=4096))
    abstract = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    _, params, _ = split_model(abstract)
    layers = {"dense_layers": 2, "moe_layers": 3, "mtp": 4}
    stacked = jax.tree.leaves_with_path(is_stacked(params))
    for (path, flag), leaf in zip(stacked, jax.tree.leaves(params), strict=True):
        name = path[0].key
        assert flag is (name in layers)
        assert name not in layers or leaf.shape[0] == layers[name]


def test_first_weights_depend_on_the_seed_alone():
    """Norms are 1, biases 0, everything else normal with the published deviation."""
    fields = tiny_config(first_k_dense_replace=0, num_nextn_predict_layers=0, q_lora_rank=None)
    model = model_config(fields, max_position_embeddings=4096, hidden_size=64)
    config = dataclasses.replace(CONFIG, model=model)
    build = jax.jit(lambda key: split_model(build_model(config, nnx.Rngs(key)))[1:])
    one, same, other = (hub_tensors(config.model, *build(jax.random.key(s))) for s in (0, 0, 1))
    drawn = []
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
        if value.ndim > 1:
            assert not np.array_equal(value, other[name]), name
            drawn.append(value.ravel())
        else:
            expected = 0 if name.endswith("e_score_correction_bias") else 1
            np.testing.assert_array_equal(value, np.full(value.shape, expected))
    drawn = np.concatenate(drawn)
    assert np.std(drawn) == pytest.approx(0.006, rel=0.02)
    assert np.mean(drawn) == pytest.approx(0.0, abs=1e-4)
    assert len(np.unique(drawn)) > 0.99 * len(drawn)  # no two layers or experts alike


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_how_it_is_computed_is_no_part_of_the_weights(model, remat, scan_layers):
    train = TrainConfig(remat=remat, scan_layers=scan_layers)
    config = dataclasses.replace(CONFIG, train=train)
    abstract = nnx.eval_shape(lambda: build_model(config, nnx.Rngs(0)))
    _, *expected = split_model(model)
    _, *found = split_model(abstract)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
