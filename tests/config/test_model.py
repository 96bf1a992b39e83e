"""The model section: what it refuses, and what follows from its fields."""

import math

import pytest

from dsv3_jax.config import ModelConfig, YarnConfig

SIXTEEN_EXPERTS = dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
DENSE = dict(
    num_hidden_layers=2,
    first_k_dense_replace=2,
    num_nextn_predict_layers=0,
    n_routed_experts=0,
)
AT_LEAST_ONE = "a number of at least 1"
AT_LEAST_ZERO = "a number of at least 0"
POSITIVE = "a positive number"

REFUSED = [
    *[
        (name, value, AT_LEAST_ONE, {})
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
            "n_routed_experts",
            "n_group",
            "topk_group",
        )
        for value in (0, -4)
        if (name, value) != ("n_routed_experts", -4)
    ],
    *[
        (name, -1, AT_LEAST_ZERO, {})
        for name in (
            "first_k_dense_replace",
            "n_routed_experts",
            "n_shared_experts",
            "num_nextn_predict_layers",
        )
    ],
    *[
        (name, value, POSITIVE, {})
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor")
        for value in (0.0, -1.0, math.inf, math.nan)
    ],
    ("q_lora_rank", 0, "None (queries projected directly) or an integer of at least 1", {}),
    ("qk_rope_head_dim", 63, "an even number", {}),
    ("first_k_dense_replace", 62, "at most num_hidden_layers = 61", {}),
    ("scoring_func", "tanh", "one of sigmoid, softmax", {}),
    ("topk_method", "best", "one of noaux_tc, group_limited_greedy, greedy", {}),
    ("n_group", 3, "a divisor of n_routed_experts = 16", SIXTEEN_EXPERTS),
    ("topk_group", 5, "at most n_group = 4", SIXTEEN_EXPERTS),
    ("n_group", 16, "groups of at least two experts", SIXTEEN_EXPERTS),
    ("num_experts_per_tok", 9, "between 1 and the 8 experts of the kept groups", SIXTEEN_EXPERTS),
    ("num_experts_per_tok", 0, "between 1 and the 8 experts of the kept groups", SIXTEEN_EXPERTS),
    # An MTP module routes, so it needs experts even where every layer of the main model is dense.
    ("n_routed_experts", 0, AT_LEAST_ONE, DENSE | {"num_nextn_predict_layers": 1}),
]


@pytest.mark.parametrize(("name", "value", "rule", "others"), REFUSED)
def test_refuses(assert_refused, name, value, rule, others):
    assert_refused(lambda: ModelConfig(**others | {name: value}), f"model.{name}", value, rule)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        *[("factor", value, AT_LEAST_ONE) for value in (0.5, math.inf, math.nan)],
        ("original_max_position_embeddings", 0, AT_LEAST_ONE),
        ("beta_fast", 0.5, AT_LEAST_ONE),
        ("beta_slow", 0.0, "a positive number of at most beta_fast = 32.0"),
        ("beta_slow", 33.0, "a positive number of at most beta_fast = 32.0"),
        ("mscale", -1.0, AT_LEAST_ZERO),
        ("mscale_all_dim", math.nan, AT_LEAST_ZERO),
    ],
)
def test_refuses_yarn(assert_refused, name, value, rule):
    fields = {"factor": 4.0} | {name: value}
    assert_refused(lambda: YarnConfig(**fields), f"model.rope_scaling.{name}", value, rule)


@pytest.mark.parametrize(
    "fields",
    [
        DENSE,
        DENSE | {"n_group": 3},  # what routes nothing is not checked
        {"q_lora_rank": None},
        {"n_group": 1, "topk_group": 1},
        SIXTEEN_EXPERTS | {"n_group": 16, "topk_group": 16, "topk_method": "greedy"},
        SIXTEEN_EXPERTS | {"num_experts_per_tok": 8},
        {"first_k_dense_replace": 0},
        {"rope_scaling": YarnConfig(factor=1.0)},
    ],
)
def test_accepts_the_edges(fields):
    config = ModelConfig(**fields)
    assert all(getattr(config, name) == value for name, value in fields.items())


def test_defaults_are_the_671b_model():
    """The figures that the report prints, not the file's own."""
    config = ModelConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (7168, 61, 129280)
    assert (config.num_dense_layers, config.num_moe_layers) == (3, 58)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (256, 8)
    assert (config.n_group, config.topk_group, config.routed_scaling_factor) == (8, 4, 2.5)
    assert (config.q_lora_rank, config.kv_lora_rank, config.qk_head_dim) == (1536, 512, 192)
    assert config.initializer_range == 0.006


def test_derived_properties():
    dense = ModelConfig(**DENSE)
    assert not dense.has_experts
    assert dense.num_moe_layers == 0
    only_mtp_routes = dict(DENSE, n_routed_experts=8, n_group=1, topk_group=1)
    assert ModelConfig(**only_mtp_routes | {"num_nextn_predict_layers": 1}).has_experts
    assert ModelConfig().has_selection_bias
    assert not ModelConfig(topk_method="greedy").has_selection_bias


def test_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError, match="cannot assign"):
        ModelConfig().hidden_size = 1
    with pytest.raises(TypeError):
        ModelConfig(1024)
