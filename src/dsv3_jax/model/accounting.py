"""Parameters, FLOPs and cache bytes of a model, from its config alone. Imports no JAX.

Source: arithmetic over the shapes of DeepSeek-V3 Technical Report §2.1-2.2; the FLOP convention is
that of Table 2 of "Insights into DeepSeek-V3" (arXiv 2505.09343).
"""

from dataclasses import dataclass

from dsv3_jax.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters. The selection bias counts, FP8 scales do not.

    For the 671B model: total 671,026,419,200; active 37,552,297,472; mtp 11,610,068,224.
    """

    total: int
    """The main model, embedding and head included, without MTP modules."""
    active: int
    """What one token uses of it: K of the routed experts; input embedding and head included."""
    active_without_embedding: int
    """The same without the input embedding, which multiplies nothing."""
    mtp: int
    """All MTP modules, without the embedding and head that they share."""
    mtp_active: int


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """Floating-point operations of one token; a multiply-add counts two."""

    forward: float
    """Main model."""
    mtp_forward: float
    """All MTP modules, each with its own pass through the shared head."""

    @property
    def training(self) -> float:
        """Forward and backward with MTP: three times the forward operations."""
        return 3 * (self.forward + self.mtp_forward)

    @property
    def training_without_mtp(self) -> float:
        return 3 * self.forward


def attention_parameters(config: ModelConfig) -> int:
    """One MLA block, its two latent norms included."""
    c = config
    heads = c.num_attention_heads
    if c.q_lora_rank is None:
        queries = c.hidden_size * heads * c.qk_head_dim
    else:
        queries = c.q_lora_rank * (c.hidden_size + 1 + heads * c.qk_head_dim)
    compress = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
    expand = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
    return queries + compress + expand + heads * c.v_head_dim * c.hidden_size


def dense_mlp_parameters(config: ModelConfig) -> int:
    """The SwiGLU network of a dense layer."""
    return 3 * config.hidden_size * config.intermediate_size


def expert_parameters(config: ModelConfig) -> int:
    """One expert, routed or shared."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def router_parameters(config: ModelConfig) -> int:
    """The gate's matrix and its selection bias."""
    return config.n_routed_experts * (config.hidden_size + config.has_selection_bias)


def moe_parameters(config: ModelConfig, routed_experts: int) -> int:
    """Router, shared experts and `routed_experts` routed ones (all, or those a token uses)."""
    experts = config.n_shared_experts + routed_experts
    return experts * expert_parameters(config) + router_parameters(config)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Every count of the model."""
    c = config
    embedding = c.vocab_size * c.hidden_size
    layer = attention_parameters(c) + 2 * c.hidden_size
    outside_moe = (
        2 * embedding
        + c.hidden_size
        + c.num_hidden_layers * layer
        + c.num_dense_layers * dense_mlp_parameters(c)
    )

    def main(routed_experts: int) -> int:
        return outside_moe + c.num_moe_layers * moe_parameters(c, routed_experts)

    def mtp(routed_experts: int) -> int:
        joining = 2 * c.hidden_size**2 + 3 * c.hidden_size  # eh_proj; enorm, hnorm, shared_head
        return c.num_nextn_predict_layers * (joining + layer + moe_parameters(c, routed_experts))

    active = main(c.num_experts_per_tok)
    return ParameterCount(
        total=main(c.n_routed_experts),
        active=active,
        active_without_embedding=active - embedding,
        mtp=mtp(c.n_routed_experts),
        mtp_active=mtp(c.num_experts_per_tok),
    )


def attention_core_flops(config: ModelConfig, seq: int, *, causal: bool) -> float:
    """q.k and probs.v of one token in one layer, the mean over a sequence of `seq` tokens.

    Causal counts seq/2 keys a token (the lower triangle), non-causal all of them.
    """
    keys = seq / 2 if causal else float(seq)
    return 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim) * keys


def count_flops(config: ModelConfig, seq: int, *, causal: bool = True) -> TokenFlops:
    """FLOPs a token at sequence length `seq`, two for each active parameter plus attention.

    For the 671B model at 4,096: training_without_mtp is 250.46e9 (Table 2 prints 250).
    """
    parameters = count_parameters(config)
    attention = attention_core_flops(config, seq, causal=causal)
    depth = config.num_nextn_predict_layers
    head = config.vocab_size * config.hidden_size
    return TokenFlops(
        forward=2 * parameters.active_without_embedding + config.num_hidden_layers * attention,
        mtp_forward=2 * (parameters.mtp_active + depth * head) + depth * attention,
    )


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Latent KV cache of one token over all layers of the main model; 70,272 for 671B in BF16."""
    values = config.kv_lora_rank + config.qk_rope_head_dim
    return values * config.num_hidden_layers * bytes_per_value
