"""The sizes of any decoder, read from Hugging Face's config.json. Imports no JAX.

Grouped-query attention has fewer key-value heads than query heads, multi-query attention one, MLA a
latent for all heads. A windowed layer sees, and keeps, no more than its window.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3_jax.config import ModelConfig, to_dict
from dsv3_jax.config.checks import require

DIRECTORY = Path(__file__).with_name("models")
GATED = {  # model types whose MLP has three matrices, and what counts beside the matrices
    "llama": (),
    "mistral": (),
    "mixtral": (),
    "qwen2": ("qkv_bias",),
    "qwen2_moe": ("qkv_bias", "shared_gate"),
    "qwen3": ("qk_norm",),
    "qwen3_moe": ("qk_norm",),
    "deepseek_v2": (),
    "deepseek_v3": (),
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """One decoder. `kv_lora_rank` is None where attention is not MLA."""

    model_type: str
    hidden_size: int
    vocab_size: int
    heads: int
    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    windows: tuple[int | None, ...]
    """Of each layer: the tokens it keeps, None for all."""
    tied_embedding: bool
    intermediate_size: int
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int = 0
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    shared_size: int = 0
    """Width of the shared experts together."""
    moe_layers: int = 0
    selection_bias: bool = False
    attention_bias: bool = False

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def attention(self) -> str:
        """mla, mha, gqa or mqa."""
        if self.kv_lora_rank is not None:
            return "mla"
        return {self.heads: "mha", 1: "mqa"}.get(self.kv_heads, "gqa")

    @property
    def extras(self) -> tuple[str, ...]:
        """Of `GATED`. ValueError for a type whose parameters are not known."""
        rule = f"one of {', '.join(GATED)} to count its parameters"
        require(self.model_type in GATED, "model_type", self.model_type, rule)
        return GATED[self.model_type]


def model_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def find_model(name: str) -> ModelShape:
    """The model of that name, or of the config.json (or its folder) at that path."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file() and name in model_names():
        path = DIRECTORY / f"{name}.json"
    rule = f"one of {', '.join(model_names())}, or a config.json"
    require(path.is_file(), "MODEL", name, rule)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {error}, expected JSON") from None
    require(isinstance(config, dict), str(path), config, "an object")
    return read_shape(config, str(path))


def shape_of(config: ModelConfig) -> ModelShape:
    """The shape of a run's model."""
    return read_shape(to_dict(config) | {"model_type": "deepseek_v3"}, "model")


def read_shape(config: Mapping[str, Any], where: str) -> ModelShape:
    """The shape in a config.json. ValueError names a field that is missing or no size."""
    config = config.get("text_config", config)

    def size(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        expected = f"{' or '.join(names)} as well"
        require(found is not None, where, sorted(config), expected)
        holds = isinstance(found, int) and not isinstance(found, bool) and found >= 0
        require(holds, f"{where}: {names[0]}", found, "a whole number")
        assert found is not None
        return found

    hidden, heads = size("hidden_size", "n_embd"), size("num_attention_heads", "n_head")
    require(hidden >= 1 and heads >= 1, f"{where}: num_attention_heads", heads, "at least 1")
    layers = size("num_hidden_layers", "n_layer")
    require(layers >= 1, f"{where}: num_hidden_layers", layers, "at least 1")
    kv_heads = 1 if config.get("multi_query") else heads
    kv_heads = size("num_key_value_heads", "num_kv_heads", default=kv_heads)
    rule = f"a divisor of num_attention_heads = {heads}"
    divides = kv_heads >= 1 and heads % kv_heads == 0
    require(divides, f"{where}: num_key_value_heads", kv_heads, rule)
    head_dim = size("head_dim", default=hidden // heads)
    mla, rope = config.get("kv_lora_rank"), 0
    if mla is not None:
        rope = size("qk_rope_head_dim")
        head_dim = size("qk_nope_head_dim") + rope
    width = size("intermediate_size", "n_inner", "ffn_hidden_size", default=4 * hidden)
    return ModelShape(
        model_type=str(config.get("model_type", "")),
        hidden_size=hidden,
        vocab_size=size("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        qk_head_dim=head_dim,
        v_head_dim=size("v_head_dim", default=head_dim) if mla is not None else head_dim,
        windows=_windows(config, layers, where),
        tied_embedding=bool(config.get("tie_word_embeddings", False)),
        intermediate_size=width,
        q_lora_rank=config.get("q_lora_rank"),
        kv_lora_rank=mla,
        qk_rope_head_dim=rope,
        selection_bias=config.get("topk_method") == "noaux_tc",
        attention_bias=bool(config.get("attention_bias", False)),
        **_experts(config, layers, width, size),
    )


def _experts(config: Mapping[str, Any], layers: int, width: int, size) -> dict[str, int]:
    experts = size("n_routed_experts", "num_local_experts", "num_experts", default=0)
    if not experts:
        return {}
    expert = size("moe_intermediate_size", default=width)
    shared = expert * size("n_shared_experts", default=0)
    step = size("decoder_sparse_step", "moe_layer_freq", default=1)
    dense, only = size("first_k_dense_replace", default=0), config.get("mlp_only_layers") or ()
    # Qwen counts its sparse layers from 1, DeepSeek from 0.
    first = 1 if "decoder_sparse_step" in config else 0
    sparse = [i for i in range(dense, layers) if (i + first) % step == 0 and i not in only]
    return {
        "experts": experts,
        "experts_per_token": size("num_experts_per_tok"),
        "expert_size": expert,
        "shared_size": size("shared_expert_intermediate_size", default=shared),
        "moe_layers": len(sparse),
    }


def _windows(config: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """What each layer keeps, in the spellings of Mistral, Qwen, Gemma and gpt-oss."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return (None,) * layers
    holds = isinstance(window, int) and window >= 1
    require(holds, f"{where}: sliding_window", window, "a number of tokens")
    if kinds := config.get("layer_types"):
        rule = f"{layers} names, one a layer"
        require(len(kinds) == layers, f"{where}: layer_types", len(kinds), rule)
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if config.get("use_sliding_window"):
        full = config.get("max_window_layers", 0)
        return tuple(window if layer >= full else None for layer in range(layers))
    every = config.get("sliding_window_pattern", 2 if config.get("model_type") == "gemma2" else 0)
    # Every `every`-th layer sees all; Mistral has no such layer.
    return tuple(None if every and (i + 1) % every == 0 else window for i in range(layers))
