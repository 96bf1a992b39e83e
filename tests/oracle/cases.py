"""Small configs and batches for the oracle's own tests."""

import numpy as np

YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def tiny_config(**changes) -> dict:
    """One dense and one MoE layer plus one MTP module, everything as small as can be."""
    return {
        "vocab_size": 23,
        "hidden_size": 12,
        "intermediate_size": 10,
        "moe_intermediate_size": 6,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "q_lora_rank": 7,
        "kv_lora_rank": 5,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 6,
        "v_head_dim": 3,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "rope_scaling": None,
    } | changes


V2_CHANGES = {
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "num_nextn_predict_layers": 0,
    "rope_scaling": YARN | {"factor": 4, "original_max_position_embeddings": 64, "mscale": 0.707},
}
TWO_DEPTHS = {"num_nextn_predict_layers": 2, "num_hidden_layers": 1, "first_k_dense_replace": 0}

V3_671B = tiny_config(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    rope_scaling=YARN,
)


def random_tokens(config: dict, rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], (rows, length))
