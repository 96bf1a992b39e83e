"""The one two-way table of tensor names: hub checkpoint on one side, NNX model on the other.

A hub file has one tensor for each layer, expert and projection; the model stacks them. An entry
says where one hub tensor lies in the stack:

    model.layers.9.mlp.experts.7.up_proj.weight   [2048, 7168]
        = moe_layers.mlp.experts.gate_up_proj[6, 7, 1]   (three dense layers come first; 1 is up)

The MTP module of depth k is hub layer num_hidden_layers + k - 1, its block without a name of its
own, with copies of the main model's embedding and head. Imports no JAX.
Source: the released checkpoint's index; DeepSeek's README_WEIGHTS.md.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from dsv3_jax.config import ModelConfig

BLOCK = 128
"""Rows and columns of an FP8 weight that share one scale."""
SCALE_SUFFIX = "_scale_inv"

Storage = Literal["quantised", "plain", "float32"]
"""How a checkpoint stores a tensor: in FP8 blocks where it has any, in its own dtype (BF16, say)
at most, or in FP32 always."""

_MTP_ONLY = r"(?:enorm|hnorm|eh_proj|shared_head\.norm|shared_head\.head|embed_tokens)"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One hub tensor and the slice `index` of the model's array `path` that it is."""

    hub_name: str
    path: tuple[str, ...]
    index: tuple[int, ...]
    shape: tuple[int, ...]
    storage: Storage
    is_copy: bool = False
    """Another hub tensor holds the same values; written, but not needed to load."""

    @property
    def scale_name(self) -> str:
        """Hub name of the FP8 block scales, e.g. `....q_a_proj.weight_scale_inv`."""
        return self.hub_name + SCALE_SUFFIX

    @property
    def scale_path(self) -> tuple[str, ...]:
        """Where the model keeps them: beside the weight."""
        return (*self.path[:-1], self.path[-1] + SCALE_SUFFIX)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return scale_shape(self.shape)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Number of blocks along the last two dims, ragged ones included: [576, 7168] has [5, 56]."""
    *stacked, rows, columns = shape
    return (*stacked, -(-rows // BLOCK), -(-columns // BLOCK))


def tensor_entries(config: ModelConfig) -> Iterator[TensorEntry]:
    """Every tensor of the model in the order of the released files, MTP modules last.

    >>> sum(1 for _ in tensor_entries(deepseek_v3))  # 91,991 with one scale for each quantised one
    46183
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    yield _plain("model.embed_tokens.weight", ("embed_tokens", "weight"), (), vocabulary)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        routed = layer >= config.num_dense_layers
        if routed:
            yield from _block(config, prefix, ("moe_layers",), layer - config.num_dense_layers)
        else:
            yield from _block(config, prefix, ("dense_layers",), layer, routed=False)
    yield _plain("model.norm.weight", ("norm", "weight"), (), (config.hidden_size,))
    yield _plain("lm_head.weight", ("lm_head", "weight"), (), vocabulary)
    for depth in range(config.num_nextn_predict_layers):
        yield from _mtp_module(config, depth)


def count_mtp_modules(tensor_names: Iterable[str], num_hidden_layers: int) -> int:
    """How many MTP modules the tensors of a checkpoint make up.

    Layers from `num_hidden_layers` on count where they have a tensor that only MTP modules have.
    """
    last = num_hidden_layers - 1
    for name in tensor_names:
        match = re.match(rf"model\.layers\.(\d+)\.{_MTP_ONLY}\.weight$", name)
        if match:
            last = max(last, int(match[1]))
    return last + 1 - num_hidden_layers


def is_ignored(hub_name: str) -> bool:
    """Whether a checkpoint may have this tensor though no model has.

    Moonlight and Kimi-K2 store their rotary frequencies, which follow from the config.
    """
    return hub_name.endswith(".self_attn.rotary_emb.inv_freq")


def _plain(
    hub_name: str, path: tuple[str, ...], index: tuple[int, ...], shape: tuple[int, ...]
) -> TensorEntry:
    return TensorEntry(hub_name, path, index, shape, "plain")


