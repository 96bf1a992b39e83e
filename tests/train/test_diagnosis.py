"""The place that is named when a loss or gradient is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.train import diagnosis
from dsv3_jax.train.optimizer import gradient_norm
from dsv3_jax.train.state import is_stacked, split_model
from tests import oracle
from tests.oracle.cases import random_tokens, tiny_config
from tests.train.models import model_config, model_of

FIELDS = tiny_config(num_hidden_layers=3)  # layer 0 dense, 1 and 2 MoE, one MTP module
CONFIG = RunConfig(model=model_config(FIELDS, max_position_embeddings=4096))
TENSORS = oracle.random_weights(FIELDS, seed=0, std=0.3)
ROWS = jnp.asarray(random_tokens(FIELDS, 2, 7), jnp.int32)
GOOD = split_model(model_of(CONFIG, TENSORS))
SQUARES = gradient_norm(GOOD[1], is_stacked(GOOD[1])).squares


def first_non_finite(model, rows, squares):
    broken = np.asarray(diagnosis.broken_activations(model, rows))
    params = nnx.state(model, nnx.Param)
    return diagnosis.first_non_finite(model.config, params, broken, squares)


def changed(tree: nnx.State, name: str, index: tuple, value: float) -> nnx.State:
    """`tree` with one element set; `name` is dotted."""
    found = []

    def change(path, leaf):
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        found.append(".".join(keys))
        return leaf.at[index].set(value) if found[-1] == name else leaf

    result = jax.tree.map_with_path(change, tree)
    assert name in found
    return result


def model_with(*changes: tuple):
    graph, params, bias = GOOD
    for change in changes:
        params = changed(params, *change)
    return nnx.merge(graph, params, bias)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (("embed_tokens.weight", (0, 0), np.nan), "weight embed_tokens.weight"),
        (
            ("dense_layers.self_attn.o_proj.weight", (0, 1, 1), np.inf),
            "weight dense_layers[0].self_attn.o_proj.weight",
        ),
        (
            ("moe_layers.mlp.experts.down_proj", (1, 5, 0, 0), -np.inf),
            "weight moe_layers[1].mlp.experts.down_proj",
        ),
        (("mtp.eh_proj.weight", (0, 2, 2), np.nan), "weight mtp[0].eh_proj.weight"),
        (("lm_head.weight", (1, 1), np.nan), "weight lm_head.weight"),
    ],
)
def test_a_weight_is_named_with_its_layer(change, place):
    assert first_non_finite(model_with(change), ROWS, SQUARES) == place


def test_of_several_weights_the_first_to_be_used_is_named():
    model = model_with(
        ("lm_head.weight", (0, 0), np.nan),
        ("moe_layers.self_attn.kv_b_proj.weight", (1, 0, 0), np.nan),
        ("moe_layers.mlp.gate.weight", (0, 0, 0), np.nan),
    )
    assert first_non_finite(model, ROWS, SQUARES) == "weight moe_layers[0].mlp.gate.weight"


HUGE = 3e38


@pytest.mark.parametrize(
    ("name", "index", "place"),
    [
        ("dense_layers.mlp.gate_proj.weight", (0,), "layer 0"),
        ("moe_layers.mlp.shared_experts.up_proj.weight", (0,), "layer 1"),
        ("moe_layers.self_attn.kv_b_proj.weight", (1,), "layer 2"),
        ("lm_head.weight", (), "lm_head"),
    ],
)
def test_an_activation_is_named_by_its_layer(name, index, place):
    """Weights that are finite but so large that what they make is not."""
    model = model_with((name, (*index, ...), HUGE))
    assert first_non_finite(model, ROWS, SQUARES) == f"activations after {place}"


def test_an_mtp_module_is_named():
    model = model_with(("mtp.block.mlp.shared_experts.up_proj.weight", (0, ...), HUGE))
    place = first_non_finite(model, ROWS, SQUARES)
    assert place.startswith("activations after") and "mtp" in place


def test_an_activation_is_found_in_any_row():
    """One token, in the last row only, has the direction that a gate blows up."""
    embedding = np.array(TENSORS["model.embed_tokens.weight"])
    embedding[:, 0], embedding[22] = 0.0, 0.0
    embedding[22, 0] = 1.0
    tensors = TENSORS | {"model.embed_tokens.weight": embedding}
    tensors["model.layers.0.self_attn.o_proj.weight"] = np.zeros((12, 6))
    for projection in ("gate", "up"):
        name = f"model.layers.0.mlp.{projection}_proj.weight"
        tensors[name] = np.array(TENSORS[name])
        tensors[name][:, 0] = 1e25
    model = model_of(CONFIG, tensors)
    rows = jnp.where(ROWS == 22, 0, ROWS)
    assert not first_non_finite(model, rows, SQUARES).startswith("activations")
    rows = rows.at[1, 3].set(22)
    assert first_non_finite(model, rows, SQUARES) == "activations after layer 0"


def test_of_gradients_the_one_nearest_to_the_loss_is_named():
    model = model_with()
    squares = changed(SQUARES, "embed_tokens.weight", (), np.inf)
    assert first_non_finite(model, ROWS, squares) == "gradient of embed_tokens.weight"
    squares = changed(squares, "moe_layers.self_attn.o_proj.weight", (0,), np.nan)
    expected = "gradient of moe_layers[0].self_attn.o_proj.weight"
    assert first_non_finite(model, ROWS, squares) == expected
    squares = changed(squares, "moe_layers.input_layernorm.weight", (1,), np.nan)
    expected = "gradient of moe_layers[1].input_layernorm.weight"
    assert first_non_finite(model, ROWS, squares) == expected


def test_where_nothing_is_found_the_message_is_whole():
    text = first_non_finite(model_with(), ROWS, SQUARES)
    assert text.startswith("the loss alone")
    assert text.count("(") == text.count(")")


def test_a_model_without_experts_is_looked_through_too():
    fields = tiny_config(first_k_dense_replace=2, n_routed_experts=0, num_nextn_predict_layers=0)
    config = dataclasses.replace(CONFIG, model=model_config(fields, max_position_embeddings=4096))
    graph, params, bias = split_model(model_of(config, oracle.random_weights(fields, seed=0)))
    params = changed(params, "dense_layers.mlp.up_proj.weight", (1, ...), HUGE)
    squares = gradient_norm(params, is_stacked(params)).squares
    place = first_non_finite(nnx.merge(graph, params, bias), ROWS, squares)
    assert place == "activations after layer 1"
