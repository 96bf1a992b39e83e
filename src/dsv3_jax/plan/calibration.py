"""What the planner's times are fitted to: published kernels, and one published training profile.

Neither the paper's step time nor anybody's throughput is among them: those are the tests. Imports
no JAX.

A GEMM of tiles of 128 x 128 on S multiprocessors takes ceil(tiles / S) rounds, each
`fill + k * per_k` seconds; both numbers are fitted to DeepGEMM's six shapes. In DeepSeek's training
profile every GEMM of forward and of the inputs' gradients takes about 1.2 times as long as that,
every one of the weights' gradients about 1.8 times: two factors, medians over all of them.
"""

import functools
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.links import Number

DIRECTORY = Path(__file__).with_name("measured")
TILE = 128
H800 = find_gpu("h800")
"""What all of it was measured on."""


@dataclass(frozen=True, kw_only=True)
class GemmFit:
    """Seconds of one round of 128 x 128 tiles on an H800 in FP8: `fill + k * per_k`."""

    fill_seconds: Number
    per_k_seconds: Number
    errors: tuple[Number, ...]
    """Of the fit, for each of DeepGEMM's shapes: predicted over measured, less 1."""

    @property
    def share_of_peak(self) -> Number:
        """Of a product with endless k."""
        per_tile = 2 * TILE * TILE / self.per_k_seconds
        return per_tile * H800.multiprocessors / H800.fp8_flops_per_second


@dataclass(frozen=True, kw_only=True)
class TrainingFit:
    """What the profile says beside the GEMMs' own times, for an H800."""

    tokens: int
    compute_sms: int
    """Multiprocessors that compute, beside 20 that send."""
    pair_seconds: Number
    """Of the whole profile: what a prediction of it is held against."""
    gemm_slowdown: Number
    weight_gemm_slowdown: Number
    attention_forward_seconds: Number
    attention_backward_seconds: Number
    other_seconds: dict[str, Number]
    """Of a layer's parts: norms, rotary embedding, permutation, SwiGLU; by part."""
    cast_seconds: dict[str, Number]
    """Casts to FP8 and transpositions of what is FP8; by part."""
    dispatch_seconds: Number
    """Of the kernel that sends rows, beside computation, mean of forward and backward."""
    combine_seconds: Number
    notify_seconds: dict[str, Number]
    """Of a transfer, without its kernel: counts exchanged ahead, a cast, waiting for the slowest
    peer; by part."""


@functools.cache
def published(name: str) -> dict[str, Any]:
    """One entry of measured/published_kernels.json."""
    return json.loads((DIRECTORY / "published_kernels.json").read_text())[name]


@functools.cache
def profile() -> dict[str, Any]:
    """measured/h800_training.json, made by experiments/planner/extract_trace.py."""
    return json.loads((DIRECTORY / "h800_training.json").read_text())


def rounds(rows: Number, n: int, sms: int, groups: int = 1) -> int:
    """Rounds in which `sms` multiprocessors do all tiles of `groups` products of `rows` x `n`."""
    return math.ceil(groups * math.ceil(rows / TILE) * math.ceil(n / TILE) / sms)


@functools.cache
def gemm_fit() -> GemmFit:
    """Least squares of the relative errors over DeepGEMM's shapes."""
    given = published("fp8_gemm")
    rows = given["rows"]
    shapes = [(item["n"], item["k"], item["speed"]) for item in given["flops_per_second"]]
    measured = np.array([2 * rows * n * k / speed for n, k, speed in shapes])
    turns = np.array([rounds(rows, n, H800.multiprocessors) for n, _, _ in shapes])
    columns = np.stack([turns, turns * np.array([k for _, k, _ in shapes])], axis=1)
    scaled = columns / measured[:, None]
    fill, per_k = np.linalg.lstsq(scaled, np.ones(len(shapes)), rcond=None)[0]
    errors = scaled @ np.array([fill, per_k]) - 1
    return GemmFit(
        fill_seconds=float(fill),
        per_k_seconds=float(per_k),
        errors=tuple(float(error) for error in errors),
    )


