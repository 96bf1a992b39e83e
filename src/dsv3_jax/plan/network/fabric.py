"""A cluster's links, those inside nodes too, and the flows that transfers become on them.

Directed links, in this order: both directions of every switch link; then for each GPU its NIC out,
NIC in, NVLink out, NVLink in. NVSwitches do not block, so a node has no other links.

On a network with rails (multi-plane, multi-rail) a transfer first goes over NVLink to the GPU whose
index its target has, then over that rail (NCCL calls it PXN); on others it goes from NIC to NIC.
Where one of the two NICs has failed, it is split evenly over the rails that work at both ends, with
a hop over NVLink before and after. A flow moves at one rate along all its links.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.network.fluid import NO_LINK, Flows
from dsv3_jax.plan.network.routes import (
    ROUTINGS,
    Graph,
    Routes,
    hash_of,
    single_paths,
    spray,
)
from dsv3_jax.plan.network.topology import GPUS_PER_NODE, Topology
from dsv3_jax.plan.network.transfers import Transfers

NIC_OUT, NIC_IN, NVLINK_OUT, NVLINK_IN = range(4)
OWN_LAYERS = ("NIC out", "NIC in", "NVLink out", "NVLink in")


@dataclass(frozen=True, kw_only=True)
class Failures:
    """What does not work: planes, NICs (by GPU), links between switches (by number)."""

    planes: frozenset[int] = frozenset()
    nics: frozenset[int] = frozenset()
    links: frozenset[int] = frozenset()

    def __str__(self) -> str:
        kinds = (("plane", self.planes), ("nic", self.nics), ("link", self.links))
        return ", ".join(f"{kind}={n}" for kind, numbers in kinds for n in sorted(numbers))


def parse_failures(texts: list[str]) -> Failures:
    """Of `plane=3`, `nic=17`, `link=5`."""
    found: dict[str, set[int]] = {"plane": set(), "nic": set(), "link": set()}
    for text in texts:
        kind, _, number = text.partition("=")
        rule = "plane=N, nic=N or link=N"
        require(kind in found and number.isdecimal(), "--fail", text, rule)
        found[kind].add(int(number))
    return Failures(
        planes=frozenset(found["plane"]),
        nics=frozenset(found["nic"]),
        links=frozenset(found["link"]),
    )


class Fabric:
    """A topology with the bandwidths of its links (bytes/s each way) and its failures."""

    def __init__(
        self,
        topology: Topology,
        *,
        network_bytes_per_second: float,
        nvlink_bytes_per_second: float,
        failures: Failures = Failures(),
    ):
        _check_failures(topology, failures)
        self.topology, self.failures = topology, failures
        self.gpus, self.switch_links = topology.endpoints, 2 * len(topology.links)
        self.graph = Graph(topology, failures.links)
        self.nic_works = ~np.isin(np.arange(self.gpus), list(failures.nics))
        self.nic_works &= ~np.isin(topology.endpoint_plane, list(failures.planes))
        network = network_bytes_per_second
        link_works = ~np.isin(np.arange(len(topology.links)), list(failures.links))
        plane = topology.switch_plane[topology.links[:, 0]]
        link_works &= ~np.isin(plane, list(failures.planes))
        nics = network * self.nic_works
        nvlinks = np.full(2 * self.gpus, nvlink_bytes_per_second)
        self.capacity: Float[np.ndarray, " links"] = np.concatenate(
            [network * np.repeat(link_works, 2), nics, nics, nvlinks]
        )

    def link_of(self, kind: int, gpu: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The numbers of GPUs' own links; `kind` is an index into OWN_LAYERS."""
        return self.switch_links + kind * self.gpus + gpu

    def link_name(self, link: int) -> str:
        """E.g. `NIC out of GPU 12`, `leaf 3 to spine 66`."""
        if link < self.switch_links:
            ends = self.topology.links[link // 2]
            source, target = ends if link % 2 == 0 else ends[::-1]
            name = self.topology.switch_name
            return f"{name(int(source))} to {name(int(target))}"
        kind, gpu = divmod(link - self.switch_links, self.gpus)
        return f"{OWN_LAYERS[kind]} of GPU {gpu}"

    def link_layers(self) -> dict[str, Int[np.ndarray, " some"]]:
        """Links by where they are, from the GPUs up to the highest switches, and down."""
        layer, names = self.topology.switch_layer, self.topology.layers
        ends = np.stack([self.topology.links, self.topology.links[:, ::-1]], axis=1).reshape(-1, 2)
        gpus = np.arange(self.gpus)
        found = {name: self.link_of(kind, gpus) for kind, name in enumerate(OWN_LAYERS)}
        for first, second in sorted({(int(a), int(b)) for a, b in layer[ends]}):
            chosen = (layer[ends] == (first, second)).all(axis=1)
            found[f"{names[first]} to {names[second]}"] = np.flatnonzero(chosen)
        return found

    def flows(self, transfers: Transfers, *, routing: str, seed: int = 0) -> Flows:
        """The flows of all `transfers`; `seed` is of the hashes of ecmp."""
        require_one_of("routing", routing, *ROUTINGS)
        which, leaves, enters = self._rails(transfers)
        source, target = transfers.source[which], transfers.target[which]
        own = np.full((len(which), 6), NO_LINK)
        for column, kind, gpu, applies in (
            (0, NVLINK_OUT, source, leaves != source),
            (1, NVLINK_IN, leaves, leaves != source),
            (2, NIC_OUT, leaves, leaves != enters),
            (3, NIC_IN, enters, leaves != enters),
            (4, NVLINK_OUT, enters, enters != target),
            (5, NVLINK_IN, target, enters != target),
        ):
            own[applies, column] = self.link_of(kind, gpu)[applies]
        parts = np.bincount(which, minlength=len(transfers.source))
        route, routes = self._routes(leaves, enters, routing, seed)
        size = (transfers.size_bytes / parts)[which]
        return Flows(size_bytes=size, own=own, route=route, routes=routes)

    def crosses_nodes(self, flows: Flows) -> Bool[np.ndarray, " flows"]:
        """Which flows leave their node."""
        return flows.own[:, 2] != NO_LINK

    def _rails(
        self, transfers: Transfers
    ) -> tuple[np.ndarray, Int[np.ndarray, " flows"], Int[np.ndarray, " flows"]]:
        """Each flow's transfer, the GPU whose NIC it leaves its node on, and that it enters on.

        Inside a node both are the source (as if its NIC were not there).
        """
        source, target = transfers.source, transfers.target
        home, away = source // GPUS_PER_NODE, target // GPUS_PER_NODE
        crosses = home != away
        leaves = source
        if self.topology.has_rails:
            leaves = np.where(crosses, home * GPUS_PER_NODE + target % GPUS_PER_NODE, source)
        enters = np.where(crosses, target, source)
        broken = crosses & ~(self.nic_works[leaves] & self.nic_works[enters])
        which = np.arange(len(source))
        if not broken.any():
            return which, leaves, enters
        works = self.nic_works.reshape(-1, GPUS_PER_NODE)
        usable: Bool[np.ndarray, "broken rails"] = works[home[broken]] & works[away[broken]]
        if not usable.any(axis=1).all():
            pair = int(np.flatnonzero(broken)[~usable.any(axis=1)][0])
            rule = f"a rail that works on both node {home[pair]} and node {away[pair]}"
            raise ValueError(f"--fail is {self.failures}, expected {rule}")
        row, rail = np.nonzero(usable)
        split = np.flatnonzero(broken)[row]
        return (
            np.concatenate([which[~broken], split]),
            np.concatenate([leaves[~broken], home[split] * GPUS_PER_NODE + rail]),
            np.concatenate([enters[~broken], away[split] * GPUS_PER_NODE + rail]),
        )

    def _routes(
        self, leaves: np.ndarray, enters: np.ndarray, routing: str, seed: int
    ) -> tuple[Int[np.ndarray, " flows"], Routes]:
        """Each flow's route between the switches of its NICs; sprayed ones are shared."""
        at, to = self.topology.endpoint_switch[leaves], self.topology.endpoint_switch[enters]
        route = np.full(len(at), NO_LINK)
        moves = at != to
        if routing == "adaptive":
            pairs, place = np.unique(np.stack([at, to])[:, moves], axis=1, return_inverse=True)
            route[moves] = place
            return route, spray(self.graph, pairs[0], pairs[1])
        route[moves] = np.arange(int(moves.sum()))
        if routing == "static":
            key = np.argsort(np.argsort(self.topology.endpoint_switch, kind="stable"))
            key = key.astype(np.uint64)[enters]
        else:
            key = hash_of(leaves.astype(np.uint64), seed)
            key = hash_of(key ^ enters.astype(np.uint64), seed)
        return route, single_paths(self.graph, at[moves], to[moves], key[moves], routing)


def make_fabric(
    topology: Topology, gpu: Gpu, *, achieved: bool = True, failures: Failures = Failures()
) -> Fabric:
    """A fabric of that GPU's NVLink and NIC, at the bandwidth achieved or the nominal one."""
    network, nvlink = gpu.network_bytes_per_second, gpu.nvlink_bytes_per_second
    if achieved:
        network = gpu.network_achieved_bytes_per_second
        nvlink = gpu.nvlink_achieved_bytes_per_second
    return Fabric(
        topology,
        network_bytes_per_second=network,
        nvlink_bytes_per_second=nvlink,
        failures=failures,
    )


def _check_failures(topology: Topology, failures: Failures) -> None:
    limits = (
        ("plane", failures.planes, topology.planes),
        ("nic", failures.nics, topology.endpoints),
        ("link", failures.links, len(topology.links)),
    )
    for kind, numbers, count in limits:
        for number in sorted(numbers):
            rule = f"below {count} in {topology.name} (it has {count})"
            require(0 <= number < count, f"--fail {kind}", number, rule)
    if failures.planes:
        rule = "plane only where there are several (mpft)"
        require(topology.planes > 1, "--fail", str(failures), rule)
