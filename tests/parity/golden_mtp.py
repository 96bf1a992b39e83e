"""The multi-token prediction golden file: a module of Hugging Face's MtpModel, read by its code.

Transformers keeps the module out of DeepseekV3ForCausalLM and uses it in speculative decoding only.
"""

import re
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from golden_cases import GoldenCase
from golden_files import check_gradient, draw_tokens, save_checkpoint, save_golden
from hf_model import (
    ROUTING_MARGIN,
    RouterRecord,
    build_model,
    float32_means_float64,
    float64_model,
    hub_tensors,
    randomise,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel


class WithMtp(torch.nn.Module):
    """A main model and its one MTP module, which share embedding and head."""

    def __init__(self, main: DeepseekV3ForCausalLM, mtp: MtpModel):
        super().__init__()
        self.main, self.mtp = main, mtp

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Main and MTP logits [B, T, V] of tokens [B, T + 1]: position i reads tokens[:, : i + 1]
        and, for MTP, tokens[:, i + 1] too; they predict tokens[:, i + 1] and tokens[:, i + 2]."""
        hidden = self.main.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        positions = torch.arange(1, tokens.shape[1])[None]
        mtp_hidden = self.mtp.forward_layer(0, hidden, positions, None, input_ids=tokens[:, 1:])
        return self.main.lm_head(hidden), self.mtp.shared_head(mtp_hidden)


def mtp_loss(model: WithMtp, tokens: torch.Tensor):
    """MTP logits and their mean cross entropy over the T - 1 positions that have a target."""
    _, logits = model(tokens)
    return logits, functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 2:].flatten())


def build_with_mtp(fields: dict, seed: int) -> WithMtp:
    """A float32 main model and MTP module with weights drawn from `seed`."""
    main = build_model(fields, seed)
    mtp = MtpModel(main, 1).float().eval()
    randomise(mtp.layers, np.random.default_rng([seed, 4]))
    return WithMtp(main, mtp)


def hub_mtp_tensors(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Tensors of a WithMtp under the hub's names: the module is layer number `layers`."""
    return hub_tensors({_hub_name(name, layers): tensor for name, tensor in tensors.items()})


def _hub_name(name: str, layers: int) -> str:
    if name.startswith("main."):
        return name.removeprefix("main.")
    name = re.sub(r"^mtp\.(layers\.0\.(mtp_block\.)?)?", f"model.layers.{layers}.", name)
    return name.replace("post_norm", "shared_head.norm").replace(
        "shared_head.weight", "shared_head.head.weight"
    )


def write_mtp(case: GoldenCase, directory: Path) -> dict:
    """Writes a checkpoint with MTP tensors as on the hub, its logits and its MTP gradients."""
    for seed in range(case.first_seed, case.first_seed + 100):
        model, tokens = build_with_mtp(case.fields, seed), draw_tokens(case, seed)
        reference = float64_model(model)
        record = RouterRecord(reference)
        with float32_means_float64(), torch.no_grad():
            logits_float64, mtp_logits_float64 = reference(tokens)
        if record.margin >= ROUTING_MARGIN:
            break
    else:
        raise RuntimeError("mtp: no seed keeps all routing clear of ties")
    layers = case.fields["num_hidden_layers"]
    save_with_mtp(model, layers, directory)
    with torch.no_grad():
        logits, mtp_logits = model(tokens)
        same = read_by_transformers(directory, layers)(tokens)
    assert torch.equal(same[0], logits) and torch.equal(same[1], mtp_logits)
    gradients, loss = _mtp_gradients(reference, tokens, layers)
    golden = dict(
        tokens=tokens.to(torch.int32),
        logits=logits,
        logits_float64=logits_float64,
        mtp_logits=mtp_logits,
        mtp_logits_float64=mtp_logits_float64,
        mtp_loss_float64=loss,
    )
    golden |= {f"mtp_grad.{name}": tensor.float() for name, tensor in gradients.items()}
    metadata = dict(seed=seed, routing_margin=f"{record.margin:.2e}")
    save_golden(golden, directory, metadata)
    noise = (mtp_logits - mtp_logits_float64).abs().max().item()
    return metadata | dict(
        mtp_logits_std=f"{mtp_logits.std().item():.2f}", mtp_logits_noise=f"{noise:.1e}"
    )


def _mtp_gradients(reference: WithMtp, tokens: torch.Tensor, layers: int):
    """Float64 gradients of mtp_loss by hub name, and that loss; zero where it does not reach."""
    with float32_means_float64():
        _, loss = mtp_loss(reference, tokens)
        loss.backward()
        check_gradient(reference, mtp_loss, tokens)
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    return hub_mtp_tensors(gradients, layers), loss.detach()


def save_with_mtp(model: WithMtp, layers: int, directory: Path) -> None:
    """Writes the main checkpoint, then adds the MTP tensors, copies of embedding and head too."""
    save_checkpoint(model.main, directory)
    path = directory / "model.safetensors"
    tensors = load_file(path) | hub_mtp_tensors(model.state_dict(), layers)
    save_file({name: t.clone() for name, t in tensors.items()}, path, metadata=dict(format="pt"))


def read_by_transformers(directory: Path, layers: int) -> WithMtp:
    """The same model as transformers reads it, once told that MTP is layer `layers` and not 61."""
    patterns = [rf"model\.layers\.{layers}\..*"]
    with mock.patch.object(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns):
        main = DeepseekV3ForCausalLM.from_pretrained(
            directory, attn_implementation="eager", experts_implementation="eager"
        )
    main._keys_to_ignore_on_load_unexpected = set(patterns)
    return WithMtp(main, MtpModel.from_pretrained(main, device_map={"": "cpu"}).eval())