PROFILE_GEMMS: dict[str, tuple[int, int]] = {  # n and k of 4,096 rows in the profile
    "q_a": (1536, 7168),
    "kv_a": (576, 7168),
    "q_b": (24576, 1536),
    "kv_b": (32768, 512),
    "o": (7168, 16384),
    "o_dx": (16384, 7168),
    "q_b_dx": (1536, 24576),
    "kv_b_dx": (512, 32768),
    "kv_a_dx": (7168, 576),
    "q_a_dx": (7168, 1536),
    "shared_up": (4096, 7168),
    "shared_down": (7168, 2048),
    "shared_up_dx": (7168, 4096),
    "shared_down_dx": (2048, 7168),
    "experts_up": (4096, 7168),
    "experts_down": (7168, 2048),
    "experts_up_dx": (7168, 4096),
    "experts_down_dx": (2048, 7168),
}
PROFILE_WEIGHT_GEMMS: dict[str, tuple[int, int]] = {  # the two sides of the weight; k is 4,096
    "o_dw": (7168, 16384),
    "kv_b_dw": (32768, 512),
    "q_b_dw": (24576, 1536),
    "kv_a_dw": (576, 7168),
    "q_a_dw": (1536, 7168),
}
PROFILE_NODES = 8
PROFILE_EXPERT_ROWS, PROFILE_EXPERTS = 8192, 4
"""Rows an expert and experts a GPU, the routing being balanced: 4,096 x 64 x 8 / 256."""


@functools.cache
def training_fit() -> TrainingFit:
    """The profile's medians, and by how much its GEMMs are slower than `gemm_fit` says."""
    found, fit = profile(), gemm_fit()
    sms, parts = found["compute_sms"], found["parts"]

    def slowdown(seconds: Number, turns: int, k: int) -> Number:
        return seconds / (turns * (fit.fill_seconds + k * fit.per_k_seconds))

    forward, weights = [], []
    for part in parts.values():
        for key, seconds in part.items():
            name = key.removeprefix("gemm ")
            if name in PROFILE_GEMMS:
                n, k = PROFILE_GEMMS[name]
                grouped = name.startswith("experts")
                rows = PROFILE_EXPERT_ROWS if grouped else found["tokens"]
                turns = rounds(rows, n, sms, PROFILE_EXPERTS if grouped else 1)
                forward.append(slowdown(seconds, turns, k))
            elif name in PROFILE_WEIGHT_GEMMS:
                rows, n = PROFILE_WEIGHT_GEMMS[name]
                weights.append(slowdown(seconds, rounds(rows, n, sms), found["tokens"]))
    transfers = ("combine(B)", "combine(F)", "dispatch(B)", "dispatch(F)")
    # Backward of combine dispatches gradients, backward of dispatch combines them.
    dispatched = [parts[part]["dispatch"] for part in ("dispatch(F)", "combine(B)")]
    combined = [parts[part]["combine"] for part in ("combine(F)", "dispatch(B)")]
    return TrainingFit(
        tokens=found["tokens"],
        compute_sms=sms,
        pair_seconds=found["pair_seconds"],
        gemm_slowdown=statistics.median(forward),
        weight_gemm_slowdown=statistics.median(weights),
        attention_forward_seconds=parts["attn(F)"]["attention"],
        attention_backward_seconds=parts["attn(B)"]["attention"],
        other_seconds={name: part["other"] for name, part in parts.items() if "other" in part},
        cast_seconds={name: part["cast"] for name, part in parts.items() if "cast" in part},
        dispatch_seconds=statistics.mean(dispatched),
        combine_seconds=statistics.mean(combined),
        notify_seconds={
            name: sum(parts[name].get(kind, 0.0) for kind in ("notify", "other", "cast"))
            for name in transfers
        },
    )
