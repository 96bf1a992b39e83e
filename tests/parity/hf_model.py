"""Hugging Face DeepSeek-V3 models with random weights, in float32 and in true float64.

Runs under the parity environment (see make_golden.py), never under the project's.
"""

import copy
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as hf

ROUTING_MARGIN = 3e-4
BIAS = "e_score_correction_bias"


def build_model(fields: dict, seed: int) -> DeepseekV3ForCausalLM:
    """A float32 model, eager attention and experts, its weights drawn from NumPy's `seed`."""
    config = DeepseekV3Config(**fields, architectures=["DeepseekV3ForCausalLM"], dtype="float32")
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(config).float().eval()
    randomise(model, np.random.default_rng(seed))
    return model


def randomise(model: torch.nn.Module, generator: np.random.Generator) -> None:
    """Overwrites every weight: logits get a standard deviation near 0.7, router logits near 1.5."""
    for name, tensor in sorted(model.state_dict().items()):
        noise = generator.standard_normal(tuple(tensor.shape))
        tensor.copy_(torch.from_numpy(_scaled(name, noise)))


def _scaled(name: str, noise: np.ndarray) -> np.ndarray:
    if name.endswith(BIAS):
        return 0.05 * noise
    if noise.ndim == 1:
        return 1 + 0.1 * noise
    if name.endswith("embed_tokens.weight"):
        return 0.5 * noise
    gain = {"mlp.gate.weight": 1.5, "lm_head.weight": 0.7}
    scale = next((value for suffix, value in gain.items() if name.endswith(suffix)), 0.9)
    return scale * noise / np.sqrt(noise.shape[-1])


def hub_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values under the hub's names: stacked experts become one tensor per expert."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            result |= _per_expert(name, "gate_proj", gate) | _per_expert(name, "up_proj", up)
        elif name.endswith("experts.down_proj"):
            result |= _per_expert(name, "down_proj", tensor)
        else:
            result[name] = tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def _per_expert(name: str, projection: str, stacked: torch.Tensor) -> dict[str, torch.Tensor]:
    prefix = name.rpartition(".")[0]
    return {f"{prefix}.{i}.{projection}.weight": one for i, one in enumerate(stacked)}


@contextmanager
def float32_means_float64():
    """Within, `torch.float32` and `torch.float` name float64.

    The model casts to float32 by those names in RMSNorm, router, softmax and rotary embedding,
    whatever its weights are, so `.double()` alone leaves it at float32 accuracy.
    """
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
    ):
        yield


def float64_model(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy. Run it inside `float32_means_float64`; frequencies are recomputed there."""
    result = copy.deepcopy(model).double()
    with float32_means_float64():
        for module in list(result.modules()):
            for name, child in module.named_children():
                if isinstance(child, hf.DeepseekV3RotaryEmbedding):
                    setattr(module, name, hf.DeepseekV3RotaryEmbedding(child.config))
    for module in result.modules():
        module.register_forward_hook(_assert_float64)
    assert all(b.dtype == torch.float64 for b in result.buffers())
    return result


def _assert_float64(module, inputs, output) -> None:
    outputs = output if isinstance(output, tuple) else (output,)
    for value in outputs:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float64, f"{type(module).__name__} gave {value.dtype}"


def next_token_loss(model: DeepseekV3ForCausalLM, tokens: torch.Tensor):
    """Logits [B, T, V] and the mean cross entropy of tokens[:, 1:] given tokens[:, :-1]."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return logits, functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class RouterRecord:
    """Remembers every router call of a model: chosen experts and how near the choice was to a tie.

    `top_k_index` maps a router's name to the experts [tokens, k] of its last call, ascending;
    `margin` is the least gap between a chosen and a passed-over score, experts and groups alike.
    """

    def __init__(self, model: torch.nn.Module):
        self.top_k_index: dict[str, torch.Tensor] = {}
        self.margin = float("inf")
        for name, module in model.named_modules():
            if isinstance(module, hf.DeepseekV3TopkRouter):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str):
        def record(router, inputs, output):
            logits, _, index = output
            self.top_k_index[name] = index.sort(dim=-1).values
            self.margin = min(self.margin, _margin(router, logits.detach()))

        return record


def _margin(router, logits: torch.Tensor) -> float:
    scores = logits.sigmoid() + router.e_score_correction_bias
    grouped = scores.unflatten(-1, (router.num_group, -1))
    group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    kept = group_scores.topk(router.topk_group, dim=-1).indices
    allowed = torch.zeros_like(group_scores).scatter(1, kept, 1).bool()
    scores = grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(-2)
    return min(_gap(group_scores, router.topk_group), _gap(scores, router.top_k))


def _gap(scores: torch.Tensor, kept: int) -> float:
    """The least difference between the last kept and the first dropped score of any row."""
    if kept == scores.shape[-1]:
        return float("inf")
    ordered = scores.sort(dim=-1, descending=True).values
    return (ordered[:, kept - 1] - ordered[:, kept]).min().item()
