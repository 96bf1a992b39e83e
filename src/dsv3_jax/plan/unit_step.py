"""A step of a prefill or decode unit, compiled for GPUs that need not be there.

The programs are the engine's own (serve/placed.py), of weights, pages and requests of which there
are only the shapes: what `dsv3 compile` makes of a config with `serve.unit`.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.config import ModelConfig, RunConfig
from dsv3_jax.config.checks import require
from dsv3_jax.export.fp8_weights import model_structure
from dsv3_jax.model.cache import row_bytes, row_shape
from dsv3_jax.model.experts import LocalDispatcher, spread_dispatcher
from dsv3_jax.parallel.dispatch import Exchange
from dsv3_jax.parallel.inference import BY_TOKEN
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.wire import wire_of
from dsv3_jax.plan.compile_ahead import CompiledStep, compile_ahead, topology_devices
from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.limits import DecodeLimit
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.report import (
    CACHE,
    WEIGHTS,
    Analysis,
    analyse,
    bytes_text,
    seconds_text,
)
from dsv3_jax.plan.report import as_json as step_json
from dsv3_jax.plan.report import as_text as step_text
from dsv3_jax.plan.step_report import check_hosts, memory_use
from dsv3_jax.serve.placed import Arranged, PlacedModel, arrange_model
from dsv3_jax.serve.programs import empty_chunk_rows, empty_decode_rows

SIMULATED_TOKENS = 2**20
"""Of a unit, to find how often its buffers overflow."""
PROMPTS = 4
"""Of a prefill step on each device, which share `serve.prefill_chunk`: as the engine's widest."""


@dataclass(frozen=True, kw_only=True)
class UnitReport:
    """A step of a unit. Bytes are the compiler's; seconds are predicted."""

    unit: str
    requests_per_gpu: int
    context_tokens: int
    """Of each request, in the cache; of a prefill step, of the prompt."""
    tokens_per_gpu: int
    """Computed in a step."""
    experts_per_gpu: int
    cache_bytes_per_token_and_layer: int
    cache_bytes_per_gpu: int
    weight_bytes_per_gpu: int
    predicted_seconds_per_token: Number
    """Of decode: a request's, of one token a step; of prefill a step's over its tokens."""
    predicted_tokens_per_second_per_gpu: Number
    limit_seconds_per_token: Number | None
    """Of decode: if only the rows to the experts and back counted, as the paper's speed limit."""
    published_limit_seconds_per_token: Number | None
    """The paper's own, of one expert a device and 32 tokens."""
    further_round_share: Number
    """Of layers in which even a balanced routing overflows a buffer: a further round, which the
    predicted time leaves out."""


@dataclass(frozen=True)
class UnitAnalysis:
    """What `dsv3 compile` reports of a unit."""

    unit: UnitReport
    analysis: Analysis


def compile_unit(config: RunConfig, gpu: Gpu, hosts: int) -> tuple[CompiledStep, UnitAnalysis]:
    """The step of `config.serve.unit` for `hosts` nodes; ValueError as `compile_step`."""
    check_hosts(config, gpu, hosts)
    compiled = compile_ahead(lower_unit(config, topology_devices(gpu, hosts)))
    sizes = {WEIGHTS: 0, CACHE: 0}
    for path, size in compiled.arguments.items():
        if path.startswith(("[0]", "[1]")):
            sizes[WEIGHTS if path.startswith("[0]") else CACHE] += size
    analysis = analyse(
        compiled.hlo_text,
        memory_use(compiled, sizes),
        gpu,
        compile_seconds=compiled.compile_seconds,
        compile_host_bytes=compiled.host_peak_bytes,
        trips=unit_trips,
    )
    unit = _report(config, gpu, analysis, sizes)
    return compiled, UnitAnalysis(unit, analysis)


