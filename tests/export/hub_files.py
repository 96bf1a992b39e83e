"""Hugging Face checkpoints made by hand: names spelled out here, bytes by the safetensors package.

Nothing of dsv3_jax is used, so that what the exporter reads and writes has a second opinion.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

TINY = dict(
    architectures=["DeepseekV3ForCausalLM"],
    attention_bias=False,
    bos_token_id=0,
    eos_token_id=1,
    first_k_dense_replace=1,
    hidden_act="silu",
    hidden_size=24,
    initializer_range=0.02,
    intermediate_size=40,
    kv_lora_rank=8,
    max_position_embeddings=64,
    model_type="deepseek_v3",
    moe_intermediate_size=16,
    moe_layer_freq=1,
    n_group=2,
    n_routed_experts=4,
    n_shared_experts=1,
    norm_topk_prob=True,
    num_attention_heads=2,
    num_experts_per_tok=2,
    num_hidden_layers=3,
    num_key_value_heads=2,
    num_nextn_predict_layers=1,
    q_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    rms_norm_eps=1e-6,
    rope_scaling=None,
    rope_theta=10000,
    routed_scaling_factor=2.5,
    scoring_func="sigmoid",
    tie_word_embeddings=False,
    topk_group=1,
    topk_method="noaux_tc",
    torch_dtype="bfloat16",
    v_head_dim=8,
    vocab_size=48,
)
"""config.json of a small model with everything: dense and MoE layers, query latent, MTP."""

ONE_LAYER = TINY | dict(
    first_k_dense_replace=0, num_hidden_layers=1, num_nextn_predict_layers=0, q_lora_rank=None
)
"""The fewest shapes: one MoE layer without query latent."""

RAGGED = TINY | dict(
    hidden_size=200,
    intermediate_size=130,
    moe_intermediate_size=130,
    num_hidden_layers=2,
    q_lora_rank=136,
    kv_lora_rank=24,
    n_routed_experts=2,
    n_group=1,
)
"""Widths that fill one FP8 block and part of a second one."""

QUANTIZATION = dict(
    activation_scheme="dynamic", fmt="e4m3", quant_method="fp8", weight_block_size=[128, 128]
)

DTYPES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
PROJECTIONS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
PROJECTIONS = (*PROJECTIONS, "gate_proj", "up_proj", "down_proj")
COPIES = {"embed_tokens": "model.embed_tokens.weight", "shared_head.head": "lm_head.weight"}


def hub_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its hub name, MTP modules with their copies."""
    c = config
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    qk = c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    kv = c["qk_nope_head_dim"] + c["v_head_dim"]
    vocabulary = (c["vocab_size"], hidden)
    shapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = vocabulary

    def add_mlp(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = shapes[f"{prefix}.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, width)

    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        p = f"model.layers.{layer}"
        shapes[f"{p}.input_layernorm.weight"] = (hidden,)
        shapes[f"{p}.post_attention_layernorm.weight"] = (hidden,)
        if c["q_lora_rank"] is None:
            shapes[f"{p}.self_attn.q_proj.weight"] = (heads * qk, hidden)
        else:
            shapes[f"{p}.self_attn.q_a_proj.weight"] = (c["q_lora_rank"], hidden)
            shapes[f"{p}.self_attn.q_a_layernorm.weight"] = (c["q_lora_rank"],)
            shapes[f"{p}.self_attn.q_b_proj.weight"] = (heads * qk, c["q_lora_rank"])
        latent = c["kv_lora_rank"] + c["qk_rope_head_dim"]
        shapes[f"{p}.self_attn.kv_a_proj_with_mqa.weight"] = (latent, hidden)
        shapes[f"{p}.self_attn.kv_a_layernorm.weight"] = (c["kv_lora_rank"],)
        shapes[f"{p}.self_attn.kv_b_proj.weight"] = (heads * kv, c["kv_lora_rank"])
        shapes[f"{p}.self_attn.o_proj.weight"] = (hidden, heads * c["v_head_dim"])
        if layer < c["first_k_dense_replace"]:
            add_mlp(f"{p}.mlp", c["intermediate_size"])
        else:
            width = c["moe_intermediate_size"]
            shapes[f"{p}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
            shapes[f"{p}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
            add_mlp(f"{p}.mlp.shared_experts", width * c["n_shared_experts"])
            for expert in range(c["n_routed_experts"]):
                add_mlp(f"{p}.mlp.experts.{expert}", width)
        if layer >= c["num_hidden_layers"]:
            shapes |= {f"{p}.{copy}.weight": vocabulary for copy in COPIES}
            shapes |= {f"{p}.{name}.weight": (hidden,) for name in ("enorm", "hnorm")}
            shapes[f"{p}.shared_head.norm.weight"] = (hidden,)
            shapes[f"{p}.eh_proj.weight"] = (hidden, 2 * hidden)
    return shapes


def hub_tensors(config: dict[str, Any], dtype: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors in `dtype`, biases in FP32; with F8_E4M3 as the released files have it."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in hub_shapes(config).items():
        values = rng.standard_normal(shape).astype(np.float32)
        values = 1 + values / 8 if len(shape) == 1 else values / np.float32(np.sqrt(shape[-1]))
        if name.endswith("e_score_correction_bias"):
            tensors[name] = values / 8
        elif dtype == "F8_E4M3" and name.split(".")[-2] in PROJECTIONS:
            tensors |= quantise_by_hand(name, values)
        else:
            tensors[name] = values.astype(DTYPES["BF16" if dtype == "F8_E4M3" else dtype])
    return share_copies(tensors)


def share_copies(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The MTP modules' embeddings and heads made what the main model's are."""
    for copy, original in COPIES.items():
        for name in tensors:
            if name.startswith("model.layers.") and name.endswith(f".{copy}.weight"):
                tensors[name] = tensors[original]
    return tensors


def quantise_by_hand(name: str, weight: np.ndarray) -> dict[str, np.ndarray]:
    """The FP8 weight and its scales, block after block, each stretched by 448 / amax."""
    rows, columns = weight.shape
    scale = np.ones((-(-rows // 128), -(-columns // 128)), np.float32)
    values = np.zeros(weight.shape, DTYPES["F8_E4M3"])
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax = np.abs(weight[block]).max()
            if amax > 0:
                scale[i, j] = amax / np.float32(448)
            values[block] = (weight[block] / scale[i, j]).astype(values.dtype)
    return {name: values, f"{name}_scale_inv": scale}


def dequantise_by_hand(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """float32 values, element by element from the scale of its block."""
    rows, columns = (np.arange(n) // 128 for n in values.shape)
    return values.astype(np.float32) * scale[rows[:, None], columns]


def write_checkpoint(
    directory: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], shards: int = 1
) -> Path:
    """A checkpoint directory, its tensors dealt out to the shards in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    if any(tensor.dtype == DTYPES["F8_E4M3"] for tensor in tensors.values()):
        config = {"quantization_config": QUANTIZATION} | config
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """Every tensor of the directory's safetensors files, as the package reads them."""
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, entry in safetensors.deserialize(file.read_bytes()):
            assert name not in tensors, name
            values = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def assert_same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Names, dtypes, shapes and every bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert found[name].tobytes() == tensor.tobytes(), name
