"""Writing golden files, comparing them, and the checks that every one must pass."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from golden_cases import GoldenCase
from hf_model import hub_tensors
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM


def draw_tokens(case: GoldenCase, seed: int) -> torch.Tensor:
    """Uniform token ids, int64 [batch, length + 1]."""
    generator = np.random.default_rng([seed, 1])
    shape = (case.batch, case.length + 1)
    return torch.from_numpy(generator.integers(0, case.fields["vocab_size"], shape))


def save_checkpoint(model: DeepseekV3ForCausalLM, directory: Path) -> None:
    """Writes config.json and model.safetensors; asserts that hub_tensors gives the same tensors."""
    model.save_pretrained(directory)
    saved = load_file(directory / "model.safetensors")
    expected = hub_tensors(model.state_dict())
    assert saved.keys() == expected.keys(), saved.keys() ^ expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def save_golden(tensors: dict[str, torch.Tensor], directory: Path, metadata: dict) -> None:
    """Writes golden.safetensors, its metadata given as strings."""
    directory.mkdir(parents=True, exist_ok=True)
    text = {name: str(value) for name, value in metadata.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "golden.safetensors", metadata=text)


def check_gradient(
    model: torch.nn.Module, loss_of: Callable, tokens: torch.Tensor, step: float = 1e-5
) -> None:
    """Asserts that the slope by `.grad` along a random direction is the central difference.

    `loss_of(model, tokens)` returns (logits, loss). The model must be in float64, where the two
    agree to 1e-6; were any part in float32, they would differ by about 1e-2.
    """
    generator = torch.Generator().manual_seed(0)
    weights = list(model.parameters())
    directions = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
    slope = sum((w.grad * d).sum() for w, d in zip(weights, directions, strict=True)).item()
    losses = []
    with torch.no_grad():
        for distance in (step, -2 * step, step):
            for weight, direction in zip(weights, directions, strict=True):
                weight.add_(distance * direction)
            losses.append(loss_of(model, tokens)[1].item())
    measured = (losses[0] - losses[1]) / (2 * step)
    assert math.isclose(slope, measured, rel_tol=1e-6, abs_tol=1e-8), (slope, measured)


def differences(made: Path, committed: Path) -> list[str]:
    """The files that only one directory has or that say something else in the other."""
    files = {p.relative_to(root) for root in (made, committed) for p in root.rglob("*.*")}
    return [str(file) for file in sorted(files) if not _agree(made / file, committed / file)]


def _agree(first: Path, second: Path) -> bool:
    if not (first.is_file() and second.is_file()):
        return False
    if first.suffix != ".safetensors":
        return first.read_bytes() == second.read_bytes()
    one, other = load_file(first), load_file(second)
    if one.keys() != other.keys():
        return False
    exact = first.name == "model.safetensors"
    return all(_close(tensor, other[name], exact) for name, tensor in one.items())


def _close(one: torch.Tensor, other: torch.Tensor, exact: bool) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if exact or not one.is_floating_point():
        return torch.equal(one, other)
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)