def _mtp_module(config: ModelConfig, depth: int) -> Iterator[TensorEntry]:
    prefix = f"model.layers.{config.num_hidden_layers + depth}."
    hidden = config.hidden_size
    vocabulary = (config.vocab_size, hidden)
    yield TensorEntry(
        prefix + "embed_tokens.weight", ("embed_tokens", "weight"), (), vocabulary, "plain", True
    )
    for name in ("enorm", "hnorm"):
        yield _plain(prefix + name + ".weight", ("mtp", name, "weight"), (depth,), (hidden,))
    eh_proj = (hidden, 2 * hidden)
    yield _plain(prefix + "eh_proj.weight", ("mtp", "eh_proj", "weight"), (depth,), eh_proj)
    yield from _block(config, prefix, ("mtp", "block"), depth)
    norm = ("mtp", "shared_head", "norm", "weight")
    yield _plain(prefix + "shared_head.norm.weight", norm, (depth,), (hidden,))
    yield TensorEntry(
        prefix + "shared_head.head.weight", ("lm_head", "weight"), (), vocabulary, "plain", True
    )


def _block(
    config: ModelConfig, prefix: str, path: tuple[str, ...], layer: int, routed: bool = True
) -> Iterator[TensorEntry]:
    """One block; `layer` counts within its stack."""
    hidden = (config.hidden_size,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield _plain(f"{prefix}{name}.weight", (*path, name, "weight"), (layer,), hidden)
    for name, shape in _attention_shapes(config).items():
        yield TensorEntry(
            f"{prefix}self_attn.{name}.weight",
            (*path, "self_attn", name, "weight"),
            (layer,),
            shape,
            "quantised" if len(shape) == 2 else "plain",
        )
    if routed:
        yield from _moe(config, f"{prefix}mlp.", (*path, "mlp"), layer)
    else:
        yield from _mlp(config, f"{prefix}mlp.", (*path, "mlp"), layer, config.intermediate_size)


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Matrices and, of one dim, norms."""
    c, heads = config, config.num_attention_heads
    queries = heads * c.qk_head_dim
    if c.q_lora_rank is None:
        shapes: dict[str, tuple[int, ...]] = {"q_proj": (queries, c.hidden_size)}
    else:
        shapes = {
            "q_a_proj": (c.q_lora_rank, c.hidden_size),
            "q_a_layernorm": (c.q_lora_rank,),
            "q_b_proj": (queries, c.q_lora_rank),
        }
    return shapes | {
        "kv_a_proj_with_mqa": (c.kv_lora_rank + c.qk_rope_head_dim, c.hidden_size),
        "kv_a_layernorm": (c.kv_lora_rank,),
        "kv_b_proj": (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        "o_proj": (c.hidden_size, heads * c.v_head_dim),
    }


def _mlp(
    config: ModelConfig, prefix: str, path: tuple[str, ...], layer: int, width: int
) -> Iterator[TensorEntry]:
    for name in ("gate_proj", "up_proj", "down_proj"):
        shape = _projection_shape(name, config.hidden_size, width)
        yield TensorEntry(
            f"{prefix}{name}.weight", (*path, name, "weight"), (layer,), shape, "quantised"
        )


def _moe(
    config: ModelConfig, prefix: str, path: tuple[str, ...], layer: int
) -> Iterator[TensorEntry]:
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    gate = (experts, config.hidden_size)
    yield _plain(f"{prefix}gate.weight", (*path, "gate", "weight"), (layer,), gate)
    if config.has_selection_bias:
        bias = "e_score_correction_bias"
        yield TensorEntry(
            f"{prefix}gate.{bias}", (*path, "gate", bias), (layer,), (experts,), "float32"
        )
    for expert in range(experts):
        for name, stack, which in (
            ("gate_proj", "gate_up_proj", (0,)),
            ("up_proj", "gate_up_proj", (1,)),
            ("down_proj", "down_proj", ()),
        ):
            yield TensorEntry(
                f"{prefix}experts.{expert}.{name}.weight",
                (*path, "experts", stack),
                (layer, expert, *which),
                _projection_shape(name, config.hidden_size, width),
                "quantised",
            )
    if config.n_shared_experts:
        shared = (*path, "shared_experts")
        width *= config.n_shared_experts
        yield from _mlp(config, f"{prefix}shared_experts.", shared, layer, width)


def _projection_shape(name: str, hidden: int, width: int) -> tuple[int, int]:
    return (hidden, width) if name == "down_proj" else (width, hidden)
