"""Fat trees of two and three layers, in one plane, in eight, or with rails.

    FT2   k leaves of k/2 endpoints and k/2 uplinks, k/2 spines
    FT3   k pods of k/2 edge switches and k/2 aggregation switches, k²/4 cores
    MPFT  GPU i of every node in plane i; each plane is an FT2 of its own
    MRFT  NIC i of 32 nodes (radix 64) on one leaf; two layers join the rails while the leaves fit
          under one layer of spines, three beyond: then a pod is (a part of) a rail

Built for fewer endpoints than the radix allows, a tree has only the leaves it needs and as many
spines as keep it non-blocking, with parallel links where a leaf has more uplinks than spines.
Source: "Insights into DeepSeek-V3" (arXiv 2505.09343) §5.1 and Table 3.
"""

import numpy as np
from jaxtyping import Int

from dsv3_jax.config.checks import require
from dsv3_jax.plan.network.topology import (
    GPUS_PER_NODE,
    Pairs,
    Topology,
    count_nodes,
    single_plane,
)


def build_ft2(gpus: int, radix: int = 64) -> Topology:
    """A two-layer fat tree with `gpus` endpoints in order on its leaves."""
    _check(gpus, radix, radix**2 // 2, "a two-layer fat tree")
    leaf = np.arange(gpus) // (radix // 2)
    links, layer = _two_layers(int(leaf[-1]) + 1, radix)
    return single_plane("FT2", leaf, links, layer, ("leaf", "spine"))


def build_ft3(gpus: int, radix: int = 64) -> Topology:
    """A three-layer fat tree with `gpus` endpoints in order on its edge switches."""
    _check(gpus, radix, radix**3 // 4, "a three-layer fat tree")
    edge = np.arange(gpus) // (radix // 2)
    edges_of_pod = _split(int(edge[-1]) + 1, radix // 2)
    links, layer = _three_layers(edges_of_pod, radix)
    return single_plane("FT3", edge, links, layer, ("edge", "aggregation", "core"))


def build_mpft(gpus: int, radix: int = 64) -> Topology:
    """Eight two-layer fat trees: GPU i of each node is an endpoint of plane i."""
    nodes = count_nodes(gpus)
    _check(nodes, radix, radix**2 // 2, "a plane of a multi-plane fat tree")
    leaves = -(-nodes // (radix // 2))
    links, layer = _two_layers(leaves, radix)
    plane = np.arange(gpus) % GPUS_PER_NODE
    leaf = np.arange(gpus) // GPUS_PER_NODE // (radix // 2)
    planes = np.arange(GPUS_PER_NODE)
    return Topology(
        name="MPFT",
        endpoint_switch=leaf + plane * len(layer),
        links=(links[None] + planes[:, None, None] * len(layer)).reshape(-1, 2),
        switch_layer=np.tile(layer, GPUS_PER_NODE),
        layers=("leaf", "spine"),
        endpoint_plane=plane,
        switch_plane=np.repeat(planes, len(layer)),
        has_rails=True,
    )


def build_mrft(gpus: int, radix: int = 64) -> Topology:
    """One fat tree whose leaves are rails: NICs of the same index of neighbouring nodes."""
    nodes = count_nodes(gpus)
    _check(gpus, radix, radix**3 // 4, "a multi-rail fat tree")
    blocks = -(-nodes // (radix // 2))
    rail, block = np.arange(gpus) % GPUS_PER_NODE, np.arange(gpus) // GPUS_PER_NODE // (radix // 2)
    leaf = rail * blocks + block
    if GPUS_PER_NODE * blocks <= radix:
        links, layer = _two_layers(GPUS_PER_NODE * blocks, radix)
        return single_plane("MRFT", leaf, links, layer, ("leaf", "spine"), has_rails=True)
    pods = _split(blocks, radix // 2) * GPUS_PER_NODE
    require(len(pods) <= radix, "gpus", gpus, f"at most {radix} pods of one rail, not {len(pods)}")
    links, layer = _three_layers(pods, radix)
    names = ("edge", "aggregation", "core")
    return single_plane("MRFT", leaf, links, layer, names, has_rails=True)


def _check(endpoints: int, radix: int, most: int, what: str) -> None:
    require(radix >= 4 and radix % 2 == 0, "radix", radix, "an even number, at least 4")
    rule = f"1 to {most} endpoints in {what} of radix {radix}"
    require(1 <= endpoints <= most, "endpoints", endpoints, rule)


def _split(items: int, most: int) -> list[int]:
    """Sizes of full groups of `most`, and the rest."""
    full, rest = divmod(items, most)
    return [most] * full + [rest] * (rest > 0)


def _upper_switches(lower: int, uplinks: int, ports: int) -> int:
    """The fewest switches, a divisor of `uplinks`, with ports for all of every lower one's."""
    return next(
        n for n in range(1, uplinks + 1) if uplinks % n == 0 and n * ports >= lower * uplinks
    )


def _two_layers(leaves: int, radix: int) -> tuple[Pairs, Int[np.ndarray, " switches"]]:
    """Links and layers of leaves 0, 1, ... and the spines behind them; one leaf needs no spine."""
    spines = _upper_switches(leaves, radix // 2, radix) if leaves > 1 else 0
    layer = np.repeat([0, 1], [leaves, spines])
    if not spines:
        return np.zeros((0, 2), dtype=np.int64), layer
    return _cross(np.arange(leaves), leaves + np.arange(spines), radix // 2 // spines), layer


def _three_layers(
    edges_of_pod: list[int], radix: int
) -> tuple[Pairs, Int[np.ndarray, " switches"]]:
    """Edge switches pod by pod, then aggregation switches pod by pod, then cores."""
    half, pods, edges = radix // 2, len(edges_of_pod), sum(edges_of_pod)
    cores = _upper_switches(pods, half, radix) if pods > 1 else 0
    parts, first_edge = [], 0
    for pod, count in enumerate(edges_of_pod):
        aggregation = edges + pod * half + np.arange(half)
        parts.append(_cross(first_edge + np.arange(count), aggregation, 1))
        first_edge += count
        for place in range(half if cores else 0):  # each place of a pod has its own group of cores
            core = edges + pods * half + place * cores + np.arange(cores)
            parts.append(_cross(aggregation[place : place + 1], core, half // cores))
    layer = np.repeat([0, 1, 2], [edges, pods * half, half * cores])
    return np.concatenate(parts), layer


def _cross(
    lower: Int[np.ndarray, " lower"], upper: Int[np.ndarray, " upper"], parallel: int
) -> Pairs:
    """`parallel` links between each lower and each upper switch."""
    first = np.repeat(lower, len(upper) * parallel)
    second = np.tile(np.repeat(upper, parallel), len(lower))
    return np.stack([first, second], axis=1)
