"""The whole model: blocks, multi-token prediction modules, generation.

Functions named with a leading underscore, and those of the other files, work on tapes; `forward`,
`forward_cached` and `greedy` take and give arrays.
"""

from dataclasses import dataclass

import numpy as np

from . import router, tape
from .attention import Latents, attention, linear, rms_norm


@dataclass(frozen=True)
class Routing[Array]:
    """What the router of one MoE layer did; the arrays are NumPy's, or tensors on the tape."""

    choices: np.ndarray  # int [B, S, num_experts_per_tok], best first
    weights: Array  # [B, S, num_experts_per_tok]
    load: np.ndarray  # int [n_routed_experts]: tokens sent to each expert, over all rows
    balance_loss: Array  # []: mean over rows of sum_i f_i P_i, without alpha


@dataclass(frozen=True)
class Output[Array]:
    """Result of a forward pass; `routing` is keyed by layer number, MTP modules included."""

    logits: Array  # [B, S, V]
    mtp_logits: tuple[Array, ...]  # depth k at index k - 1: [B, S - k, V]
    hidden: Array  # [B, S, hidden], after model.norm
    routing: dict[int, Routing[Array]]


def forward(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    documents: np.ndarray | None = None,
    absorbed: bool = False,
    mtp: bool = True,
) -> Output[np.ndarray]:
    """Everything the model computes for tokens [B, S], as arrays.

    `documents` [B, S] holds a document number for each token; attention stays inside a document.
    (Positions run on over the row: RoPE only sees differences.) `absorbed` takes the other form
    of attention, with the same result. `mtp=False` leaves the MTP modules out.
    """
    constants = {name: tape.as_tensor(value) for name, value in weights.items()}
    output = trace(config, constants, tokens, documents, absorbed, mtp)
    routing = {
        layer: Routing(r.choices, r.weights.value, r.load, r.balance_loss.value)
        for layer, r in output.routing.items()
    }
    mtp_logits = tuple(logits.value for logits in output.mtp_logits)
    return Output(output.logits.value, mtp_logits, output.hidden.value, routing)


def trace(
    config: dict,
    weights: dict[str, tape.Tensor],
    tokens: np.ndarray,
    documents: np.ndarray | None = None,
    absorbed: bool = False,
    mtp: bool = True,
) -> Output[tape.Tensor]:
    """`forward` on the tape: the same, with tensors that can be differentiated."""
    tokens = np.asarray(tokens)
    routing: dict[int, Routing[tape.Tensor]] = {}
    x = tape.take(weights["model.embed_tokens.weight"], tokens)
    for layer in range(config["num_hidden_layers"]):
        x, _ = _block(config, weights, layer, x, routing, None, documents, absorbed)
    hidden = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    mtp_logits = []
    state = hidden
    for depth in range(1, _mtp_depths(config) + 1 if mtp else 1):
        state = _mtp_module(config, weights, depth, state, tokens, routing, documents, absorbed)
        mtp_logits.append(linear(state, weights["lm_head.weight"]))
    logits = linear(hidden, weights["lm_head.weight"])
    return Output(logits, tuple(mtp_logits), hidden, routing)


def forward_cached(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    cache: dict[int, Latents] | None = None,
    absorbed: bool = True,
) -> tuple[np.ndarray, dict[int, Latents]]:
    """Logits [B, S, V] of tokens that follow those in the cache, and the longer cache.

    The cache holds, a layer, the normed latents and rotated keys. The main model only.
    """
    x = tape.take(weights["model.embed_tokens.weight"], np.asarray(tokens))
    longer = {}
    for layer in range(config["num_hidden_layers"]):
        past = None if cache is None else cache[layer]
        x, longer[layer] = _block(config, weights, layer, x, {}, past, None, absorbed)
    hidden = rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return linear(hidden, weights["lm_head.weight"]).value, longer


def greedy(config: dict, weights: dict[str, np.ndarray], prompt: list[int], n: int) -> list[int]:
    """The n most likely next tokens, one after the other; the whole text is recomputed each time.

    Of equal logits the lowest token wins. No stop token.
    """
    text = list(prompt)
    for _ in range(n):
        logits = forward(config, weights, np.array([text]), mtp=False).logits
        text.append(int(np.argmax(logits[0, -1])))
    return text[len(prompt) :]


def is_moe_layer(config: dict, layer: int) -> bool:
    """Whether the layer has routed experts; MTP modules, numbered after the main layers, do."""
    if layer >= config["num_hidden_layers"]:
        return True
    past_dense = layer >= config["first_k_dense_replace"]
    return past_dense and layer % config.get("moe_layer_freq", 1) == 0


