"""`dsv3 plan limits`: bounds of decoding, and what a unit has room for, as tables. No JAX."""

import argparse

from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.limits import DecodeLimit, local_limit
from dsv3_jax.plan.model_shape import find_model
from dsv3_jax.plan.serve_units import Unit
from dsv3_jax.plan.table import Cell, Table


def _table(title: str, figures: dict[str, Cell], *notes: str) -> Table:
    return Table(title=title, columns=("what", "value"), rows=tuple(figures.items()), notes=notes)


def decode_table(options: argparse.Namespace) -> Table:
    """By the experts' rows on the network."""
    limit = DecodeLimit(
        hidden_size=options.hidden,
        tokens=options.tokens,
        sends=options.sends,
        dispatch_bytes=options.dispatch_bytes,
        combine_bytes=options.combine_bytes,
        bytes_per_second=options.bandwidth * 1e9,
        latency_seconds=options.latency * 1e-6,
        micro_batches=options.micro_batches,
        layers=options.layers,
    )
    figures: dict[str, Cell] = {
        "bytes of a micro-batch and layer": limit.sent_bytes,
        "exchange (us)": 1e6 * limit.exchange_seconds,
        "layer (us)": 1e6 * limit.layer_seconds,
        "output token (ms)": 1e3 * limit.token_seconds,
        "tokens/s of a request": limit.tokens_per_second,
    }
    return _table("Bound of decoding with one expert a device", figures)


def local_table(options: argparse.Namespace) -> Table:
    """By one machine's memory."""
    limit = local_limit(
        find_model(options.model),
        bytes_per_second=options.bandwidth * 1e9,
        bits=options.bits,
        context=options.context,
        efficiency=options.efficiency,
        accepted=options.acceptance,
    )
    figures: dict[str, Cell] = {
        "memory needed (GB)": limit.held_bytes / 1e9,
        "weights read a token (GB)": limit.weight_bytes / 1e9,
        "cache read a token (GB)": limit.cache_bytes / 1e9,
        "output token (ms)": 1e3 * limit.token_seconds,
        "tokens/s": limit.tokens_per_second,
    }
    note = "A bound: the paper has KTransformers at about 20 tokens/s with V3 on a $10,000 server."
    return _table(f"{options.model} for one request on one machine", figures, note)


def unit_table(options: argparse.Namespace) -> Table:
    """What a prefill or decode unit has room for; `options.config` is the run's."""
    config, cluster = options.config, find_cluster(options.cluster)
    unit = Unit(
        cluster=cluster,
        model=config.model,
        precision=config.precision,
        gpus=options.gpus,
        redundant=options.redundant,
        cache=options.cache,
    )
    figures: dict[str, Cell] = {
        "nodes": unit.gpus / cluster.gpus_per_node,
        "routed experts a GPU": unit.routed_per_gpu,
        "weights a GPU (GB)": unit.weight_bytes / 1e9,
        "room for caches a GPU (GB)": unit.cache_room_bytes / 1e9,
        "tokens in the cache a GPU": unit.cache_tokens,
        "tokens in the cache of the unit": unit.cache_tokens * unit.gpus,
    }
    return _table(f"A unit of {unit.gpus} GPUs of {cluster.name}", figures)