def lower_unit(config: RunConfig, devices: Sequence[Any]) -> jax.stages.Lowered:
    """One step of the unit's engine over `devices`, with abstract arguments."""
    serve, mesh = config.serve, make_mesh(config.parallel, devices)
    placed, leaves = _abstract_weights(config, mesh)
    longest = config.model.max_position_embeddings
    max_pages, count = serve.pages_per_request(longest), len(devices)
    values, dtype = row_shape(config.model, _cache_dtype(config))
    pages = count * placed.layers * serve.num_pages(longest)
    by_token = NamedSharding(mesh, BY_TOKEN)
    pool = jax.ShapeDtypeStruct((pages, serve.page_size, values), dtype, sharding=by_token)
    if serve.unit == "decode":
        rows = empty_decode_rows(count * serve.slots, max_pages)
        program = placed.decode(placed.guesses, has_edits=False)
        return placed.jit(program).lower(leaves, pool, rows, np.int32(1), None, None)
    rows = empty_chunk_rows(count * PROMPTS, _prompt_tokens(config), max_pages)
    return placed.jit(placed.read()).lower(leaves, pool, rows)


def _abstract_weights(config: RunConfig, mesh: Any) -> tuple[PlacedModel, list[Any]]:
    """The unit's weights as shapes."""
    serve = config.serve
    guesses = serve.speculative and config.model.num_nextn_predict_layers > 0
    graph, state = nnx.split(model_structure(config.model, serve.dtype))
    found: list[Arranged] = []

    def arrange(state: nnx.State) -> Any:
        wire = wire_of(config.precision)
        model = nnx.merge(graph, state)
        found.append(arrange_model(model, mesh, serve, config.parallel, wire, guesses))
        return jax.tree.leaves(found[-1].weights)

    shapes, placed = jax.eval_shape(arrange, state), found[-1].placed
    return placed, [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(shapes, placed.weight_shardings, strict=True)
    ]


def unit_trips(op_name: str) -> int:
    """How often the step's loops run that end by their data: those in the routed experts, for rows
    beyond the buffers of the first round, never (`further_round_share` says how far that holds);
    nor those over what is cached before a prompt, of which all is new; decoding once."""
    return 0 if "routed_experts" in op_name or "/attention/" in op_name else 1


