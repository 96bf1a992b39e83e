"""Multi-head latent attention in its two equivalent forms.

*Source*: B eq. 1-11; V2 §2.1. Per token only `kv_lora_rank` latent channels and one rotary key,
shared by all heads, are remembered. The expanded form turns every latent into keys and values of
each head. The absorbed form moves the key up-projection onto the query and the value
up-projection behind the weighted sum, so it works on the latents themselves:

    q_nope . (W_UK c)  =  (W_UK^T q_nope) . c          sum_k a_k (W_UV c_k)  =  W_UV sum_k a_k c_k
"""

from typing import NamedTuple

import numpy as np

from . import rope, tape

LATENT_NORM_EPS = 1e-6  # q_a_layernorm and kv_a_layernorm never take the config's rms_norm_eps


class Latents(NamedTuple):
    """What MLA caches for a stretch of positions of one layer."""

    latent: tape.Tensor  # [B, S, kv_lora_rank], after kv_a_layernorm
    rope_key: tape.Tensor  # [B, S, qk_rope_head_dim], rotated


def linear(x, weight) -> tape.Tensor:
    """x W^T for a weight stored [out, in], the checkpoint's layout."""
    return tape.matmul(x, tape.transpose(weight))


def rms_norm(x, weight, eps: float) -> tape.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim."""
    return x * (tape.mean(x * x, axis=-1, keepdims=True) + eps) ** -0.5 * weight


def visible(documents: np.ndarray | None, queries: int, keys: int) -> np.ndarray:
    """Which key each query may see, bool [B or 1, queries, keys]; the queries are the last ones.

    A query sees itself and what precedes it; with `documents` [B, keys], of its document only.
    """
    positions = np.arange(keys)
    causal = positions[None, keys - queries :, None] >= positions[None, None, :]
    if documents is None:
        return causal
    return causal & (documents[:, keys - queries :, None] == documents[:, None, :])


def attention(
    config: dict,
    weights: dict,
    prefix: str,
    x,
    past: Latents | None = None,
    documents: np.ndarray | None = None,
    absorbed: bool = False,
) -> tuple[tape.Tensor, Latents]:
    """The layer's output [B, S, hidden], and the latents of the past and the new positions.

    `prefix` names the layer's tensors, e.g. "model.layers.0.self_attn". x holds the positions
    after `past`; `documents` covers all, past first.
    """
    x = tape.as_tensor(x)
    start = 0 if past is None else past.latent.shape[1]
    query_nope, query_rope = _queries(config, weights, prefix, x, start)
    known = _latents(config, weights, prefix, x, start)
    if past is not None:
        known = Latents(*(tape.concatenate(pair, axis=1) for pair in zip(past, known, strict=True)))
    mask = visible(documents, x.shape[1], start + x.shape[1])
    form = _absorbed if absorbed else _expanded
    heads = form(config, weights[f"{prefix}.kv_b_proj.weight"], query_nope, query_rope, known, mask)
    batch, length, count, dim = heads.shape
    merged = tape.reshape(heads, (batch, length, count * dim))
    return linear(merged, weights[f"{prefix}.o_proj.weight"]), known


def _queries(config, weights, prefix, x, start) -> tuple[tape.Tensor, tape.Tensor]:
    """Per-head queries without and with position, [B, S, H, nope] and [B, S, H, rope]."""
    if config.get("q_lora_rank") is None:
        query = linear(x, weights[f"{prefix}.q_proj.weight"])
    else:
        compressed = linear(x, weights[f"{prefix}.q_a_proj.weight"])
        scale = weights[f"{prefix}.q_a_layernorm.weight"]
        compressed = rms_norm(compressed, scale, LATENT_NORM_EPS)
        query = linear(compressed, weights[f"{prefix}.q_b_proj.weight"])
    nope = config["qk_nope_head_dim"]
    heads = (config["num_attention_heads"], nope + config["qk_rope_head_dim"])
    query = tape.reshape(query, (*x.shape[:2], *heads))
    return query[..., :nope], rope.rotate(config, query[..., nope:], start)


def _latents(config, weights, prefix, x, start) -> Latents:
    """Latents of new positions; kv_a_proj_with_mqa stacks latent rows above rotary-key rows."""
    rank = config["kv_lora_rank"]
    both = linear(x, weights[f"{prefix}.kv_a_proj_with_mqa.weight"])
    scale = weights[f"{prefix}.kv_a_layernorm.weight"]
    return Latents(
        latent=rms_norm(both[..., :rank], scale, LATENT_NORM_EPS),
        rope_key=rope.rotate(config, both[..., rank:], start),
    )


def _probabilities(config, nope_scores, query_rope, rope_key, mask) -> tape.Tensor:
    """Attention weights [B, H, queries, keys] from the position-free part of the scores."""
    scores = nope_scores + tape.einsum("bqhd,bkd->bhqk", query_rope, rope_key)
    scores = scores * rope.softmax_scale(config)
    return tape.softmax(tape.where(mask[:, None], scores, -np.inf))


def _expanded(config, kv_b, query_nope, query_rope, known, mask) -> tape.Tensor:
    nope, dim = config["qk_nope_head_dim"], config["v_head_dim"]
    key_value = linear(known.latent, kv_b)
    shape = (*known.latent.shape[:2], config["num_attention_heads"], nope + dim)
    key_value = tape.reshape(key_value, shape)
    nope_scores = tape.einsum("bqhd,bkhd->bhqk", query_nope, key_value[..., :nope])
    probabilities = _probabilities(config, nope_scores, query_rope, known.rope_key, mask)
    return tape.einsum("bhqk,bkhd->bqhd", probabilities, key_value[..., nope:])


def _absorbed(config, kv_b, query_nope, query_rope, known, mask) -> tape.Tensor:
    nope, dim = config["qk_nope_head_dim"], config["v_head_dim"]
    per_head = (config["num_attention_heads"], nope + dim, config["kv_lora_rank"])
    kv_b = tape.reshape(kv_b, per_head)
    query_latent = tape.einsum("bqhd,hdr->bqhr", query_nope, kv_b[:, :nope])
    nope_scores = tape.einsum("bqhr,bkr->bhqk", query_latent, known.latent)
    probabilities = _probabilities(config, nope_scores, query_rope, known.rope_key, mask)
    mixed = tape.einsum("bhqk,bkr->bqhr", probabilities, known.latent)
    return tape.einsum("bqhr,hdr->bqhd", mixed, kv_b[:, nope:])
