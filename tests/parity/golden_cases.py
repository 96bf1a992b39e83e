"""The models behind the golden files: fields of DeepseekV3Config and the size of the token batch.

Every case differs from `BASE` only by what it names, so that a failing case points at a feature.
"""

from dataclasses import dataclass
from typing import Any

BASE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=False,
    num_mtp_layers=0,
)


def _yarn(**changes: Any) -> dict[str, Any]:
    """YaRN of factor 4 over 16 positions, the other numbers those of deepseek-ai/DeepSeek-V3."""
    return (
        dict(
            rope_type="yarn",
            rope_theta=10000.0,
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=32.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        )
        | changes
    )


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One model and its batch: `tokens` is [batch, length + 1], inputs and targets overlapping."""

    name: str
    changes: dict[str, Any]
    batch: int = 2
    length: int = 24
    first_seed: int = 0
    writes_hub_config: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """All arguments of DeepseekV3Config."""
        return BASE | self.changes


CASES = (
    GoldenCase(
        name="direct_q",
        changes=dict(
            q_lora_rank=None, first_k_dense_replace=0, n_routed_experts=5, n_group=1, topk_group=1
        ),
    ),
    GoldenCase(
        name="two_shared",
        changes=dict(n_shared_experts=2, num_experts_per_tok=3),
    ),
    GoldenCase(
        name="yarn_hub",
        changes=dict(
            qk_rope_head_dim=8,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=3,
            rope_parameters=_yarn(),
        ),
        length=36,
        writes_hub_config=True,
    ),
    GoldenCase(
        name="yarn_mscale",
        changes=dict(
            num_hidden_layers=1,
            first_k_dense_replace=0,
            moe_intermediate_size=12,
            qk_rope_head_dim=8,
            n_routed_experts=16,
            n_group=8,
            topk_group=4,
            num_experts_per_tok=4,
            rope_parameters=_yarn(
                rope_theta=1000.0, beta_fast=2.0, beta_slow=0.05, mscale_all_dim=0.707
            ),
        ),
        length=36,
    ),
    GoldenCase(
        name="three_dense",
        changes=dict(
            num_hidden_layers=4,
            first_k_dense_replace=3,
            intermediate_size=24,
            moe_intermediate_size=12,
            q_lora_rank=None,
            n_group=4,
            topk_group=3,
            num_experts_per_tok=4,
        ),
    ),
    GoldenCase(
        name="unnormalised",
        changes=dict(norm_topk_prob=False, routed_scaling_factor=1.5, num_experts_per_tok=3),
    ),
    GoldenCase(
        name="odd_sizes",
        changes=dict(
            vocab_size=67,
            hidden_size=35,
            intermediate_size=37,
            moe_intermediate_size=11,
            num_attention_heads=3,
            num_key_value_heads=3,
            q_lora_rank=13,
            kv_lora_rank=11,
            qk_nope_head_dim=10,
            qk_rope_head_dim=6,
            v_head_dim=7,
            n_routed_experts=9,
            n_shared_experts=2,
            n_group=3,
            topk_group=2,
            num_experts_per_tok=4,
            eos_token_id=[1, 5],
        ),
        batch=3,
        length=17,
    ),
)

ADAMW = GoldenCase(name="adamw", changes=dict(num_experts_per_tok=3), batch=2, length=16)
MTP = GoldenCase(
    name="mtp",
    changes=dict(
        num_hidden_layers=1, first_k_dense_replace=0, n_routed_experts=4, num_mtp_layers=1
    ),
    length=16,
)
GENERATE_FROM = "yarn_hub"