def further_round_share(config: RunConfig, layers: int | None = None, seed: int = 0) -> float:
    """Of `layers` simulated MoE layers (None: for a million tokens) those in which some device's
    rows need a further round, if tokens choose groups, and experts in these, with equal chances."""
    model, parallel, serve = config.model, config.parallel, config.serve
    slots = model.n_routed_experts + serve.redundant_experts
    exchange = spread_dispatcher(LocalDispatcher(), model, parallel, slots)
    if not isinstance(exchange, Exchange):
        return 0.0
    rng, senders = np.random.default_rng(seed), parallel.node * parallel.gpu
    tokens, found = _step_tokens(config), 0
    layers = layers or max(2, min(20, SIMULATED_TOKENS // (senders * tokens)))
    hops, rows = [], tokens
    for hop in exchange.hops:
        hops.append(hop.capacity(rows, tokens))
        rows = hop.peers * hops[-1]
    for _ in range(layers):
        experts = _random_experts(model, (senders, tokens), rng)
        # A redundant expert is one of the first again: as good as any, for all are chosen alike.
        again = experts + model.n_routed_experts
        has_two = again < slots
        slot = np.where(has_two & (rng.random(experts.shape) < 0.5), again, experts)
        device = slot // (slots // senders)
        if len(hops) == 1:
            found += _fullest(device, senders).max() > hops[0]
            continue
        node = device // parallel.gpu
        by_node = _fullest(node, parallel.node).max()
        # Row of node m's GPU g goes to GPU g of each of its nodes, there to others.
        wants = (device[..., None] == np.arange(senders)).any(axis=2)
        by_gpu = wants.reshape(parallel.node, parallel.gpu, tokens, senders).sum(axis=(0, 2))
        found += bool(by_node > hops[0] or by_gpu.max() > hops[1])
    return found / layers


def _random_experts(model: ModelConfig, shape: tuple[int, ...], rng: np.random.Generator):
    """Distinct experts of each token, in `topk_group` of its groups."""
    size = model.n_routed_experts // model.n_group
    groups = rng.random((*shape, model.n_group)).argsort(axis=-1)[..., : model.topk_group]
    places = rng.random((*shape, model.topk_group * size)).argsort(axis=-1)
    places = places[..., : model.num_experts_per_tok]
    group = np.take_along_axis(groups, places // size, axis=-1)
    return group * size + places % size


def _fullest(places: np.ndarray, count: int) -> np.ndarray:
    """Of each sender's peers, how many of its rows go there."""
    return (places[..., None] == np.arange(count)).any(axis=2).sum(axis=1)


def _report(config: RunConfig, gpu: Gpu, analysis: Analysis, sizes: dict[str, int]) -> UnitReport:
    serve, model = config.serve, config.model
    is_decode = serve.unit == "decode"
    requests = serve.slots if is_decode else PROMPTS
    tokens = _step_tokens(config)
    step = analysis.report.predicted_step_seconds
    limit = None
    if is_decode and model.has_experts:
        limit = speed_limit(model, config, gpu)
    return UnitReport(
        unit=str(serve.unit),
        requests_per_gpu=requests,
        context_tokens=serve.longest(model.max_position_embeddings)
        if is_decode
        else _prompt_tokens(config),
        tokens_per_gpu=tokens,
        experts_per_gpu=(model.n_routed_experts + serve.redundant_experts)
        // (config.parallel.node * config.parallel.gpu),
        cache_bytes_per_token_and_layer=row_bytes(model, _cache_dtype(config)),
        cache_bytes_per_gpu=sizes[CACHE],
        weight_bytes_per_gpu=sizes[WEIGHTS],
        predicted_seconds_per_token=step if is_decode else step / tokens,
        predicted_tokens_per_second_per_gpu=tokens / step,
        limit_seconds_per_token=None if limit is None else limit.token_seconds,
        published_limit_seconds_per_token=DecodeLimit().token_seconds if is_decode else None,
        further_round_share=further_round_share(config) if model.has_experts else 0.0,
    )


def speed_limit(model: ModelConfig, config: RunConfig, gpu: Gpu) -> DecodeLimit:
    """The paper's formula for this unit's rows: of `serve.slots` tokens a GPU in two micro-batches,
    to the routed experts alone, for the shared one is everywhere."""
    precision = config.precision
    return DecodeLimit(
        hidden_size=model.hidden_size,
        tokens=config.serve.slots / 2,
        sends=model.num_experts_per_tok,
        dispatch_bytes=1.0 if precision.dispatch_format == "fp8" else 2.0,
        combine_bytes={"bf16": 2.0, "logfmt10": 1.25, "logfmt8": 1.0}[precision.combine],
        bytes_per_second=gpu.network_bytes_per_second,
        layers=model.num_moe_layers,
    )


def as_json(found: UnitAnalysis) -> dict[str, Any]:
    """The step's fields, and the unit's."""
    return step_json(found.analysis.report) | dataclasses.asdict(found.unit)


def as_text(found: UnitAnalysis) -> str:
    """A page to read; every time in it is predicted."""
    u = found.unit
    of_token = seconds_text(u.predicted_seconds_per_token)
    lines = [
        f"{u.unit} unit: {u.experts_per_gpu} experts a GPU, {u.requests_per_gpu} requests of"
        f" {u.context_tokens:,} tokens, {u.tokens_per_gpu:,} tokens a step",
        f"latent cache     {u.cache_bytes_per_token_and_layer:,} B a token and layer,"
        f" {bytes_text(u.cache_bytes_per_gpu)} a GPU",
        f"time per token   {of_token} predicted,"
        f" {u.predicted_tokens_per_second_per_gpu:,.0f} tokens/s a GPU",
    ]
    if u.limit_seconds_per_token is not None and u.published_limit_seconds_per_token is not None:
        lines.append(
            f"speed limit      {seconds_text(u.limit_seconds_per_token)} for these rows over the"
            f" network; published {seconds_text(u.published_limit_seconds_per_token)} for 32 tokens"
        )
    lines.append(
        f"further rounds   in {u.further_round_share:.0%} of layers with a balanced routing; not in"
        " the predicted time"
    )
    return "\n".join(lines) + "\n\n" + step_text(found.analysis.report)


def _step_tokens(config: RunConfig) -> int:
    """Computed in a step on each device; guesses of the MTP module apart."""
    is_decode = config.serve.unit == "decode"
    return config.serve.slots if is_decode else PROMPTS * _prompt_tokens(config)


def _prompt_tokens(config: RunConfig) -> int:
    """Of each prompt in a prefill step."""
    chunk = config.serve.prefill_chunk
    require(chunk % PROMPTS == 0, "serve.prefill_chunk", chunk, f"a multiple of {PROMPTS}")
    return chunk // PROMPTS


def _cache_dtype(config: RunConfig) -> str:
    own = "fp32" if config.serve.dtype == "float32" else "bf16"
    return config.serve.cache_dtype or own
