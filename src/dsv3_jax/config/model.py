"""The model section: the shape of a DeepSeek-V3, in the names of Hugging Face's config.json."""

import math
from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_at_least, require_one_of, require_types


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension, `rope_scaling` of config.json.

    Source: YaRN (arXiv 2309.00071); DeepSeek-V3 uses factor 40 over 4,096 positions.
    """

    factor: float
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        section = "model.rope_scaling"
        require_types(section, self)
        require_at_least(section, self, 1, "factor", "original_max_position_embeddings")
        require_at_least(section, self, 1, "beta_fast")
        require_at_least(section, self, 0, "mscale", "mscale_all_dim")
        require(
            0 < self.beta_slow <= self.beta_fast,
            f"{section}.beta_slow",
            self.beta_slow,
            f"a positive number of at most beta_fast = {self.beta_fast}",
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one DeepSeek-V3 model. The defaults are the 671B model's, but for the vocabulary's
    special tokens, which belong to the tokenizer.

    `q_lora_rank=None` projects queries directly (`q_proj`). `n_routed_experts=0` together with
    `first_k_dense_replace == num_hidden_layers` gives a dense model. `initializer_range` is the
    training value of the report (0.006), not the hub file's library default (0.02).

    Source: DeepSeek-V3 Technical Report §4.2; the hub's config.json.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    max_position_embeddings: int = 4096
    initializer_range: float = 0.006
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    """Generation ends at it, or at any of several."""

    def __post_init__(self):
        require_types("model", self)
        require_at_least(
            "model",
            self,
            1,
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
            *("num_hidden_layers", "num_attention_heads", "kv_lora_rank", "v_head_dim"),
            *("qk_nope_head_dim", "qk_rope_head_dim", "max_position_embeddings"),
        )
        require_at_least(
            "model",
            self,
            0,
            *("first_k_dense_replace", "n_routed_experts", "n_shared_experts"),
            "num_nextn_predict_layers",
        )
        require(
            self.q_lora_rank is None or self.q_lora_rank >= 1,
            "model.q_lora_rank",
            self.q_lora_rank,
            "None (queries projected directly) or an integer of at least 1",
        )
        require(
            self.qk_rope_head_dim % 2 == 0,
            "model.qk_rope_head_dim",
            self.qk_rope_head_dim,
            "an even number (RoPE rotates pairs)",
        )
        require(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "model.first_k_dense_replace",
            self.first_k_dense_replace,
            f"at most num_hidden_layers = {self.num_hidden_layers}",
        )
        require_one_of("model.scoring_func", self.scoring_func, "sigmoid", "softmax")
        require_one_of(
            "model.topk_method", self.topk_method, "noaux_tc", "group_limited_greedy", "greedy"
        )
        for name in ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"model.{name}", value, "a positive number")
        require(
            self.rope_scaling is None or self.rope_theta > 1,
            "model.rope_theta",
            self.rope_theta,
            "more than 1 (YaRN takes its logarithm)",
        )
        if self.has_experts:
            self._check_routing()

    def _check_routing(self):
        require_at_least("model", self, 1, "n_routed_experts", "n_group", "topk_group")
        require(
            self.n_routed_experts % self.n_group == 0,
            "model.n_group",
            self.n_group,
            f"a divisor of n_routed_experts = {self.n_routed_experts}",
        )
        require(
            self.topk_group <= self.n_group,
            "model.topk_group",
            self.topk_group,
            f"at most n_group = {self.n_group}",
        )
        group_size = self.n_routed_experts // self.n_group
        require(
            self.topk_method != "noaux_tc" or self.n_group == 1 or group_size >= 2,
            "model.n_group",
            self.n_group,
            "groups of at least two experts (noaux_tc scores a group by its two best)",
        )
        require(
            1 <= self.num_experts_per_tok <= self.topk_group * group_size,
            "model.num_experts_per_tok",
            self.num_experts_per_tok,
            f"between 1 and the {self.topk_group * group_size} experts of the kept groups",
        )

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """All of `eos_token_id`."""
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else () if ids is None else (ids,)

    @property
    def has_experts(self) -> bool:
        """Whether any layer, an MTP module included, routes tokens to experts."""
        return self.num_moe_layers > 0 or self.num_nextn_predict_layers > 0

    @property
    def num_dense_layers(self) -> int:
        return self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """MoE layers of the main model, MTP modules not counted."""
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_selection_bias(self) -> bool:
        """Whether the router owns an `e_score_correction_bias`."""
        return self.topk_method == "noaux_tc"
