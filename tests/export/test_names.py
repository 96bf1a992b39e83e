"""The table against the released checkpoint's counts, and against the model it maps to."""

import itertools
import math
from collections import defaultdict
from dataclasses import replace

import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.export.names import (
    TensorEntry,
    count_mtp_modules,
    is_ignored,
    scale_shape,
    tensor_entries,
)
from dsv3_jax.model.transformer import Transformer
from tests.export.hub_files import TINY, hub_shapes

SMALL = ModelConfig(
    vocab_size=48,
    hidden_size=24,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
)


@pytest.fixture(scope="module")
def released() -> dict[str, TensorEntry]:
    """The 671B model's entries by hub name."""
    return {entry.hub_name: entry for entry in tensor_entries(ModelConfig())}


def test_the_released_checkpoint_to_the_tensor(released):
    """Counts of the 671B hub checkpoint (facts §1.2), FP32 scales and MTP copies included."""
    entries = released.values()
    scales = [e.scale_shape for e in entries if e.storage == "quantised"]
    item_bytes = {"quantised": 1, "plain": 2, "float32": 4}
    assert len(entries) + len(scales) == 91_991
    assert sum(math.prod(s) for s in scales) == 41_540_496
    elements = sum(math.prod(e.shape) for e in entries) + sum(math.prod(s) for s in scales)
    assert elements == 684_531_386_000
    stored = sum(item_bytes[e.storage] * math.prod(e.shape) for e in entries)
    assert stored + 4 * sum(math.prod(s) for s in scales) == 688_574_839_360


def test_names_and_shapes_are_those_spelled_out_by_hand():
    table = {e.hub_name: e.shape for e in tensor_entries(SMALL)}
    assert table == hub_shapes(TINY)


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_nextn_predict_layers=2),
        dict(num_nextn_predict_layers=0, q_lora_rank=None, first_k_dense_replace=0),
        dict(n_shared_experts=2, first_k_dense_replace=3),
        dict(n_shared_experts=0, topk_method="greedy", scoring_func="softmax"),
    ],
)
def test_entries_fill_every_array_of_the_model_exactly_once(changes):
    config = replace(SMALL, **changes)
    dtype = jnp.dtype(jnp.float32)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=dtype))
    arrays = {p: v.shape for p, v in nnx.to_flat_state(nnx.state(model))}
    places = defaultdict(list)
    for entry in tensor_entries(config):
        if not entry.is_copy:
            places[entry.path].append(entry.index)
            depth = len(entry.index)
            assert arrays[entry.path][depth:] == entry.shape, entry
    assert places.keys() == arrays.keys()
    for path, indices in places.items():
        stacked = arrays[path][: len(indices[0])]
        assert sorted(indices) == list(itertools.product(*map(range, stacked))), path


def test_gate_comes_before_up_and_scales_lie_beside(released):
    up = released["model.layers.9.mlp.experts.7.up_proj.weight"]
    assert up.path == ("moe_layers", "mlp", "experts", "gate_up_proj")
    assert (up.index, up.shape) == ((6, 7, 1), (2048, 7168))
    assert up.scale_name == "model.layers.9.mlp.experts.7.up_proj.weight_scale_inv"
    assert up.scale_path == ("moe_layers", "mlp", "experts", "gate_up_proj_scale_inv")
    latent = released["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"]
    assert (latent.shape, latent.scale_shape) == ((576, 7168), (5, 56))
    assert scale_shape((58, 256, 2, 2048, 7168)) == (58, 256, 2, 16, 56)


def test_storage_is_that_of_the_released_files(released):
    plain = [n for n, e in released.items() if e.storage == "plain" and len(e.shape) == 2]
    assert [n for n in plain if ".mlp.gate." not in n] == [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.eh_proj.weight",
        "model.layers.61.shared_head.head.weight",
    ]
    float32 = {n.rpartition(".")[2] for n, e in released.items() if e.storage == "float32"}
    assert float32 == {"e_score_correction_bias"}


def test_tensors_decide_how_many_mtp_modules():
    names = ["model.layers.2.mlp.gate_proj.weight", "lm_head.weight"]
    assert count_mtp_modules(names, 3) == 0
    assert count_mtp_modules([*names, "model.layers.3.enorm.weight"], 3) == 1
    assert count_mtp_modules([*names, "model.layers.4.shared_head.head.weight"], 3) == 2
    assert count_mtp_modules([*names, "model.layers.3.input_layernorm.weight"], 3) == 0


def test_rotary_frequencies_may_be_stored():
    assert is_ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_ignored("model.layers.0.self_attn.q_proj.bias")
