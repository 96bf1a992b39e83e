"""What a service reaches on a cluster: batch, latencies, tokens/s, for given prompts and answers.

A prediction; prefill and decode have units of their own, as in DeepSeek's service. Imports no JAX.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dsv3_jax.config import RunConfig
from dsv3_jax.config.checks import require
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.model_arithmetic import cache_bytes_per_token
from dsv3_jax.plan.model_shape import shape_of
from dsv3_jax.plan.report import bytes_text, seconds_text
from dsv3_jax.plan.serve_units import PassTimes, Unit, decode_step, prefill_pass

PASS_TOKENS = 16384
"""Of a prefill pass a GPU, at most: as in DeepSeek's profile."""
SMALLEST_PASS = 1024
LARGEST_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked for: mean prompt and answer, and bounds on the latencies, in seconds."""

    input_tokens: int
    output_tokens: int
    slo_tpot_seconds: Number | None = None
    slo_ttft_seconds: Number | None = None
    acceptance: Number = 0.0
    """Of the token that the MTP module drafts; 0 drafts none."""
    prefix_hit: Number = 0.0
    """Share of the prompts' tokens whose cache is there already."""

    def __post_init__(self):
        for name in ("input_tokens", "output_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("slo_tpot_seconds", "slo_ttft_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "a positive number")
        require(0 <= self.acceptance <= 1, "acceptance", self.acceptance, "from 0 to 1")
        require(0 <= self.prefix_hit < 1, "prefix_hit", self.prefix_hit, "from 0, below 1")

    @property
    def context(self) -> Number:
        """Tokens in the cache of a request that decodes, on average."""
        return self.input_tokens + self.output_tokens / 2


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """All of it is predicted. Rates are of a node at full load."""

    cluster: str
    nodes: int
    prefill_gpus: int
    decode_gpus: int
    prefill_experts_per_gpu: int
    decode_experts_per_gpu: int
    """Routed ones; the shared one is there too."""
    decode_weight_bytes: Number
    cache_tokens_per_gpu: int
    batch: int
    """Requests a GPU that decode at a time."""
    batch_limit: str
    """What keeps it from being larger: slo, memory, or none."""
    pass_tokens: int
    """Computed in a prefill pass, a GPU."""
    ttft_seconds: Number
    tpot_seconds: Number
    tokens_per_second_per_request: Number
    prefill_tokens_per_second_per_node: Number
    """Of prompts, cached tokens included."""
    decode_tokens_per_second_per_node: Number
    prefill_share: Number
    """Of the nodes, so that neither kind waits for the other."""
    requests_per_second: Number
    """Of the whole cluster."""
    dollars_per_million_output_tokens: Number | None
    decode: PassTimes
    prefill: PassTimes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a service's GPUs are grouped. The defaults are DeepSeek's."""

    prefill_gpus: int = 32
    decode_gpus: int = 144
    redundant: int = 32
    cache: str = "bf16"
    imbalance: Number = 1.0


def predict_serving(
    config: RunConfig, cluster: Cluster, load: Load, layout: Layout | None = None
) -> ServePlan:
    """The plan of `config.model` in `config.precision`.

    ValueError where a bound on latency cannot be met by any batch, or the weights do not fit.
    """
    layout = layout or Layout()

    def unit(gpus: int, drafts: bool) -> Unit:
        return Unit(
            cluster=cluster,
            model=config.model,
            precision=config.precision,
            gpus=gpus,
            redundant=layout.redundant,
            cache=layout.cache,
            drafts=drafts,
            imbalance=layout.imbalance,
        )

    prefill_unit = unit(layout.prefill_gpus, False)
    decode_unit = unit(layout.decode_gpus, load.acceptance > 0)
    for each in (prefill_unit, decode_unit):
        room = each.cache_tokens
        rule = f"room for a prompt of {load.input_tokens} tokens beside the weights"
        require(room >= load.input_tokens, f"unit of {each.gpus} GPUs: cache tokens", room, rule)
    batch, limit = _largest_batch(decode_unit, load)
    step = decode_step(decode_unit, batch, load.context)
    tpot = step.seconds / (1 + load.acceptance)
    pass_tokens, first = _pass(prefill_unit, load)
    prefill = prefill_pass(prefill_unit, pass_tokens, load.input_tokens, load.prefix_hit)
    node = cluster.gpus_per_node
    decoded = batch * node / tpot
    prompted = pass_tokens * node / prefill.seconds / (1 - load.prefix_hit)
    for_prompt, for_answer = load.input_tokens / prompted, load.output_tokens / decoded
    requests = cluster.nodes / (for_prompt + for_answer)
    price = cluster.gpu_dollars_per_hour
    return ServePlan(
        cluster=cluster.name,
        nodes=cluster.nodes,
        prefill_gpus=prefill_unit.gpus,
        decode_gpus=decode_unit.gpus,
        prefill_experts_per_gpu=prefill_unit.routed_per_gpu,
        decode_experts_per_gpu=decode_unit.routed_per_gpu,
        decode_weight_bytes=decode_unit.weight_bytes,
        cache_tokens_per_gpu=decode_unit.cache_tokens,
        batch=batch,
        batch_limit=limit,
        pass_tokens=pass_tokens,
        ttft_seconds=first,
        tpot_seconds=tpot,
        tokens_per_second_per_request=1 / tpot,
        prefill_tokens_per_second_per_node=prompted,
        decode_tokens_per_second_per_node=decoded,
        prefill_share=for_prompt / (for_prompt + for_answer),
        requests_per_second=requests,
        dollars_per_million_output_tokens=None
        if price is None
        else 1e6 * price / 3600 * cluster.num_gpus / (requests * load.output_tokens),
        decode=step,
        prefill=prefill,
    )


def _largest_batch(unit: Unit, load: Load) -> tuple[int, str]:
    """The most requests a GPU, and what bounds them."""
    room = max(1, math.floor(unit.cache_tokens / load.context))
    most, limit = min(room, LARGEST_BATCH), "memory" if room <= LARGEST_BATCH else "none"
    bound = load.slo_tpot_seconds
    if bound is None:
        return most, limit

    def tpot(batch: int) -> Number:
        return decode_step(unit, batch, load.context).seconds / (1 + load.acceptance)

    least = tpot(1)
    rule = f"at least the {1e3 * least:.1f} ms that one request a GPU takes"
    require(least <= bound, "slo-tpot (ms)", 1e3 * bound, rule)
    low, high = 1, most + 1  # the first fits, the last is not known to
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tpot(middle) <= bound else (low, middle)
    return low, limit if low == most else "slo"


def _pass(unit: Unit, load: Load) -> tuple[int, Number]:
    """Tokens of a pass a GPU, as many as the bound on the first token allows, and that time: half
    a pass of waiting, the prompt's passes, and its cache's way to a decode unit."""
    computed = max(1, round(load.input_tokens * (1 - load.prefix_hit)))
    per_token = cache_bytes_per_token(shape_of(unit.model), unit.cache)
    link = unit.cluster.network
    moving = load.input_tokens * per_token / link.achieved_bytes_per_second

    def first(tokens: int) -> Number:
        seconds = prefill_pass(unit, tokens, load.input_tokens, load.prefix_hit).seconds
        return seconds * (0.5 + math.ceil(computed / tokens)) + moving

    tokens = PASS_TOKENS
    bound = load.slo_ttft_seconds
    while bound is not None and first(tokens) > bound:
        least = 1e3 * first(SMALLEST_PASS)
        rule = f"at least {least:.0f} ms, of passes of {SMALLEST_PASS} tokens"
        require(tokens > SMALLEST_PASS, "slo-ttft (ms)", 1e3 * bound, rule)
        tokens //= 2
    return tokens, first(tokens)


def as_json(plan: ServePlan) -> dict[str, Any]:
    """The fields, and what was assumed."""
    return dataclasses.asdict(plan) | {"assumptions": list(ASSUMED)}


ASSUMED = (
    "kernels as DeepGEMM, FlashMLA and DeepEP measured them on H800; a pass as much longer than"
    " they are together as SGLang's was on H100 (prefill 1.31 times, decode 1.51 times)",
    "the same load all the time; DeepSeek's service, whose load follows the day, prefills at half"
    " of what its own profile reaches",
    "experts spread evenly but for what SGLang's measured passes have of unevenness",
)


def as_text(plan: ServePlan) -> str:
    """A page to read."""
    p = plan
    price = p.dollars_per_million_output_tokens
    money = "" if price is None else f", ${price:.3g} for 1M output tokens"
    waits = {"slo": "the bound on time per token", "memory": "memory", "none": "nothing found"}
    tpot, kernels = seconds_text(p.tpot_seconds), seconds_text(p.decode.compute_seconds)
    step, rows = seconds_text(p.decode.seconds), seconds_text(p.decode.exchange_seconds)
    lines = [
        f"{p.nodes:,} nodes of {p.cluster}: prefill in units of {p.prefill_gpus} GPUs"
        f" ({p.prefill_experts_per_gpu} routed experts each), decode in units of {p.decode_gpus}"
        f" ({p.decode_experts_per_gpu})",
        "",
        f"first token  {seconds_text(p.ttft_seconds)}, passes of {p.pass_tokens:,} tokens a GPU",
        f"each token   {tpot}, {p.tokens_per_second_per_request:.1f} tokens/s a request",
        f"step         {step}; its kernels alone {kernels}, experts' rows alone {rows}",
        f"batch        {p.batch} requests a GPU, bounded by {waits[p.batch_limit]}; room for"
        f" {p.cache_tokens_per_gpu:,} tokens beside {bytes_text(p.decode_weight_bytes)} of weights",
        f"a node       {p.prefill_tokens_per_second_per_node:,.0f} tokens/s of prompts (cached ones"
        f" included), {p.decode_tokens_per_second_per_node:,.0f} of answers",
        f"all nodes    {p.prefill_share:.0%} for prefill, {p.requests_per_second:,.1f} requests/s"
        f"{money}",
        "",
        *(f"assumed: {text}" for text in ASSUMED),
    ]
    return "\n".join(lines)