def swiglu(weights: dict, prefix: str, x) -> tape.Tensor:
    """down(silu(gate(x)) * up(x)) with the three matrices under `prefix`."""
    gate = linear(x, weights[f"{prefix}.gate_proj.weight"])
    up = linear(x, weights[f"{prefix}.up_proj.weight"])
    return linear(gate * tape.sigmoid(gate) * up, weights[f"{prefix}.down_proj.weight"])


def moe(config: dict, weights: dict, prefix: str, x) -> tuple[tape.Tensor, Routing[tape.Tensor]]:
    """Shared experts plus the weighted sum of each token's chosen ones, and the routing.

    The shared experts are one SwiGLU of n_shared_experts times the width. x is [B, S, hidden].
    """
    x = tape.as_tensor(x)
    scores = router.affinities(config, weights, prefix, x)
    bias = weights.get(f"{prefix}.gate.e_score_correction_bias")
    bias = None if bias is None else tape.as_tensor(bias).value
    choices = router.choose(config, scores.value, bias)
    gates = router.combine_weights(config, scores, choices)
    load = np.bincount(choices.ravel(), minlength=config["n_routed_experts"])

    tokens, slots = x.shape[0] * x.shape[1], choices.shape[-1]
    flat = tape.reshape(x, (tokens, x.shape[2]))
    flat_gates = tape.reshape(gates, (tokens, slots, 1))
    parts, rows_of_parts = [], []
    for expert in np.flatnonzero(load):
        rows, columns = np.nonzero(choices.reshape(tokens, slots) == expert)
        result = swiglu(weights, f"{prefix}.experts.{expert}", flat[rows])
        parts.append(result * flat_gates[rows, columns])
        rows_of_parts.append(rows)
    routed = tape.scatter_add(tape.concatenate(parts), np.concatenate(rows_of_parts), tokens)
    result = tape.reshape(routed, x.shape)
    if config.get("n_shared_experts"):
        result = result + swiglu(weights, f"{prefix}.shared_experts", x)
    return result, Routing(choices, gates, load, router.balance_loss(config, scores))


def _block(
    config: dict,
    weights: dict,
    layer: int,
    x: tape.Tensor,
    routing: dict[int, Routing[tape.Tensor]],
    past: Latents | None,
    documents: np.ndarray | None,
    absorbed: bool,
) -> tuple[tape.Tensor, Latents]:
    """One pre-norm transformer layer; an MoE layer writes its record into `routing`."""
    prefix, eps = f"model.layers.{layer}", config["rms_norm_eps"]
    normed = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], eps)
    attended, known = attention(
        config, weights, f"{prefix}.self_attn", normed, past, documents, absorbed
    )
    x = x + attended
    normed = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], eps)
    if is_moe_layer(config, layer):
        result, routing[layer] = moe(config, weights, f"{prefix}.mlp", normed)
    else:
        result = swiglu(weights, f"{prefix}.mlp", normed)
    return x + result, known


def _mtp_depths(config: dict) -> int:
    return config.get("num_nextn_predict_layers") or 0


def _mtp_module(
    config: dict,
    weights: dict,
    depth: int,
    state: tape.Tensor,
    tokens: np.ndarray,
    routing: dict[int, Routing[tape.Tensor]],
    documents: np.ndarray | None,
    absorbed: bool,
) -> tape.Tensor:
    """Normed state of MTP depth k on positions 1..S-k; the head on it predicts t[i + k + 1].

    Position i sees the previous depth's normed state at i and the embedding of t[i + k].
    *Source*: B §2.2, but as the released weights need it: embedding before hidden state in the
    concatenation (B eq. 21 prints the reverse), and hidden states taken after the final norm.
    """
    length = tokens.shape[1] - depth
    if length < 1:
        raise ValueError(f"MTP depth {depth} needs more than {depth} tokens a row")
    layer = config["num_hidden_layers"] + depth - 1
    prefix, eps = f"model.layers.{layer}", config["rms_norm_eps"]
    embedded = tape.take(weights["model.embed_tokens.weight"], tokens[:, depth:])
    embedded = rms_norm(embedded, weights[f"{prefix}.enorm.weight"], eps)
    state = rms_norm(state[:, :length], weights[f"{prefix}.hnorm.weight"], eps)
    joined = tape.concatenate([embedded, state], axis=-1)
    x = linear(joined, weights[f"{prefix}.eh_proj.weight"])
    documents = None if documents is None else documents[:, :length]
    x, _ = _block(config, weights, layer, x, routing, None, documents, absorbed)
    return rms_norm(x, weights[f"{prefix}.shared_head.norm.weight"], eps)
