"""Writes tests/parity/golden/: checkpoints with Hugging Face's logits, gradients and more.

Make the environment once and run, from anywhere; takes about ten seconds on one core:

    python3.11 -m venv /tmp/parity
    /tmp/parity/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors
    /tmp/parity/bin/python tests/parity/make_golden.py [--check]

`--check` writes elsewhere and compares with the committed files instead: text, integers and
weights exactly, computed values to 1e-5 (another processor rounds otherwise). README.md says what
each file holds.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from golden_cases import ADAMW, CASES, GENERATE_FROM, MTP, GoldenCase
from golden_files import check_gradient, differences, draw_tokens, save_checkpoint, save_golden
from golden_mtp import write_mtp
from hf_model import (
    ROUTING_MARGIN,
    RouterRecord,
    build_model,
    float32_means_float64,
    float64_model,
    hub_tensors,
    next_token_loss,
)
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

GOLDEN = Path(__file__).parent / "golden"
ADAMW_ROUTING_MARGIN = 2e-5
TOP_2_GAP = 5e-3
ADAMW_STEPS = 50
NEW_TOKENS = 24
PROMPT_LENGTHS = (7, 12)


def float64_reference(model: DeepseekV3ForCausalLM, tokens: torch.Tensor) -> dict:
    """Logits, loss, gradients by hub name, chosen experts and the routing margin, in float64."""
    reference = float64_model(model)
    record = RouterRecord(reference)
    with float32_means_float64():
        logits, loss = next_token_loss(reference, tokens)
        loss.backward()
        top_k_index, margin = dict(record.top_k_index), record.margin
        check_gradient(reference, next_token_loss, tokens)
    gradients = {name: weight.grad for name, weight in reference.named_parameters()}
    return dict(
        logits=logits.detach(),
        loss=loss.detach(),
        gradients=hub_tensors(gradients),
        top_k_index={int(name.split(".")[2]): index for name, index in top_k_index.items()},
        margin=margin,
    )


def write_case(case: GoldenCase, directory: Path) -> dict:
    """Writes one checkpoint and its golden.safetensors; returns a summary of the numbers."""
    for seed in range(case.first_seed, case.first_seed + 100):
        model, tokens = build_model(case.fields, seed), draw_tokens(case, seed)
        reference = float64_reference(model, tokens)
        if reference["margin"] >= ROUTING_MARGIN:
            break
    else:
        raise RuntimeError(f"{case.name}: no seed keeps all routing clear of ties")
    logits, loss = next_token_loss(model, tokens)
    loss.backward()
    save_checkpoint(model, directory)
    golden = dict(
        tokens=tokens.to(torch.int32),
        logits=logits.detach(),
        logits_float64=reference["logits"],
        loss=loss.detach(),
        loss_float64=reference["loss"],
    )
    golden |= {f"grad.{k}": v.float() for k, v in reference["gradients"].items()}
    golden |= {
        f"top_k_index.{layer}": index.unflatten(0, (case.batch, case.length)).to(torch.int32)
        for layer, index in reference["top_k_index"].items()
    }
    metadata = dict(seed=seed, routing_margin=f"{reference['margin']:.2e}")
    save_golden(golden, directory, metadata)
    if case.writes_hub_config:
        write_hub_config(case, directory, tokens, golden["logits"])
    float32_gradients = hub_tensors({n: w.grad for n, w in model.named_parameters()})
    return metadata | dict(
        logits_std=f"{logits.std().item():.2f}",
        logits_noise=f"{(logits - reference['logits']).abs().max().item():.1e}",
        gradient_noise=f"{relative_error(float32_gradients, reference['gradients']):.1e}",
    )


def relative_error(measured: dict, reference: dict) -> float:
    """The greatest error of any tensor, relative to that tensor's largest element."""
    return max(
        ((measured[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)).item()
        for name, value in reference.items()
        if value.abs().max() > 0
    )


def write_hub_config(case: GoldenCase, directory: Path, tokens, logits) -> None:
    """Writes config_hub.json in the form of deepseek-ai/DeepSeek-V3 and asserts it means the same.

    Left out against that file: `quantization_config` and `auto_map`, which name FP8 and remote
    code.
    """
    fields = dict(case.fields)
    rope = dict(fields.pop("rope_parameters"))
    mtp_layers = fields.pop("num_mtp_layers")
    rope_theta, rope["type"] = int(rope.pop("rope_theta")), rope.pop("rope_type")
    rope |= {name: int(rope[name]) for name in ("factor", "beta_fast", "beta_slow")}
    hub = fields | dict(
        architectures=["DeepseekV3ForCausalLM"],
        attention_bias=False,
        attention_dropout=0.0,
        aux_loss_alpha=0.001,
        ep_size=1,
        hidden_act="silu",
        initializer_range=0.02,
        model_type="deepseek_v3",
        moe_layer_freq=1,
        num_nextn_predict_layers=mtp_layers,
        pretraining_tp=1,
        rope_scaling=rope,
        rope_theta=rope_theta,
        scoring_func="sigmoid",
        seq_aux=True,
        topk_method="noaux_tc",
        torch_dtype="float32",
        transformers_version="4.33.1",
        use_cache=True,
    )
    path = directory / "config_hub.json"
    path.write_text(json.dumps(hub, indent=2, sort_keys=True) + "\n")
    config = DeepseekV3Config.from_json_file(path)
    same = DeepseekV3ForCausalLM.from_pretrained(
        directory, config=config, attn_implementation="eager", experts_implementation="eager"
    )
    assert torch.equal(next_token_loss(same, tokens)[0], logits)


def draw_chains(case: GoldenCase, seed: int) -> torch.Tensor:
    """Tokens [steps, batch, length + 1] with something to learn: each has two successors."""
    generator = np.random.default_rng([seed, 2])
    vocab = case.fields["vocab_size"]
    successors = generator.integers(0, vocab, (vocab, 2))
    tokens = np.empty((ADAMW_STEPS, case.batch, case.length + 1), np.int64)
    tokens[..., 0] = generator.integers(0, vocab, tokens.shape[:2])
    for t in range(case.length):
        choice = generator.integers(0, 2, tokens.shape[:2])
        tokens[..., t + 1] = successors[tokens[..., t], choice]
    return torch.from_numpy(tokens)


def train_adamw(model: DeepseekV3ForCausalLM, tokens: torch.Tensor):
    """Losses and gradient norms before clipping, [steps] each, of one AdamW run over `tokens`."""
    weights = list(model.parameters())
    matrices = [w for w in weights if w.ndim >= 2]
    norms = [w for w in weights if w.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=norms, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    losses, gradient_norms = [], []
    for batch in tokens:
        _, loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, max_norm=1.0, foreach=False)
        optimizer.step()
        losses.append(loss.detach())
        gradient_norms.append(norm.detach())
    return torch.stack(losses), torch.stack(gradient_norms)


def write_adamw(case: GoldenCase, directory: Path) -> dict:
    """Writes the initial checkpoint and 50 steps of AdamW from it."""
    for seed in range(case.first_seed, case.first_seed + 100):
        model, tokens = build_model(case.fields, seed), draw_chains(case, seed)
        reference = float64_model(model)
        record = RouterRecord(reference)
        with float32_means_float64():
            losses_float64, norms_float64 = train_adamw(reference, tokens)
        if record.margin >= ADAMW_ROUTING_MARGIN:
            break
    else:
        raise RuntimeError("adamw: no seed keeps all routing clear of ties")
    save_checkpoint(model, directory)
    losses, norms = train_adamw(model, tokens)
    golden = dict(
        tokens=tokens.to(torch.int32),
        losses=losses,
        gradient_norms=norms,
        losses_float64=losses_float64,
        gradient_norms_float64=norms_float64,
    )
    final = hub_tensors({n: w.detach() for n, w in reference.named_parameters()})
    golden |= {f"final.{name}": tensor.float() for name, tensor in final.items()}
    metadata = dict(seed=seed, routing_margin=f"{record.margin:.2e}")
    save_golden(golden, directory, metadata)
    float32_final = hub_tensors({n: w.detach() for n, w in model.named_parameters()})
    final_noise = max((float32_final[n] - value).abs().max().item() for n, value in final.items())
    return metadata | dict(
        loss=f"{losses[0].item():.3f} -> {losses[-1].item():.3f}",
        norm=f"{norms.min().item():.2f} to {norms.max().item():.2f}",
        loss_noise=f"{(losses - losses_float64).abs().max().item():.1e}",
        norm_noise=f"{((norms - norms_float64) / norms_float64).abs().max().item():.1e}",
        final_noise=f"{final_noise:.1e}",
    )


def continue_greedily(model: DeepseekV3ForCausalLM, prompt: torch.Tensor):
    """The NEW_TOKENS ids that `generate` adds to `prompt` [T], and each step's top-2 gap."""
    output = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(output.logits).topk(2, dim=-1).values
    return output.sequences[0, len(prompt) :], top[:, 0] - top[:, 1]


def write_generate(directory: Path) -> dict:
    """Writes prompts and their greedy continuations by the checkpoint `../GENERATE_FROM`."""
    source = directory.parent / GENERATE_FROM
    model = DeepseekV3ForCausalLM.from_pretrained(
        source, attn_implementation="eager", experts_implementation="eager"
    )
    model.generation_config.eos_token_id = None
    golden, summary = {}, {}
    for number, length in enumerate(PROMPT_LENGTHS):
        seed, prompt, ids, gaps = _clear_prompt(model, number, length)
        golden[f"prompt.{number}"] = prompt.to(torch.int32)
        golden[f"generated.{number}"] = ids.to(torch.int32)
        golden[f"top_2_gap.{number}"] = gaps
        summary[f"prompt_{number}"] = f"seed {seed}, least gap {gaps.min().item():.3f}"
    save_golden(golden, directory, dict(checkpoint=GENERATE_FROM) | summary)
    return summary


def _clear_prompt(model: DeepseekV3ForCausalLM, number: int, length: int):
    """The first random prompt whose continuation is varied and never near a tie."""
    record = RouterRecord(model)
    for seed in range(1000):
        record.margin = float("inf")
        generator = np.random.default_rng([seed, 3, number])
        prompt = torch.from_numpy(generator.integers(2, model.config.vocab_size, length))
        ids, gaps = continue_greedily(model, prompt)
        clear = gaps.min() >= TOP_2_GAP and record.margin >= ROUTING_MARGIN
        if clear and len(ids.unique()) >= NEW_TOKENS // 2 and not (ids == 1).any():
            return seed, prompt, ids, gaps
    raise RuntimeError("no prompt stays clear of ties")


def write_all(root: Path) -> None:
    """Writes every golden directory under `root` and prints a line for each."""
    makers = {case.name: lambda path, case=case: write_case(case, path) for case in CASES}
    makers["adamw"] = lambda path: write_adamw(ADAMW, path)
    makers["generate"] = write_generate
    makers["mtp"] = lambda path: write_mtp(MTP, path)
    for name, make in makers.items():
        summary = make(root / name)
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in summary.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    logging.disable_progress_bar()
    if not arguments.check:
        return write_all(GOLDEN)
    with tempfile.TemporaryDirectory() as directory:
        write_all(Path(directory))
        changed = differences(Path(directory), GOLDEN)
    sys.exit("differ from the committed files: " + ", ".join(changed) if changed else 0)


if __name__ == "__main__":
    main()
