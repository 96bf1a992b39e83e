"""config.json of several families: what attends how, and what its layers keep."""

import json

import pytest

from dsv3_jax.config import ModelConfig
from dsv3_jax.plan.model_shape import find_model, model_names, read_shape, shape_of

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "intermediate_size": 128,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("fields", "attention", "kv_heads"),
    [
        ({}, "mha", 4),
        ({"num_key_value_heads": 2}, "gqa", 2),
        ({"num_key_value_heads": 1}, "mqa", 1),
        ({"multi_query": True}, "mqa", 1),
        ({"kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}, "mla", 4),
    ],
)
def test_attention(fields, attention, kv_heads):
    shape = read_shape(SMALL | fields, "config.json")
    assert (shape.attention, shape.kv_heads) == (attention, kv_heads)


@pytest.mark.parametrize(
    ("fields", "windows"),
    [
        ({}, [None] * 6),
        ({"sliding_window": 9}, [9] * 6),  # Mistral 7B
        ({"sliding_window": 9, "use_sliding_window": False}, [None] * 6),  # Qwen2.5
        (
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 4},
            [None] * 4 + [9] * 2,
        ),
        ({"sliding_window": 9, "model_type": "gemma2"}, [9, None] * 3),
        ({"sliding_window": 9, "sliding_window_pattern": 6}, [9] * 5 + [None]),  # Gemma 3
        (
            {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 3},
            [9, None] * 3,  # gpt-oss
        ),
        ({"text_config": SMALL | {"sliding_window": 9}}, [9] * 6),
    ],
)
def test_windows(fields, windows):
    assert list(read_shape(SMALL | fields, "config.json").windows) == windows


def test_experts():
    mixtral = SMALL | {"num_local_experts": 8, "num_experts_per_tok": 2}
    shape = read_shape(mixtral, "config.json")
    assert (shape.experts, shape.expert_size, shape.moe_layers) == (8, 128, 6)
    qwen = mixtral | {"moe_intermediate_size": 32, "decoder_sparse_step": 2}
    qwen |= {"mlp_only_layers": [1], "shared_expert_intermediate_size": 48}
    shape = read_shape(qwen, "config.json")
    # Every second layer from the second on, but for the one that is dense.
    assert (shape.expert_size, shape.shared_size, shape.moe_layers) == (32, 48, 2)


def test_a_run_s_model_is_the_file_s():
    assert shape_of(ModelConfig()) == find_model("deepseek-v3")


def test_other_names_and_files(tmp_path):
    old = {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 10, "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    shape = find_model(str(tmp_path))
    assert (shape.layers, shape.qk_head_dim, shape.intermediate_size) == (2, 16, 256)
    assert "llama-3.1-405b" in model_names()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "expected hidden_size or n_embd as well"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number"),
        ({"num_key_value_heads": 3}, "3, expected a divisor of num_attention_heads = 4"),
        ({"sliding_window": "all"}, "sliding_window is 'all', expected a number of tokens"),
        ({"sliding_window": 9, "layer_types": ["full_attention"]}, "1, expected 6 names"),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read_shape(SMALL | fields, "config.json")


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"MODEL is 'gpt-9', expected one of deepseek-v2"):
        find_model("gpt-9")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        find_model(str(tmp_path))
