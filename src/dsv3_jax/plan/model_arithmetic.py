"""Cache bytes, parameters and FLOPs of any decoder, from its shape alone. Imports no JAX.

For DeepSeek-V3 `dsv3_jax.model.accounting` counts the same in another way, and its MTP module too.

Source: KV bytes and GFLOP a token as in "Insights into DeepSeek-V3" (arXiv 2505.09343) Tables 1 and
2; the FP8 latent as FlashMLA keeps it, 512 values, their FP32 scales, the rotary part in BF16.
"""

from dataclasses import dataclass

from dsv3_jax.config.checks import require_one_of
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.model_shape import ModelShape

CACHES = ("bf16", "fp8", "int8", "int4")
TILE = 128
"""Values of the latent with one FP32 scale, in FP8."""
GROUP = 64
"""Values with one FP16 scale and zero point, in int8 and int4."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Selection biases count, scales do not."""

    total: int
    active: int
    """What one token uses; input embedding and head included."""
    active_without_embedding: int
    """Without the input embedding, which multiplies nothing."""


def cache_bytes_per_layer(shape: ModelShape, cache: str = "bf16") -> Number:
    """Of one token that a layer keeps."""
    require_one_of("cache", cache, *CACHES)
    if shape.kv_lora_rank is None:
        values = shape.kv_heads * (shape.qk_head_dim + shape.v_head_dim)
        return values * {"bf16": 2.0, "fp8": 1.0}.get(cache, _grouped(cache))
    latent, rope = shape.kv_lora_rank, shape.qk_rope_head_dim
    if cache == "fp8":
        return latent + 4 * latent / TILE + 2 * rope
    return (latent + rope) * (2.0 if cache == "bf16" else _grouped(cache))


def _grouped(cache: str) -> Number:
    bits = 4 if cache == "int4" else 8
    return bits / 8 + 2 * 2 / GROUP


def cache_bytes_per_token(shape: ModelShape, cache: str = "bf16") -> Number:
    """Of one token over all layers, while every window still holds it; V3 in BF16: 70,272."""
    return shape.layers * cache_bytes_per_layer(shape, cache)


def cache_bytes(shape: ModelShape, tokens: int, cache: str = "bf16") -> Number:
    """Of a sequence of `tokens`; a windowed layer keeps its window."""
    kept = sum(tokens if window is None else min(tokens, window) for window in shape.windows)
    return kept * cache_bytes_per_layer(shape, cache)


def attention_parameters(shape: ModelShape) -> int:
    """One layer's attention, the norms inside it included."""
    s, extras = shape, shape.extras
    if s.kv_lora_rank is not None:
        queries = s.heads * s.qk_head_dim
        if s.q_lora_rank is None:
            queries *= s.hidden_size
        else:
            queries = s.q_lora_rank * (s.hidden_size + 1 + queries)
        compress = s.hidden_size * (s.kv_lora_rank + s.qk_rope_head_dim) + s.kv_lora_rank
        up = s.qk_head_dim - s.qk_rope_head_dim + s.v_head_dim
        expand = s.kv_lora_rank * s.heads * up
        return queries + compress + expand + s.heads * s.v_head_dim * s.hidden_size
    wide, narrow = s.heads * s.qk_head_dim, s.kv_heads * s.qk_head_dim
    products = 2 * s.hidden_size * (wide + narrow)
    has_bias = "qkv_bias" in extras or s.attention_bias
    bias = has_bias * (wide + 2 * narrow) + s.attention_bias * s.hidden_size
    return products + bias + 2 * s.qk_head_dim * ("qk_norm" in extras)


def count(shape: ModelShape) -> Parameters:
    """Total and active. ValueError for a model type that is not known."""
    s = shape
    embedding = s.vocab_size * s.hidden_size
    common = s.layers * (attention_parameters(s) + 2 * s.hidden_size) + s.hidden_size
    common += (s.layers - s.moe_layers) * 3 * s.hidden_size * s.intermediate_size

    def moe(experts: int) -> int:
        width = experts * s.expert_size + s.shared_size
        gates = s.experts * (s.hidden_size + s.selection_bias)
        gates += s.hidden_size * ("shared_gate" in s.extras)
        return s.moe_layers * (3 * s.hidden_size * width + gates)

    head = embedding  # multiplies, also where it is the embedding itself
    return Parameters(
        total=common + moe(s.experts) + embedding * (1 if s.tied_embedding else 2),
        active=common + moe(s.experts_per_token) + embedding * (1 if s.tied_embedding else 2),
        active_without_embedding=common + moe(s.experts_per_token) + head,
    )


def training_flops_per_token(shape: ModelShape, seq: int, *, causal: bool = True) -> Number:
    """Forward and backward at sequence length `seq`, a multiply-add as two; V3 at 4,096: 250.5e9.

    Six for each active parameter but the input embedding, and attention over the mean of the keys
    seen: seq/2 in a causal layer, its window at most.
    """
    width = shape.heads * (shape.qk_head_dim + shape.v_head_dim)
    keys = 0.0
    for window in shape.windows:
        seen = float(seq) if window is None else float(min(window, seq))
        # A window of w: w^2/2 in the triangle at its start, w for each token after it.
        keys += seen * (1 - seen / (2 * seq)) if causal else seen
    return 6 * count(shape).active_without_embedding + 3 * 2 * width * keys
