"""`dsv3 plan network`: one exchange on one network, or one of the tables behind it."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.network import page
from dsv3_jax.plan.network.contention import PRIORITIES, share_pcie
from dsv3_jax.plan.network.deepep import compare_bandwidths, compare_latencies
from dsv3_jax.plan.network.fluid import EXACT_FLOWS
from dsv3_jax.plan.network.latency import INITIATORS, LATENCIES, MESSAGES_PER_SECOND
from dsv3_jax.plan.network.roce import compare_rings
from dsv3_jax.plan.network.routes import ROUTINGS
from dsv3_jax.plan.network.simulate import PLACEMENTS, TOPOLOGIES, Scenario, simulate
from dsv3_jax.plan.network.table3 import PUBLISHED, fit_prices, table3_counts
from dsv3_jax.plan.network.transfers import TRAFFICS

TOLERANCE = 0.01
DEFAULT_BYTES = 2.0**30
DISPATCH_BYTES = 105e6
"""Over a GPU's NIC, of 4,096 tokens to 64 GPUs, 256 experts and 4 of 8 groups, in FP8."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `dsv3 plan network`."""
    add = parser.add_argument
    add("topology", nargs="?", metavar="TOPOLOGY", help=", ".join(TOPOLOGIES))
    add("--gpus", type=int, help="in nodes of eight")
    add("--radix", type=int, default=64, help="ports of a fat tree's switch (default 64)")
    add("--routing", default="adaptive", help=", ".join(ROUTINGS) + " (default adaptive)")
    add("--traffic", default="dispatch", help=", ".join(TRAFFICS) + " (default dispatch)")
    add(
        "--fail",
        action="append",
        default=[],
        metavar="WHAT=N",
        help="plane=N, link=N (between switches) or nic=N (of GPU N); repeatable",
    )
    add("--placement", default="packed", help="of nodes: " + ", ".join(PLACEMENTS))
    add("--gpu", default="h800", help="whose NVLink and NIC (default h800)")
    add("--nominal", action="store_true", help="links at their nominal bandwidth, not the achieved")
    add("--ep", type=int, default=64, help="dispatch, combine: GPUs of a group (default 64)")
    add("--tokens", type=int, default=4096, help="a GPU's (default 4096)")
    add("--hidden-size", type=int, default=7168, help="(default 7168)")
    add("--experts", type=Path, metavar="FILE", help="a routing, .npy of int [tokens, top_k]")
    add(
        "--bytes",
        type=float,
        help="a GPU's, of alltoall and reduce (default 1 GiB), of --contention's EP (default that"
        " of a dispatch of 4,096 tokens)",
    )
    add("--group", type=int, help="reduce: GPUs of a group (default all)")
    add("--stages", type=int, default=16, help="pipeline (default 16)")
    add("--kv-bytes", type=float, default=100e6, help="--contention: fetched (default 100e6)")
    add("--seed", type=int, default=0, help="of routing, placement and hashes (default 0)")
    add(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help=f"in groups of more than {EXACT_FLOWS} flows, those that end this close together end"
        f" before rates are shared anew; 0 is exact (default {TOLERANCE})",
    )
    tables = parser.add_mutually_exclusive_group()
    tables.add_argument("--table", action="store_true", help="the paper's Table 3 and ours")
    tables.add_argument("--deepep", action="store_true", help="DeepEP's measured figures and ours")
    tables.add_argument("--roce", action="store_true", help="rings by routing, beside a figure")
    tables.add_argument("--latency", action="store_true", help="of small messages")
    tables.add_argument("--contention", action="store_true", help="KV fetches beside EP on PCIe")
    add("--json", action="store_true", help="print one JSON object only")
    add("--png", type=Path, metavar="FILE", help="draw how full the links are")


