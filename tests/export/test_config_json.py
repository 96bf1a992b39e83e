"""config.json in the forms that are around, and each thing in it that must be refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.export.config_json import hub_config, model_config_from_hub
from tests.export.hub_files import QUANTIZATION, TINY

GOLDEN = Path(__file__).parents[1] / "parity" / "golden"

RELEASED = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    attention_dropout=0.0,
    auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    bos_token_id=0,
    eos_token_id=1,
    ep_size=1,
    first_k_dense_replace=3,
    hidden_act="silu",
    hidden_size=7168,
    initializer_range=0.02,
    intermediate_size=18432,
    kv_lora_rank=512,
    max_position_embeddings=163840,
    model_type="deepseek_v3",
    moe_intermediate_size=2048,
    moe_layer_freq=1,
    n_group=8,
    n_routed_experts=256,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=128,
    num_experts_per_tok=8,
    num_hidden_layers=61,
    num_key_value_heads=128,
    num_nextn_predict_layers=1,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    quantization_config=QUANTIZATION,
    rms_norm_eps=1e-06,
    rope_scaling=dict(
        beta_fast=32,
        beta_slow=1,
        factor=40,
        mscale=1.0,
        mscale_all_dim=1.0,
        original_max_position_embeddings=4096,
        type="yarn",
    ),
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=4,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    transformers_version="4.33.1",
    use_cache=True,
    v_head_dim=128,
    vocab_size=129280,
)
MTP_61 = ["model.layers.61.eh_proj.weight"]
RELEASED_MODEL = ModelConfig(
    max_position_embeddings=163840, rope_scaling=YarnConfig(factor=40.0), initializer_range=0.02
)


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


def test_the_released_file_is_the_default_model_with_yarn():
    assert model_config_from_hub(RELEASED, MTP_61) == RELEASED_MODEL
    assert model_config_from_hub(RELEASED, []).num_nextn_predict_layers == 0


def test_what_is_written_is_what_was_released():
    written = json.loads(json.dumps(hub_config(RELEASED_MODEL, "float8_e4m3fn")))
    expected = without(RELEASED, "auto_map", "transformers_version")
    assert {name: written[name] for name in expected} == expected
    extra = {"pretraining_tp": 1, "rope_interleave": True, "seq_aux": True}
    assert without(written, *expected) == extra
    assert hub_config(RELEASED_MODEL, "float32")["torch_dtype"] == "float32"
    assert "quantization_config" not in hub_config(RELEASED_MODEL, "bfloat16")
    v31 = hub_config(RELEASED_MODEL, "float8_e4m3fn", power_of_two_scales=True)
    assert v31["quantization_config"] == QUANTIZATION | {"scale_fmt": "ue8m0"}


@pytest.mark.parametrize(
    "config",
    [
        RELEASED_MODEL,
        ModelConfig(q_lora_rank=None, num_nextn_predict_layers=0, rope_theta=5e4),
        ModelConfig(
            rope_scaling=YarnConfig(factor=4.0, beta_fast=2.0, mscale_all_dim=0.707),
            eos_token_id=None,
            norm_topk_prob=False,
        ),
    ],
)
def test_written_and_read_again(config):
    written = json.loads(json.dumps(hub_config(config, "bfloat16")))
    names = MTP_61 if config.num_nextn_predict_layers else []
    assert model_config_from_hub(written, names) == config


def test_the_form_of_transformers_5():
    """rope_parameters, no scoring_func, num_nextn_predict_layers without its tensors."""
    yarn = dict(RELEASED["rope_scaling"], rope_type="yarn", rope_theta=10000.0)
    newer = without(RELEASED, "rope_theta", "rope_scaling", "scoring_func", "topk_method")
    newer["rope_parameters"] = without(yarn, "type")
    newer |= dict(head_dim=64, qk_head_dim=192, rope_interleave=True, dtype="bfloat16")
    expected = replace(RELEASED_MODEL, num_nextn_predict_layers=0)
    assert model_config_from_hub(newer, []) == expected
    plain = newer | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert model_config_from_hub(plain, []) == replace(expected, rope_theta=5e5, rope_scaling=None)


def test_golden_files_of_both_forms_are_one_model():
    directory = GOLDEN / "yarn_hub"
    two = [
        model_config_from_hub(json.loads((directory / name).read_text()), [])
        for name in ("config.json", "config_hub.json")
    ]
    assert two[0] == two[1]


def test_moonlight_and_kimi_k2():
    moonlight = RELEASED | dict(
        q_lora_rank=None,
        n_group=1,
        topk_group=1,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        routed_scaling_factor=2.446,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_nextn_predict_layers=0,
        rope_scaling=None,
        rope_theta=50000.0,
        rms_norm_eps=1e-5,
        first_k_dense_replace=1,
        hidden_size=2048,
        max_position_embeddings=8192,
        bos_token_id=163584,
        eos_token_id=163585,
        vocab_size=163840,
    )
    config = model_config_from_hub(without(moonlight, "quantization_config"), [])
    assert (config.q_lora_rank, config.n_group, config.rope_scaling) == (None, 1, None)
    assert (config.num_nextn_predict_layers, config.rms_norm_eps) == (0, 1e-5)
    kimi = RELEASED | dict(
        model_type="kimi_k2",
        n_group=1,
        topk_group=1,
        n_routed_experts=384,
        num_attention_heads=64,
        num_key_value_heads=64,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        routed_scaling_factor=2.827,
        eos_token_id=[163585, 163586],
        rope_scaling=dict(RELEASED["rope_scaling"], factor=32.0, beta_fast=1.0, beta_slow=1.0),
    )
    config = model_config_from_hub(kimi, [])
    assert (config.eos_token_id, config.num_moe_layers) == ((163585, 163586), 60)
    assert hub_config(config, "bfloat16")["eos_token_id"] == (163585, 163586)
    assert config.rope_scaling == YarnConfig(factor=32.0, beta_fast=1.0)


def test_fields_that_a_file_may_leave_out():
    optional = ("attention_bias", "hidden_act", "moe_layer_freq", "tie_word_embeddings")
    optional += ("num_key_value_heads", "rope_scaling", "rope_theta", "scoring_func")
    optional += ("topk_method", "num_nextn_predict_layers", "bos_token_id", "initializer_range")
    assert model_config_from_hub(without(TINY, *optional), []) == model_config_from_hub(TINY, [])
    nulls = TINY | dict(n_group=None, topk_group=None, n_shared_experts=None, bos_token_id=None)
    config = model_config_from_hub(nulls, [])
    assert (config.n_group, config.n_shared_experts, config.bos_token_id) == (1, 0, None)


YARN = RELEASED["rope_scaling"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "model_type is 'llama', expected deepseek_v3 or kimi_k2"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (dict(attention_bias=True), "attention_bias is True, expected False"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings is True, expected False"),
        (dict(moe_layer_freq=2), "moe_layer_freq is 2, expected 1"),
        (dict(rope_interleave=False), "rope_interleave is False, expected True"),
        (dict(num_key_value_heads=8), "num_key_value_heads is 8, expected num_attention_heads"),
        (dict(hidden_size="24"), "hidden_size is '24', expected an integer"),
        (dict(hidden_size=True), "hidden_size is True, expected an integer"),
        (dict(rms_norm_eps=None), "rms_norm_eps is None, expected a number"),
        (dict(norm_topk_prob=1), "norm_topk_prob is 1, expected true or false"),
        (dict(eos_token_id="x"), "eos_token_id is 'x', expected a token id"),
        (dict(n_group=3), "model.n_group is 3, expected a divisor"),
        (dict(scoring_func="tanh"), "model.scoring_func is 'tanh', expected one of"),
        (dict(rope_scaling=[1]), "rope_scaling is [1], expected a JSON object"),
        (dict(rope_scaling={"type": "linear"}), "rope_scaling.type is 'linear', expected"),
        (dict(rope_parameters={"rope_type": "llama3"}), "rope_parameters.rope_type is 'llama3'"),
        (dict(rope_scaling=without(YARN, "factor")), "rope_scaling.factor is missing"),
        (dict(rope_scaling=YARN | {"factor": 0.5}), "factor is 0.5, expected a number of at"),
        (dict(rope_scaling=YARN | {"truncate": False}), "rope_scaling.truncate is False"),
        (dict(rope_scaling=YARN | {"attention_factor": 2.0}), "attention_factor is 2.0"),
        (dict(quantization_config={"quant_method": "awq"}), "quant_method is 'awq', expected"),
        (dict(quantization_config={}), "quantization_config.quant_method is missing, expected"),
        (
            dict(quantization_config=QUANTIZATION | {"weight_block_size": [64, 128]}),
            "weight_block_size is [64, 128], expected [128, 128]",
        ),
        (dict(quantization_config=QUANTIZATION | {"fmt": "e5m2"}), "fmt is 'e5m2'"),
        (dict(quantization_config=QUANTIZATION | {"scale_fmt": "x"}), "scale_fmt is 'x'"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        model_config_from_hub(TINY | changes, [], file="/m/config.json")
    assert str(caught.value).startswith("/m/config.json: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model_type", "hidden_size", "q_lora_rank", "norm_topk_prob"])
def test_missing_field_is_named(name):
    with pytest.raises(ValueError, match=rf"^config.json: {name} is missing"):
        model_config_from_hub(without(TINY, name), [])


@pytest.mark.parametrize(
    "changes", [dict(scoring_func="softmax"), dict(topk_method="group_limited_greedy")]
)
def test_routers_that_deepseek_v3_has_not_are_not_written(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=rf"^model.{name} is "):
        hub_config(replace(RELEASED_MODEL, **changes), "bfloat16")
