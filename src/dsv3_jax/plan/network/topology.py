"""A network as a graph: switches, the links between them, and the switch of every NIC.

Endpoint g is the NIC of GPU g, which is GPU g % 8 of node g // 8. Links are counted once and carry
their bandwidth both ways.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dsv3_jax.config.checks import require

GPUS_PER_NODE = 8
NO_PLANE = -1

Pairs = Int[np.ndarray, "links 2"]


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Switches, links between two of them (parallel ones apart), and where the endpoints hang."""

    name: str
    endpoint_switch: Int[np.ndarray, " endpoints"]
    links: Pairs
    switch_layer: Int[np.ndarray, " switches"]
    """Index into `layers`."""
    layers: tuple[str, ...]
    endpoint_plane: Int[np.ndarray, " endpoints"]
    """Endpoints of different planes have no way to each other; all of one plane are 0."""
    switch_plane: Int[np.ndarray, " switches"]
    has_rails: bool = False
    """NICs of one index hang together, so traffic to another index first goes over NVLink (PXN)."""

    @property
    def endpoints(self) -> int:
        return len(self.endpoint_switch)

    @property
    def switches(self) -> int:
        return len(self.switch_layer)

    @property
    def planes(self) -> int:
        return int(self.switch_plane.max()) + 1

    def link_name(self, link: int) -> str:
        """E.g. `leaf 3 - spine 66`."""
        first, second = (int(switch) for switch in self.links[link])
        return f"{self.switch_name(first)} - {self.switch_name(second)}"

    def switch_name(self, switch: int) -> str:
        return f"{self.layers[self.switch_layer[switch]]} {switch}"


def single_plane(
    name: str,
    endpoint_switch: Int[np.ndarray, " endpoints"],
    links: Pairs,
    switch_layer: Int[np.ndarray, " switches"],
    layers: tuple[str, ...],
    *,
    has_rails: bool = False,
) -> Topology:
    """A topology of a single plane."""
    return Topology(
        name=name,
        endpoint_switch=endpoint_switch,
        links=links,
        switch_layer=switch_layer,
        layers=layers,
        endpoint_plane=np.zeros_like(endpoint_switch),
        switch_plane=np.zeros_like(switch_layer),
        has_rails=has_rails,
    )


def count_nodes(gpus: int) -> int:
    """Nodes of eight GPUs; ValueError where they are not whole."""
    rule = f"a positive multiple of {GPUS_PER_NODE}"
    require(gpus > 0 and gpus % GPUS_PER_NODE == 0, "gpus", gpus, rule)
    return gpus // GPUS_PER_NODE


def hops_between(topology: Topology, source: int) -> Int[np.ndarray, " switches"]:
    """Links on the shortest way from switch `source` to each other one; -1 where there is none."""
    distance = np.full(topology.switches, -1)
    distance[source] = 0
    ends = np.concatenate([topology.links, topology.links[:, ::-1]])
    for step in range(1, topology.switches):
        reached = ends[distance[ends[:, 0]] == step - 1, 1]
        reached = reached[distance[reached] < 0]
        if not reached.size:
            break
        distance[reached] = step
    return distance


def diameter(topology: Topology) -> int:
    """Links between the two switches with endpoints that are farthest apart.

    Raises ValueError for a topology in parts.
    """
    ends = np.unique(topology.endpoint_switch)
    hops = np.stack([hops_between(topology, int(switch))[ends] for switch in ends])
    require(bool((hops >= 0).all()), "topology", topology.name, "one whose switches are connected")
    return int(hops.max())
