"""Times Hugging Face's DeepSeek-V3 on the work of our `bench_tiny` config; prints one JSON object.

    /tmp/parity/bin/python tests/parity/bench_hf.py [--modes default,eager] [--compile]

Training is forward, backward, clipping to 1.0 and AdamW on 8 x 256 tokens; generation is greedy, a
16-token prompt and 64 new tokens, its tokens per second counting new tokens over the whole call.
All in float32, sdpa attention, 2 threads. Modes: `default` (experts grouped_mm), `eager` (a loop
over experts), and `compile` (the default under torch.compile; its first step takes two minutes).
Matmul peaks around each training run, in GFLOP/s, tell how busy the machine was: compare only runs
whose peaks agree. Use the medians: steps stall at times.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch.nn import functional
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

BENCH_TINY = dict(
    vocab_size=8192,
    hidden_size=256,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=512,
    moe_intermediate_size=128,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    max_position_embeddings=2048,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    num_mtp_layers=0,
)
TRAIN_SHAPE = (8, 256)
PROMPT_TOKENS, NEW_TOKENS = 16, 64


def build_model(experts: str | None) -> DeepseekV3ForCausalLM:
    """A float32 model whose random router bias and norms make routing uneven, as when trained."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**BENCH_TINY, dtype="float32")
    config._attn_implementation = "sdpa"
    config._experts_implementation = experts
    model = DeepseekV3ForCausalLM(config).float()
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.ndim >= 2 or weight.shape == (BENCH_TINY["n_routed_experts"],):
                weight.normal_(std=0.05)
            else:
                weight.normal_(mean=1, std=0.1)
    return model


def spread(work: int, seconds: list[float]) -> dict[str, float]:
    """Tokens per second at the median and the median, least and greatest seconds."""
    median = statistics.median(seconds)
    return dict(
        tokens_per_second=round(work / median, 1),
        median_seconds=round(median, 4),
        min_seconds=round(min(seconds), 4),
        max_seconds=round(max(seconds), 4),
        repeats=len(seconds),
    )


def time_calls(call: Callable[[], object], repeats: int, warmup: int) -> list[float]:
    """Seconds of each of `repeats` calls after `warmup` untimed ones."""
    seconds = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def bench_train(model: DeepseekV3ForCausalLM, compiled: bool, steps: int) -> dict[str, float]:
    """Timing of full training steps."""
    batch, length = TRAIN_SHAPE
    tokens = torch.randint(0, BENCH_TINY["vocab_size"], (batch, length + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward = torch.compile(model) if compiled else model
    model.train()

    def step() -> None:
        logits = forward(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return spread(batch * length, time_calls(step, steps, warmup=2))


def bench_generate(model: DeepseekV3ForCausalLM, batch: int, repeats: int) -> dict[str, float]:
    """Timing of greedy generation from random prompts."""
    model.eval()
    model.generation_config.eos_token_id = None
    prompt = torch.randint(2, BENCH_TINY["vocab_size"], (batch, PROMPT_TOKENS))
    mask = torch.ones_like(prompt)

    def generate() -> None:
        output = model.generate(
            prompt, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        assert output.shape == (batch, PROMPT_TOKENS + NEW_TOKENS)

    return spread(batch * NEW_TOKENS, time_calls(generate, repeats, warmup=1))


def matmul_peaks_gflops(repeats: int = 10) -> dict[str, float]:
    """By size N, the best rate of `repeats` float32 products of two [N, N] matrices."""
    peaks = {}
    for size in (1024, 2048):
        left, right = torch.randn(size, size), torch.randn(size, size)
        seconds = time_calls(lambda left=left, right=right: left @ right, repeats, warmup=2)
        peaks[str(size)] = round(2 * size**3 / min(seconds) / 1e9, 1)
    return peaks


def bench_mode(mode: str, steps: int, repeats: int) -> dict[str, dict[str, float]]:
    """One mode's training between two matmul peaks and, unless compiled, its generation."""
    model = build_model("eager" if mode == "eager" else None)
    result = dict(
        matmul_gflops_before_train=matmul_peaks_gflops(),
        train=bench_train(model, mode == "compile", steps),
        matmul_gflops_after_train=matmul_peaks_gflops(),
    )
    if mode != "compile":
        for batch in (1, 8):
            result[f"generate_batch_{batch}"] = bench_generate(model, batch, repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", default="default,eager", help="of default, eager")
    parser.add_argument("--compile", action="store_true", help="the compiled mode too")
    parser.add_argument("--steps", type=int, default=8, help="timed training steps")
    parser.add_argument("--repeats", type=int, default=5, help="timed generations")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    modes = [mode for mode in arguments.modes.split(",") if mode] + ["compile"] * arguments.compile
    result = dict(
        torch=torch.__version__,
        transformers=transformers.__version__,
        threads=arguments.threads,
        parameters=sum(w.numel() for w in build_model(None).parameters()),
        modes={mode: bench_mode(mode, arguments.steps, arguments.repeats) for mode in modes},
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
