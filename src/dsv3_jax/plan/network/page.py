"""What `dsv3 plan network` prints: a few lines and tables for a person."""

from collections.abc import Sequence

from dsv3_jax.plan.network.contention import Contention
from dsv3_jax.plan.network.deepep import Comparison
from dsv3_jax.plan.network.fluid import EXACT_FLOWS
from dsv3_jax.plan.network.latency import (
    CROSS_LEAF,
    LATENCIES,
    MESSAGES_PER_SECOND,
    SAME_LEAF,
)
from dsv3_jax.plan.network.roce import NODES, RingBandwidth
from dsv3_jax.plan.network.simulate import NetworkReport
from dsv3_jax.plan.network.table3 import PUBLISHED, UnitPrices, table3_counts


def report_text(report: NetworkReport) -> str:
    """The exchange, its times, its bandwidth, and a table of how full the links are."""
    r = report
    failed = f", failed: {r.failures}" if r.failures else ""
    lines = [
        f"{r.traffic} on {r.topology}: {r.gpus:,} GPUs, {r.switches:,} switches, {r.links:,} links"
        f" between them, {r.cost_dollars / 1e6:,.2f} M$",
        f"routing      {r.routing}, nodes {r.placement}{failed}",
        f"time         {_ms(r.seconds)}; the busiest link alone needs {_ms(r.bound_seconds)}",
        f"flows        {r.flows:,}; rates shared anew {r.rounds:,} times, groups of more than"
        f" {EXACT_FLOWS:,} flows to {r.tolerance:.1%}",
        f"parts        network {_ms(r.network_seconds)}, inside nodes only {_ms(r.nvlink_seconds)}",
        f"a GPU        {r.network_bytes / 1e6:,.4g} MB over the network,"
        f" {r.network_bytes_per_second / 1e9:.2f} GB/s",
    ]
    if r.logical_bytes_per_second is not None:
        counted = r.logical_bytes_per_second / 1e9
        lines.append(f"             {counted:.2f} GB/s as DeepEP counts, its own node's tokens too")
    lines.append(f"bottleneck   {r.bottleneck}")
    rows = [
        (layer.name, f"{layer.links:,}", f"{layer.mean_use:.1%}", f"{layer.max_use:.1%}")
        for layer in r.layers
    ]
    return "\n".join([*lines, "", *_table(("links", "number", "mean use", "busiest"), rows)])


def table3_text(prices: UnitPrices) -> str:
    """The paper's Table 3 beside our counts and costs."""
    rows = []
    for counts, paper in zip(table3_counts(), PUBLISHED, strict=True):
        cost = prices.cost_dollars(counts)
        rows.append(
            (
                counts.name,
                *(
                    f"{ours:,} / {theirs:,}"
                    for ours, theirs in (
                        (counts.endpoints, paper.endpoints),
                        (counts.switches, paper.switches),
                        (counts.links, paper.links),
                    )
                ),
                f"{cost / 1e6:,.1f} / {paper.cost_million_dollars:,.0f}",
                f"{cost / counts.endpoints / 1e3:.2f} / {paper.thousand_dollars_per_endpoint}",
            )
        )
    header = ("ours / Table 3", "endpoints", "switches", "links", "M$", "k$ an endpoint")
    return "\n".join(
        [
            *_table(header, rows),
            "",
            f"prices fitted to the five costs: ${prices.switch_dollars:,.0f} a switch,"
            f" ${prices.link_dollars:,.0f} a link; worst column"
            f" {prices.worst_relative_error:.1%} off",
            "SF: q = 28 is no prime power, so this Slim Fly is arithmetic; no such graph exists",
        ]
    )


def deepep_text(bandwidths: Sequence[Comparison], latencies: Sequence[Comparison]) -> str:
    """DeepEP's measured figures beside the predictions."""
    parts = []
    for title, unit, scale, found in (
        ("normal kernels, GB/s a GPU", "GB/s", 1e-9, bandwidths),
        ("low-latency kernels, µs", "µs", 1e6, latencies),
    ):
        rows = [
            (
                c.what,
                str(c.gpus),
                f"{c.measured * scale:.1f} {unit}",
                f"{c.predicted * scale:.1f} {unit}",
                f"{c.relative_error:+.1%}",
            )
            for c in found
        ]
        parts += [title, *_table(("", "GPUs", "measured", "predicted", "error"), rows), ""]
    return "\n".join(parts[:-1])


def roce_text(found: Sequence[RingBandwidth]) -> str:
    """Rings by routing beside the bars of "Insights", Figure 8."""
    rows = [
        (
            f"TP {bar.tensor_parallel}",
            bar.routing,
            f"{bar.published / 1e9:.0f} GB/s",
            f"{bar.predicted / 1e9:.1f} GB/s",
        )
        for bar in found
    ]
    note = f"bars are read off a figure; a cluster of {NODES} nodes is assumed"
    return "\n".join([*_table(("ring", "routing", "about", "ours"), rows), "", note])


def latency_text() -> str:
    """First-byte latency by link and hops, and how many messages a GPU can post."""
    rows = [
        (
            name,
            *(
                f"{latency.first_byte_seconds(switches) * 1e6:.2f} µs" if switching else "-"
                for switches, switching in ((0, name == "nvlink"), (SAME_LEAF, name != "nvlink"))
            ),
            f"{latency.first_byte_seconds(CROSS_LEAF) * 1e6:.2f} µs" if name != "nvlink" else "-",
        )
        for name, latency in LATENCIES.items()
    ]
    posted = ", ".join(
        f"{name} {rate / 1e6:g} million/s" for name, rate in MESSAGES_PER_SECOND.items()
    )
    return "\n".join(
        [
            *_table(("64 bytes", "in the node", "same leaf", "across leaves"), rows),
            "",
            f"messages a GPU can post: {posted}",
        ]
    )


def contention_text(found: Sequence[Contention]) -> str:
    """What KV fetches and expert-parallel traffic cost each other on one PCIe switch."""
    rows = [
        (
            c.priority,
            _ms(c.ep_seconds),
            f"{c.ep_slowdown:.2f}x",
            _ms(c.kv_seconds),
            f"{c.kv_slowdown:.2f}x",
        )
        for c in found
    ]
    header = ("priority", "EP", "slower", "KV fetch", "slower")
    alone = found[0]
    return "\n".join(
        [
            f"alone: EP {_ms(alone.ep_alone_seconds)}, KV fetch {_ms(alone.kv_alone_seconds)}",
            *_table(header, rows),
        ]
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, the first on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
