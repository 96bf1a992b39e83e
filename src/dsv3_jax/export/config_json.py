"""config.json of a Hugging Face checkpoint to ModelConfig, and back.

Read in the two forms there are: the hub's (`rope_theta`, `rope_scaling`, `scoring_func`,
`topk_method`) and that of transformers 5 (`rope_parameters`; sigmoid and noaux_tc go without
saying). Written in the hub's form, which transformers 5, older ones and llama.cpp all read.
Imports no JAX.
"""

from collections.abc import Iterable
from typing import Any

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.config.checks import require
from dsv3_jax.export.names import BLOCK, count_mtp_modules

MODEL_TYPES = ("deepseek_v3", "kimi_k2")

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
    *("num_hidden_layers", "first_k_dense_replace", "num_attention_heads", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts"),
    *("num_experts_per_tok", "max_position_embeddings"),
)
_IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
"""Fields of which one value is implemented; where a file lacks the field, it means that value."""

_YARN_NUMBERS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.0, "mscale_all_dim": 0.0}
"""What transformers takes for an absent field; an mscale of 0 is no mscale."""
_YARN_IMPLEMENTED = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1.0}


def model_config_from_hub(
    config: dict[str, Any], tensor_names: Iterable[str], *, file: str = "config.json"
) -> ModelConfig:
    """The model that a checkpoint's config.json and tensors describe.

    The tensors decide how many MTP modules there are: transformers 5 writes
    `num_nextn_predict_layers` whether it stores them or not. Raises ValueError for a field that is
    missing, wrong or not implemented, naming `file`, field, the value found and what was expected.
    """
    fields = _Fields(config, file)
    model_type = fields.get("model_type", None)
    fields.require(model_type in MODEL_TYPES, "model_type", " or ".join(MODEL_TYPES))
    for name, value in _IMPLEMENTED.items():
        fields.require(fields.get(name, value) == value, name, f"{value!r} (nothing else is built)")
    sizes = {name: fields.integer(name) for name in _SIZES}
    heads = fields.get("num_key_value_heads", None)
    fields.require(
        heads in (None, sizes["num_attention_heads"]),
        "num_key_value_heads",
        f"num_attention_heads = {sizes['num_attention_heads']}",
    )
    _check_quantization(fields)
    values: dict[str, Any] = dict(
        **sizes,
        q_lora_rank=fields.optional_integer("q_lora_rank", None),
        n_shared_experts=fields.optional_integer("n_shared_experts", 0),
        n_group=fields.optional_integer("n_group", 1),
        topk_group=fields.optional_integer("topk_group", 1),
        norm_topk_prob=fields.boolean("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
        scoring_func=fields.get("scoring_func", "sigmoid"),
        topk_method=fields.get("topk_method", "noaux_tc"),
        num_nextn_predict_layers=count_mtp_modules(tensor_names, sizes["num_hidden_layers"]),
        rms_norm_eps=fields.number("rms_norm_eps"),
        initializer_range=fields.number("initializer_range", default=0.02),
        bos_token_id=fields.token_ids("bos_token_id", default=0, several=False),
        eos_token_id=fields.token_ids("eos_token_id", default=1, several=True),
        **_rope(fields, sizes["max_position_embeddings"]),
    )
    try:
        return ModelConfig(**values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def hub_config(
    config: ModelConfig, weights: str, *, power_of_two_scales: bool = False
) -> dict[str, Any]:
    """What config.json holds for a checkpoint stored in `weights`.

    `power_of_two_scales` says that every FP8 scale is one, as DeepSeek-V3.1's are (`ue8m0`). Raises
    ValueError for a router that `deepseek_v3` models do not have: transformers would read the file
    and compute another model.
    """
    require(config.scoring_func == "sigmoid", "model.scoring_func", config.scoring_func, "sigmoid")
    require(config.topk_method == "noaux_tc", "model.topk_method", config.topk_method, "noaux_tc")
    is_fp8 = weights == "float8_e4m3fn"
    fields = dict(
        architectures=["DeepseekV3ForCausalLM"],
        model_type="deepseek_v3",
        **_IMPLEMENTED,
        **{name: getattr(config, name) for name in _SIZES},
        num_key_value_heads=config.num_attention_heads,
        q_lora_rank=config.q_lora_rank,
        n_shared_experts=config.n_shared_experts,
        n_group=config.n_group,
        topk_group=config.topk_group,
        norm_topk_prob=config.norm_topk_prob,
        routed_scaling_factor=float(config.routed_scaling_factor),
        scoring_func=config.scoring_func,
        topk_method=config.topk_method,
        num_nextn_predict_layers=config.num_nextn_predict_layers,
        rms_norm_eps=float(config.rms_norm_eps),
        rope_theta=float(config.rope_theta),
        rope_scaling=_rope_scaling(config.rope_scaling),
        initializer_range=float(config.initializer_range),
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        attention_dropout=0.0,
        ep_size=1,
        pretraining_tp=1,
        seq_aux=True,
        torch_dtype="bfloat16" if is_fp8 else weights,
        use_cache=True,
    )
    if is_fp8:
        fields["quantization_config"] = dict(
            activation_scheme="dynamic",
            fmt="e4m3",
            quant_method="fp8",
            weight_block_size=[BLOCK, BLOCK],
        )
        if power_of_two_scales:
            fields["quantization_config"]["scale_fmt"] = "ue8m0"
    return dict(sorted(fields.items()))


class _Fields:
    """Typed access to a JSON object whose errors name the file and the field."""

    def __init__(self, values: Any, file: str, prefix: str = ""):
        self.file, self.prefix = file, prefix
        if not isinstance(values, dict):
            name = f"{file}: {prefix}".rstrip(".: ")
            raise ValueError(f"{name} is {values!r}, expected a JSON object")
        self.values: dict[str, Any] = values

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def error(self, name: str, expected: str) -> ValueError:
        found = f"is {self.values[name]!r}" if name in self.values else "is missing"
        return ValueError(f"{self.file}: {self.prefix}{name} {found}, expected {expected}")

    def require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise self.error(name, expected)

    def integer(self, name: str) -> int:
        value = self.get(name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, "an integer")
        return value

    def optional_integer[T](self, name: str, null: T) -> int | T:
        """An integer that must be there, though it may be null; `null` is what that means."""
        return null if self.get(name, 0) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        """`default` holds for null too."""
        value = self.get(name, None)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.get(name, None)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def token_ids(self, name: str, default: int, *, several: bool) -> Any:
        """One id, a tuple of them where `several` may be, or None."""
        found = self.get(name, default)
        ids = found if several and isinstance(found, list) else [found]
        if found is not None and not all(type(value) is int for value in ids):
            raise self.error(name, f"a token id,{' a list of them,' * several} or null")
        return tuple(found) if isinstance(found, list) else found

    def section(self, name: str) -> "_Fields | None":
        value = self.get(name, None)
        return None if value is None else _Fields(value, self.file, f"{self.prefix}{name}.")


def _check_quantization(fields: _Fields) -> None:
    quantization = fields.section("quantization_config")
    if quantization is None:
        return
    for name, expected in (
        ("quant_method", "fp8"),
        ("fmt", "e4m3"),
        ("activation_scheme", "dynamic"),
        ("weight_block_size", [BLOCK, BLOCK]),
    ):
        default = None if name in ("quant_method", "weight_block_size") else expected
        holds = quantization.get(name, default) == expected
        quantization.require(holds, name, f"{expected!r} (nothing else is read)")
    scale_format = quantization.get("scale_fmt", None)
    quantization.require(
        scale_format in (None, "float", "ue8m0"), "scale_fmt", "'ue8m0', 'float' or none"
    )


def _rope(fields: _Fields, max_position_embeddings: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of ModelConfig; where a file has both forms, they agree or
    `rope_scaling` holds, as in transformers."""
    nested = fields.section("rope_scaling") or fields.section("rope_parameters")
    theta = fields.number("rope_theta", default=10000.0)
    if nested is None:
        return {"rope_theta": theta, "rope_scaling": None}
    theta = nested.number("rope_theta", default=theta)
    key = "type" if "rope_type" not in nested.values and "type" in nested.values else "rope_type"
    kind = nested.get(key, "default")
    nested.require(kind in ("default", "yarn"), key, "'default' or 'yarn'")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    for name, value in _YARN_IMPLEMENTED.items():
        found = nested.get(name, value)
        nested.require(found is None or found == value, name, f"{value!r} (nothing else is built)")
    length = "original_max_position_embeddings"
    original = nested.integer(length) if length in nested.values else max_position_embeddings
    numbers = {n: nested.number(n, default=default) for n, default in _YARN_NUMBERS.items()}
    try:
        yarn = YarnConfig(
            factor=nested.number("factor"), original_max_position_embeddings=original, **numbers
        )
    except ValueError as error:
        raise ValueError(f"{fields.file}: {error}") from error
    return {"rope_theta": theta, "rope_scaling": yarn}


def _rope_scaling(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    return dict(
        beta_fast=float(yarn.beta_fast),
        beta_slow=float(yarn.beta_slow),
        factor=float(yarn.factor),
        mscale=float(yarn.mscale),
        mscale_all_dim=float(yarn.mscale_all_dim),
        original_max_position_embeddings=yarn.original_max_position_embeddings,
        type="yarn",
    )
