"""Training and decoding speed on this machine, beside the machine's own matrix peak.

The peak is a large FP32 product timed in the same run, between the measurements, so that the share
of it means something on a machine whose speed drifts. FLOPs are the model's (accounting), not the
program's.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import RunConfig
from dsv3_jax.model.accounting import count_flops
from dsv3_jax.serve.generate import generate
from dsv3_jax.train.layout import make_layout
from dsv3_jax.train.state import build_model
from dsv3_jax.train.step import StepSettings, make_train_step

PEAK_SIZE = 1024
PEAK_REPEATS = 5
PROMPT_TOKENS = 16
NEW_TOKENS = 64
WARM_UP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchReport:
    """Medians over the repeats; `share_of_peak` is model FLOP/s over the matrix peak."""

    what: str
    batch_size: int
    tokens_per_second: float
    step_seconds: float
    """One optimizer step, or one decoded token of every sequence (prefill spread over them)."""
    step_seconds_min: float
    step_seconds_max: float
    compile_seconds: float
    model_flops_per_token: float
    model_gflops: float
    matrix_peak_gflops: float
    share_of_peak: float
    device: str


def matrix_peak_gflops() -> float:
    """GFLOP/s of a 1,024-cube FP32 product, the median of a few."""
    a = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = [_time(lambda: product(a, a)) for _ in range(PEAK_REPEATS)]
    return 2 * PEAK_SIZE**3 / statistics.median(seconds) / 1e9


def bench_train(config: RunConfig, batch_size: int | None, repeats: int) -> BenchReport:
    """Optimizer steps on random tokens, everything of a step included but the reading of data."""
    batch = config.train.batch_size if batch_size is None else batch_size
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=batch, accumulation=1)
    )
    seq = config.data.seq_len
    layout = make_layout(config)
    state = layout.initial_state()
    random = np.random.default_rng(0)
    shape = (1, batch, seq + 1)
    rows = layout.put_rows(random.integers(0, config.model.vocab_size, shape, np.int32))
    settings = StepSettings(jnp.int32(1), jnp.float32(1e-4), jnp.float32(0.3), jnp.float32(0.001))
    started = time.perf_counter()
    step = make_train_step(layout).lower(state, rows, None, settings).compile()
    compile_seconds = time.perf_counter() - started

    def once():
        nonlocal state
        state, report = step(state, rows, None, settings)
        return report

    seconds, peaks = _measure(once, repeats)
    return _report(
        "train",
        batch,
        seconds,
        peaks,
        compile_seconds=compile_seconds,
        tokens=batch * seq,
        steps=1,
        flops_per_token=count_flops(config.model, seq).training,
    )


def bench_decode(config: RunConfig, batch_size: int | None, repeats: int) -> BenchReport:
    """Greedy generation of 64 tokens after 16, prefill included, as `dsv3_jax.generate` does it."""
    batch = 1 if batch_size is None else batch_size
    model_config = dataclasses.replace(config.model, eos_token_id=None)  # no row ends early
    config = dataclasses.replace(config, model=model_config)
    model = build_model(config, nnx.Rngs(config.train.seed))
    random = np.random.default_rng(0)
    prompts = random.integers(0, model_config.vocab_size, (batch, PROMPT_TOKENS)).tolist()
    compile_seconds = _time(lambda: generate(model, prompts, NEW_TOKENS))
    seconds, peaks = _measure(lambda: generate(model, prompts, NEW_TOKENS), repeats)
    return _report(
        "decode",
        batch,
        seconds,
        peaks,
        compile_seconds=compile_seconds,
        tokens=batch * NEW_TOKENS,
        steps=NEW_TOKENS,
        flops_per_token=count_flops(model_config, PROMPT_TOKENS + NEW_TOKENS).forward,
    )


def print_report(report: BenchReport, *, as_json: bool) -> None:
    """One JSON object, or a few lines to read."""
    values: dict[str, Any] = dataclasses.asdict(report)
    if as_json:
        print(json.dumps(values))
        return
    print(
        f"{report.what}: {report.tokens_per_second:,.0f} tokens/s,"
        f" {report.step_seconds * 1e3:.2f} ms a step"
        f" [{report.step_seconds_min * 1e3:.2f}, {report.step_seconds_max * 1e3:.2f}],"
        f" batch {report.batch_size}, on {report.device}\n"
        f"  {report.model_gflops:.1f} GFLOP/s of the model,"
        f" {report.share_of_peak:.1%} of this machine's matrix peak"
        f" ({report.matrix_peak_gflops:.0f} GFLOP/s), first call {report.compile_seconds:.1f} s"
    )


def _measure(once: Callable[[], Any], repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each repeat after a warm-up, and the matrix peak before and after them."""
    for _ in range(WARM_UP):
        _time(once)
    peaks = [matrix_peak_gflops()]
    seconds = [_time(once) for _ in range(repeats)]
    peaks.append(matrix_peak_gflops())
    return seconds, peaks


def _time(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - started


def _report(
    what: str,
    batch: int,
    seconds: list[float],
    peaks: list[float],
    *,
    compile_seconds: float,
    tokens: int,
    steps: int,
    flops_per_token: float,
) -> BenchReport:
    median, peak = statistics.median(seconds), statistics.mean(peaks)
    gflops = flops_per_token * tokens / median / 1e9
    return BenchReport(
        what=what,
        batch_size=batch,
        tokens_per_second=tokens / median,
        step_seconds=median / steps,
        step_seconds_min=min(seconds) / steps,
        step_seconds_max=max(seconds) / steps,
        compile_seconds=compile_seconds,
        model_flops_per_token=flops_per_token,
        model_gflops=gflops,
        matrix_peak_gflops=peak,
        share_of_peak=gflops / peak,
        device=jax.devices()[0].device_kind,
    )
