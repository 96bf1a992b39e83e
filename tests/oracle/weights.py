"""Tensor names and shapes of the released checkpoint, random weights, and 128x128 FP8 blocks."""

import numpy as np

from .model import is_moe_layer

BLOCK = 128
E4M3_MAX = 448.0


def weight_shapes(config: dict, copies: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, by its name on the hub, matrices as [out, in].

    `copies` adds the second embedding and head that the released file stores with each MTP module
    (`embed_tokens`, `shared_head.head`); the model shares the main ones and never reads those.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    main = config["num_hidden_layers"]
    for layer in range(main + (config.get("num_nextn_predict_layers") or 0)):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes |= _attention_shapes(config, f"{prefix}.self_attn")
        if is_moe_layer(config, layer):
            shapes |= _moe_shapes(config, f"{prefix}.mlp")
        else:
            shapes |= _swiglu_shapes(f"{prefix}.mlp", hidden, config["intermediate_size"])
        if layer >= main:
            shapes |= _mtp_shapes(prefix, hidden, vocabulary, copies)
    return shapes


def _attention_shapes(config: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = (
        config[key] for key in ("hidden_size", "num_attention_heads", "kv_lora_rank")
    )
    nope, rotary, value = (
        config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    query_rank = config.get("q_lora_rank")
    if query_rank is None:
        query = {"q_proj": (heads * (nope + rotary), hidden)}
    else:
        query = {
            "q_a_proj": (query_rank, hidden),
            "q_a_layernorm": (query_rank,),
            "q_b_proj": (heads * (nope + rotary), query_rank),
        }
    rest = {
        "kv_a_proj_with_mqa": (rank + rotary, hidden),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (heads * (nope + value), rank),
        "o_proj": (hidden, heads * value),
    }
    return {f"{prefix}.{name}.weight": shape for name, shape in (query | rest).items()}


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }


def _moe_shapes(config: dict, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts, shared = config["n_routed_experts"], config.get("n_shared_experts") or 0
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.gate.weight": (experts, hidden)}
    if config.get("topk_method", "noaux_tc") == "noaux_tc":
        shapes[f"{prefix}.gate.e_score_correction_bias"] = (experts,)
    for expert in range(experts):
        shapes |= _swiglu_shapes(f"{prefix}.experts.{expert}", hidden, width)
    if shared:
        shapes |= _swiglu_shapes(f"{prefix}.shared_experts", hidden, shared * width)
    return shapes


def _mtp_shapes(
    prefix: str, hidden: int, vocabulary: int, copies: bool
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.enorm.weight": (hidden,),
        f"{prefix}.hnorm.weight": (hidden,),
        f"{prefix}.eh_proj.weight": (hidden, 2 * hidden),
        f"{prefix}.shared_head.norm.weight": (hidden,),
    }
    if copies:
        shapes[f"{prefix}.embed_tokens.weight"] = (vocabulary, hidden)
        shapes[f"{prefix}.shared_head.head.weight"] = (vocabulary, hidden)
    return shapes


def random_weights(
    config: dict,
    seed: int,
    *,
    std: float = 0.05,
    gate_std: float = 0.5,
    norm_std: float = 0.1,
    bias_std: float = 0.05,
    copies: bool = False,
) -> dict[str, np.ndarray]:
    """Normal matrices of `std`, norms around 1, gates wide enough that routing is spread.

    Every value is exact in float32, so that a float32 model can be given the very same numbers.
    `copies` as in `weight_shapes`; the copies equal what they copy, as in the released file.
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = generator.standard_normal(shape)
        if name.endswith("e_score_correction_bias"):
            value = bias_std * noise
        elif name.endswith("mlp.gate.weight"):
            value = gate_std * noise
        elif len(shape) == 1:
            value = 1.0 + norm_std * noise
        else:
            value = std * noise
        weights[name] = value.astype(np.float32).astype(np.float64)
    if copies:
        for name in weight_shapes(config, copies=True).keys() - weights.keys():
            source = "lm_head" if name.endswith("head.weight") else "model.embed_tokens"
            weights[name] = weights[f"{source}.weight"].copy()
    return weights


def e4m3_values() -> np.ndarray:
    """All 127 non-negative finite E4M3 numbers, code 0 to 126: 4 exponent bits, 3 of fraction."""
    exponent, fraction = np.divmod(np.arange(127), 8)
    subnormal = fraction * 2.0**-9
    return np.where(exponent == 0, subnormal, (1 + fraction / 8) * 2.0 ** (exponent - 7))


def round_to_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest E4M3 number, a tie to the even code; beyond 448 gives 448."""
    values = e4m3_values()
    magnitude = np.abs(x)
    upper = np.minimum(np.searchsorted(values, magnitude), 126)
    lower = np.maximum(upper - 1, 0)
    above, below = values[upper] - magnitude, magnitude - values[lower]
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.copysign(values[np.where(take_upper, upper, lower)], x)


def _blocks(shape: tuple[int, ...]) -> list[tuple[int, int, tuple[slice, slice]]]:
    """Row number, column number and extent of each 128x128 block; the last ones may be cut."""
    rows, columns = shape
    return [
        (i, j, (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)))
        for i in range(-(-rows // BLOCK))
        for j in range(-(-columns // BLOCK))
    ]


def quantize_blocks(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E4M3 values (as float64) and one scale a 128x128 block, for any matrix.

    scale = float32(largest magnitude in the block / 448), 1 for a block of zeros;
    value = nearest E4M3 of element / scale. Block (i, j) belongs to scales[i, j]; the scales are
    what the released checkpoint calls `weight_scale_inv`.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    values = np.zeros(matrix.shape)
    scales = np.ones(tuple(-(-size // BLOCK) for size in matrix.shape))
    for i, j, extent in _blocks(matrix.shape):
        largest = np.abs(matrix[extent]).max()
        if largest > 0:
            scales[i, j] = np.float32(largest / E4M3_MAX)
        values[extent] = round_to_e4m3(matrix[extent] / scales[i, j])
    return values, scales


def dequantize_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Each element times the scale of its block, float64; `values` may be of an FP8 type."""
    result = np.asarray(values).astype(np.float64)
    expected = tuple(-(-size // BLOCK) for size in result.shape)
    if np.shape(scales) != expected:
        raise ValueError(f"scales are {np.shape(scales)}, {result.shape} values need {expected}")
    for i, j, extent in _blocks(result.shape):
        result[extent] *= np.float64(scales[i, j])
    return result
