"""The tables of "Insights into DeepSeek-V3" beside our figures. Imports no JAX.

Published numbers are constants here and nowhere feed a prediction. Source: arXiv 2505.09343v2,
Tables 1, 2, 4 and §2.3.2; DeepSeek, "Day 6: inference system overview" (March 2025).
"""

import functools

from dsv3_jax.config import (
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.plan.calibration import training_fit
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.limits import DecodeLimit
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.megatron import PUBLISHED_TOKENS_PER_SECOND, predict_megatron
from dsv3_jax.plan.model_arithmetic import (
    cache_bytes_per_token,
    count,
    training_flops_per_token,
)
from dsv3_jax.plan.model_shape import find_model
from dsv3_jax.plan.network.table3 import PUBLISHED, fit_prices, table3_counts
from dsv3_jax.plan.profile_check import predict_profile
from dsv3_jax.plan.serve_plan import Load, ServePlan, predict_serving
from dsv3_jax.plan.serve_units import Unit, prefill_pass
from dsv3_jax.plan.table import Table, percent
from dsv3_jax.plan.train_plan import TrainPlan, predict_training

KV = {  # bytes a token, and the ratio to the first as printed
    "deepseek-v3": (70_272, 1.0),
    "qwen2.5-72b": (327_680, 4.66),
    "llama-3.1-405b": (516_096, 7.28),
}
GFLOP = {"deepseek-v2": 155, "deepseek-v3": 250, "qwen2.5-72b": 394, "llama-3.1-405b": 2448}
SEQ = 4096
STEP_TABLE = {  # Table 4 on the multi-plane network
    "tokens a day (B)": 272.80,
    "step (s)": 19.926,
    "1F (s)": 1.13,
    "1B (s)": 1.99,
    "1W (s)": 0.48,
    "1F1B (s)": 13.95,
    "bubble (s)": 2.06,
    "optimizer (s)": 0.29,
    "TFLOP/s, not causal": 432.0,
    "TFLOP/s, causal": 385.0,
    "MFU, not causal": 0.4373,
    "MFU, causal": 0.3894,
}


def kv_table() -> Table:
    """Table 1: cache bytes a token in BF16."""
    ours = {name: cache_bytes_per_token(find_model(name)) for name in KV}
    first = ours["deepseek-v3"]
    rows = tuple(
        (
            name,
            find_model(name).attention.upper(),
            published,
            int(ours[name]),
            ratio,
            round(ours[name] / first, 3),
            cache_bytes_per_token(find_model(name), "fp8"),
        )
        for name, (published, ratio) in KV.items()
    )
    columns = ("model", "attention", "published bytes", "ours", "published ratio", "our ratio")
    return Table(
        title="KV cache of one token, BF16 (Table 1)",
        columns=(*columns, "FP8 cache"),
        rows=rows,
        notes=("The printed 7.28 of LLaMA-3.1 405B is 516,096 / 70,272 = 7.344.",),
    )


def flops_table() -> Table:
    """Table 2: GFLOP of training on one token of a sequence of 4,096."""
    rows = []
    for name, published in GFLOP.items():
        shape = find_model(name)
        gflop = training_flops_per_token(shape, SEQ) / 1e9
        parameters = count(shape)
        rows.append(
            (
                name,
                parameters.total / 1e9,
                parameters.active / 1e9,
                published,
                round(gflop, 2),
                percent(gflop, published),
            )
        )
    return Table(
        title="Training cost of one token, sequences of 4,096 (Table 2, printed as GFLOPS)",
        columns=("model", "parameters (B)", "active (B)", "published", "our GFLOP", "apart"),
        rows=tuple(rows),
        notes=(
            "Six for each active parameter but the input embedding, causal attention three times.",
            "LLaMA's 2,448 appears if attention is halved once more. Qwen's 394 cannot be"
            " reproduced: 72.7B parameters alone give 429.",
        ),
    )


def limits_table() -> Table:
    """§2.3.2: time of an output token where only the experts' rows count."""
    rows = []
    for link, speed, published_ms, published_tps in (
        ("InfiniBand, 400 Gbit/s", 50e9, 14.76, 67),
        ("GB200 NVL72", 900e9, 0.82, 1200),
    ):
        for hidden in (7000, 7168):
            limit = DecodeLimit(hidden_size=hidden, bytes_per_second=speed)
            rows.append(
                (
                    link,
                    hidden,
                    1e6 * limit.exchange_seconds,
                    1e6 * limit.layer_seconds,
                    1e3 * limit.token_seconds,
                    published_ms,
                    limit.tokens_per_second,
                    published_tps,
                )
            )
    columns = ("link", "hidden", "exchange (us)", "layer (us)", "token (ms)", "published (ms)")
    return Table(
        title="Bound of decoding with one expert a device (§2.3.2)",
        columns=(*columns, "tokens/s", "published tokens/s"),
        rows=tuple(rows),
        notes=(
            "The paper takes 7K for 7,000; the model's hidden size is 7,168.",
            "72 GPUs do not hold 256 experts, one each: its second line is bandwidth alone.",
        ),
    )


def published_run(late_weights: bool = True) -> RunConfig:
    """DeepSeek's layout: recomputing norms and up-projections only, weight gradients in bubbles."""
    return RunConfig(
        parallel=ParallelConfig(
            pipe=16,
            data=2,
            node=8,
            gpu=8,
            schedule="dualpipe",
            micro_batches=120,
            late_weight_gradients=late_weights,
        ),
        train=TrainConfig(batch_size=15360, steps=235_000, remat="selective"),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        precision=PrecisionConfig(recipe="fp8"),
    )


@functools.cache  # two tables show it
def published_plan() -> TrainPlan:
    """The prediction that is held against Table 4."""
    return predict_training(published_run(), find_cluster("h800_2048"), tokens=14.8e12)[0]


def step_figures(plan: TrainPlan) -> dict[str, Number]:
    """A plan in the terms of Table 4."""
    parts = plan.parts
    return {
        "tokens a day (B)": plan.tokens_per_day / 1e9,
        "step (s)": plan.step_seconds,
        "1F (s)": parts.forward,
        "1B (s)": parts.backward,
        "1W (s)": parts.weight,
        "1F1B (s)": parts.overlapped,
        "bubble (s)": parts.bubble,
        "optimizer (s)": plan.optimizer_seconds,
        "TFLOP/s, not causal": plan.tflops_noncausal,
        "TFLOP/s, causal": plan.tflops_causal,
        "MFU, not causal": plan.mfu_noncausal,
        "MFU, causal": plan.mfu_causal,
    }


def step_table() -> Table:
    """Table 4's column of the multi-plane network, beside the prediction."""
    ours = step_figures(published_plan())
    rows = tuple(
        (name, published, ours[name], percent(ours[name], published))
        for name, published in STEP_TABLE.items()
    )
    return Table(
        title="DeepSeek-V3 on 2,048 H800 (Table 4, MPFT); predicted, not fitted to it",
        columns=("what", "published", "predicted", "apart"),
        rows=rows,
        notes=(
            "Parts are of the first rank, which the published counts fit. The published bubble"
            " holds more than the schedule's own: waiting for messages and for slower peers.",
        ),
    )


DAY_6 = {
    "decode tokens/s a node": 14_800.0,
    "prefill tokens/s a node, cached ones included": 73_700.0,
}
DAY_6_LOAD = Load(
    # 608B tokens in, 168B out, 4,989 in the cache on average: prompt + answer / 2.
    input_tokens=4383,
    output_tokens=1211,
    slo_tpot_seconds=1 / 21,  # 20 to 22 tokens/s a request
    prefix_hit=342 / 608,
)
PREFILL_PROFILE = 62_713.0
"""Tokens/s a node in DeepSeek's prefill profile (EP32, 16,384 tokens a GPU, prompts of 4,096), as
LMSYS read it; its kernels alone, experts loaded evenly."""


def day_6_plan() -> ServePlan:
    """The prediction that is held against DeepSeek's service."""
    return predict_serving(published_run(), find_cluster("h800_2048"), DAY_6_LOAD)


def serve_table() -> Table:
    """DeepSeek's service of March 2025 beside the prediction."""
    plan = day_6_plan()
    decode, prefill = DAY_6
    unit = Unit(
        cluster=find_cluster("h800_2048"),
        model=published_run().model,
        precision=published_run().precision,
        gpus=32,
    )
    alone = prefill_pass(unit, 16384, 4096, 0.0, overhead=False).ideal_seconds
    rows = (
        (decode, DAY_6[decode], plan.decode_tokens_per_second_per_node),
        (prefill, DAY_6[prefill], plan.prefill_tokens_per_second_per_node),
        ("prefill of DeepSeek's profile, its kernels alone", PREFILL_PROFILE, 16384 * 8 / alone),
    )
    return Table(
        title="DeepSeek's service on H800 (day 6), 21 tokens/s a request; predicted, not fitted",
        columns=("what", "published", "predicted", "apart"),
        rows=tuple((*row, percent(row[2], row[1])) for row in rows),
        notes=(
            "Prefill is predicted for full load. The published rate is 32.2k computed tokens/s a"
            " node, half of what DeepSeek's own profile reaches: a day's mean, in which nodes wait"
            " for prompts.",
        ),
    )


def network_table() -> Table:
    """Table 3: endpoints, switches and links by formula, costs by prices fitted to the paper's."""
    prices = fit_prices()
    rows = []
    for counts, printed in zip(table3_counts(), PUBLISHED, strict=True):
        cost = prices.cost_dollars(counts) / 1e6
        same = (counts.endpoints, counts.switches, counts.links) == (
            printed.endpoints,
            printed.switches,
            printed.links,
        )
        rows.append(
            (
                counts.name,
                counts.endpoints,
                counts.switches,
                counts.links,
                same,
                printed.cost_million_dollars,
                cost,
                percent(cost, printed.cost_million_dollars),
                1e3 * cost / counts.endpoints,
                printed.thousand_dollars_per_endpoint,
            )
        )
    columns = ("network", "endpoints", "switches", "links", "as published", "published M$")
    return Table(
        title="Networks of 64-port switches (Table 3)",
        columns=(*columns, "our M$", "apart", "k$ an endpoint", "published k$"),
        rows=tuple(rows),
        notes=(
            f"Prices are not published; fitted to the five costs: ${prices.switch_dollars:,.0f} a"
            f" switch, ${prices.link_dollars:,.0f} a link between switches.",
        ),
    )


def checks_table() -> Table:
    """Every prediction that has a published figure, with its error."""
    plan = published_plan()
    pair, fit = predict_profile(), training_fit()
    rows = [
        ("overlapped pair of DeepSeek's profile (ms), fitted", 1e3 * fit.pair_seconds, 1e3 * pair),
        ("DeepSeek-V3's step on 2,048 H800 (s)", STEP_TABLE["step (s)"], plan.step_seconds),
        ("its H800 hours (thousands)", 2664.0, plan.gpu_hours / 1e3),
        (
            "Megatron on 1,024 H100 (tokens/s a GPU)",
            PUBLISHED_TOKENS_PER_SECOND,
            predict_megatron().tokens_per_second_per_gpu,
        ),
    ]
    rows += [row[:3] for row in serve_table().rows]
    return Table(
        title="Predictions beside what was published",
        columns=("what", "published", "predicted", "apart"),
        rows=tuple((*row, percent(row[2], row[1])) for row in rows),
    )