def run(options: argparse.Namespace) -> int:
    """Prints what is asked for."""
    makers = {
        "table": _table3,
        "deepep": _deepep,
        "roce": _roce,
        "latency": _latency,
        "contention": _contention,
    }
    table = next((name for name in makers if getattr(options, name)), None)
    if table is None:
        return _run_scenario(options)
    for name, value in (("TOPOLOGY", options.topology), ("--png", options.png)):
        if value is not None:
            raise ValueError(f"{name} is {str(value)!r}, expected none beside --{table}")
    text, found = makers[table](options)
    print(json.dumps(found) if options.json else text)
    return 0


def _run_scenario(options: argparse.Namespace) -> int:
    if options.topology is None:
        raise ValueError(f"TOPOLOGY is missing, expected one of {', '.join(TOPOLOGIES)}")
    if options.gpus is None:
        raise ValueError("--gpus is missing, expected a multiple of 8")
    simulated = simulate(
        Scenario(
            topology=options.topology,
            gpus=options.gpus,
            radix=options.radix,
            gpu=options.gpu,
            is_achieved=not options.nominal,
            traffic=options.traffic,
            routing=options.routing,
            failures=tuple(options.fail),
            placement=options.placement,
            ep=options.ep,
            tokens=options.tokens,
            hidden_size=options.hidden_size,
            experts_file=options.experts,
            payload_bytes=DEFAULT_BYTES if options.bytes is None else options.bytes,
            group=options.group,
            stages=options.stages,
            seed=options.seed,
            tolerance=options.tolerance,
        )
    )
    if options.png is not None:
        from dsv3_jax.plan.network.draw import draw_png  # matplotlib, of which only this has need

        draw_png(simulated, options.png)
    if options.json:
        print(json.dumps(dataclasses.asdict(simulated.report)))
        return 0
    print(page.report_text(simulated.report))
    if options.png is not None:
        print(f"\ndrawn: {options.png}")
    return 0


def _table3(options: argparse.Namespace) -> tuple[str, Any]:
    prices = fit_prices()
    ours = [
        dataclasses.asdict(counts) | {"cost_dollars": prices.cost_dollars(counts)}
        for counts in table3_counts()
    ]
    published = [dataclasses.asdict(column) for column in PUBLISHED]
    found = {"ours": ours, "published": published, "prices": dataclasses.asdict(prices)}
    return page.table3_text(prices), found


def _deepep(options: argparse.Namespace) -> tuple[str, Any]:
    gpu = find_gpu(options.gpu)
    bandwidths = compare_bandwidths(gpu, achieved=not options.nominal, seed=options.seed)
    latencies = compare_latencies(gpu)
    found = {
        name: [dataclasses.asdict(c) | {"relative_error": c.relative_error} for c in comparisons]
        for name, comparisons in (
            ("bytes_per_second", bandwidths),
            ("low_latency_seconds", latencies),
        )
    }
    return page.deepep_text(bandwidths, latencies), found


def _roce(options: argparse.Namespace) -> tuple[str, Any]:
    found = compare_rings()
    return page.roce_text(found), [dataclasses.asdict(bar) for bar in found]


def _latency(options: argparse.Namespace) -> tuple[str, Any]:
    found = {
        "links": {name: dataclasses.asdict(link) for name, link in LATENCIES.items()},
        "messages_per_second": {name: MESSAGES_PER_SECOND[name] for name in INITIATORS},
    }
    return page.latency_text(), found


def _contention(options: argparse.Namespace) -> tuple[str, Any]:
    gpu = find_gpu(options.gpu)
    network = gpu.network_bytes_per_second
    if not options.nominal:
        network = gpu.network_achieved_bytes_per_second
    found = [
        share_pcie(
            ep_bytes=DISPATCH_BYTES if options.bytes is None else options.bytes,
            kv_bytes=options.kv_bytes,
            network_bytes_per_second=network,
            priority=priority,
        )
        for priority in PRIORITIES
    ]
    return page.contention_text(found), [
        dataclasses.asdict(c) | {"ep_slowdown": c.ep_slowdown, "kv_slowdown": c.kv_slowdown}
        for c in found
    ]
