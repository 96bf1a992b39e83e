"""Takes DeepSeek's published training profile apart: what the planner is calibrated on.

    python experiments/planner/extract_trace.py train.json

`train.json` is that of github.com/deepseek-ai/profile-data: one overlapped pair of chunks, each of
four MoE layers, on rank 0 of 64 H800. Every kernel belongs to the part of a layer whose annotation
covers its launch. The names of the GEMMs are given by their order: a part runs the same ones in
each of the four layers. Writes src/dsv3_jax/plan/measured/h800_training.json, seconds a layer,
medians of the four layers.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

OUT = Path(__file__).parents[2] / "src/dsv3_jax/plan/measured/h800_training.json"
GEMMS = {  # of a layer, in the order of their launches
    "attn(F)": ["q_a", "kv_a", "q_b", "kv_b", "o"],
    "attn(B)": ["o_dx", "q_b", "kv_b", "q_b_dx", "kv_b_dx", "kv_a_dx", "q_a_dx"],
    "attn(W)": ["o_dw", "kv_b_dw", "q_b_dw", "kv_a_dw", "q_a_dw"],
    "mlp(F)": ["shared_up", "experts_up", "experts_down", "shared_down"],
    "mlp(B)": ["shared_down_dx", "experts_down_dx", "experts_up_dx", "shared_up_dx"],
    "mlp(W)": ["mlp_dw"] * 10,
}
KINDS = (  # of a kernel, by what is in its name; the first that fits
    ("notify_dispatch", "notify"),
    ("cached_notify", "notify"),
    ("dispatch<", "dispatch"),
    ("combine<", "combine"),
    ("GemmKernel", "fp8_gemm"),
    ("FlashAttnBwd", "attention"),
    ("flash::compute_attn", "attention"),
    ("swiglu", "other"),
    ("cast", "cast"),
    ("transpose", "cast"),
)


def main(path: Path) -> None:
    events = json.loads(path.read_text())["traceEvents"]
    launches, parts, kernels = {}, [], []
    for event in events:
        category, correlation = event.get("cat"), event.get("args", {}).get("correlation")
        if category in ("cuda_runtime", "cuda_driver"):
            launches[correlation] = event["ts"]
        elif category == "user_annotation" and "(" in event["name"]:
            parts.append(event)
        elif category in ("kernel", "gpu_memset", "gpu_memcpy"):
            kernels.append(event)
    parts.sort(key=lambda part: part["ts"])
    kernels.sort(key=lambda kernel: launches[kernel["args"]["correlation"]])
    by_part = defaultdict(list)
    for kernel in kernels:
        at = launches[kernel["args"]["correlation"]]
        (number,) = (i for i, p in enumerate(parts) if p["ts"] <= at <= p["ts"] + p["dur"])
        by_part[number].append(kernel)
    layers = defaultdict(list)
    for number, part in enumerate(parts):
        layers[part["name"]].append(_one(part["name"], by_part[number]))
    start = min(kernel["ts"] for kernel in kernels)
    end = max(kernel["ts"] + kernel["dur"] for kernel in kernels)
    table = {
        "source": "github.com/deepseek-ai/profile-data, train.json, read by"
        " experiments/planner/extract_trace.py",
        "gpu": "h800",
        "tokens": 4096,
        "expert_gpus": 64,
        "compute_sms": 112,
        "layers": 4,
        "pair_seconds": (end - start) / 1e6,
        "parts": {name: _median(found) for name, found in sorted(layers.items())},
    }
    OUT.write_text(json.dumps(table, indent=2) + "\n")
    print(f"{OUT}: {len(kernels)} kernels, {table['pair_seconds'] * 1e3:.1f} ms")


def _one(part: str, kernels: list[dict]) -> dict[str, float]:
    """Seconds of one layer's part by kind, its GEMMs by name, and from its first to its last."""
    seconds = defaultdict(float)
    gemms = []
    for kernel in kernels:
        kind = next((kind for mark, kind in KINDS if mark in kernel["name"]), "other")
        if kind == "fp8_gemm":
            gemms.append(kernel)
        else:
            seconds[kind] += kernel["dur"] / 1e6
    for name, kernel in zip(GEMMS.get(part, []), gemms, strict=True):
        seconds[f"gemm {name}"] += kernel["dur"] / 1e6
    if gemms:
        # Weight gradients run on two streams at once: what passes is less than their sum.
        seconds["gemms_wall"] = _covered(gemms)
    seconds["wall"] = _covered(kernels)
    return dict(seconds)


def _covered(kernels: list[dict]) -> float:
    """Seconds in which any of them runs."""
    total, until = 0, 0
    for start, end in sorted((k["ts"], k["ts"] + k["dur"]) for k in kernels):
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def _median(layers: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for layer in layers for name in layer)
    return {
        name: round(statistics.median(layer.get(name, 0.0) for layer in layers), 9)
        for name in names
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
