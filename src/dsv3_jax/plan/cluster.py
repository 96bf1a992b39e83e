"""A cluster as data: its GPUs, nodes, links and prices, from clusters/*.toml or a user's own file.

    name = "mine"
    gpu = "h100"                      # one of gpus/*.toml
    fabric = "roce"                   # infiniband, roce or nvlink
    nodes = { value = 16, source = "the offer" }
    ...
    [gpu_changes]                     # fields of the GPU that are others here
    memory_bytes = { value = 94, unit = "GB", source = "data sheet of the H100 NVL" }

Imports no JAX. Bandwidths are of one direction.
"""

import math
import types
import typing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.plan.hardware import Gpu, find_gpu, gpu_sources, read_gpu
from dsv3_jax.plan.quantities import read_quantity, read_toml

DIRECTORY = Path(__file__).with_name("clusters")
FABRICS = ("infiniband", "roce", "nvlink")
IN_NETWORK = ("none", "codec")


@dataclass(frozen=True, kw_only=True)
class Link:
    """One kind of link, a GPU."""

    name: str
    bytes_per_second: float
    achieved_bytes_per_second: float
    latency_seconds: float
    """Of a small message, from CPU to CPU."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """So many nodes of one kind. A node is what NVLink joins, a rack of 72 too."""

    name: str
    gpu: Gpu
    fabric: str
    """What joins the nodes."""
    nodes: int
    gpus_per_node: int
    nics_per_node: int
    planes: int
    """Networks that are apart from each other; NIC i of a node is in plane i mod planes."""
    network_latency_seconds: float
    nvlink_latency_seconds: float
    pcie_bytes_per_second: float
    """Of what joins a GPU to its host."""
    pcie_achieved_bytes_per_second: float
    host_memory_bytes_per_second: float
    """Of a node."""
    gpu_dollars_per_hour: float | None = None
    communication_sms: int = 20
    """Multiprocessors that a transfer between experts takes from kernels beside it; 0 where a
    co-processor does it ("Insights" §4.4)."""
    in_network: str = "none"
    """`codec`: the network packs LogFMT, no multiprocessor does ("Insights" §3.2, §6.5)."""

    def __post_init__(self):
        require_one_of("cluster.fabric", self.fabric, *FABRICS)
        require_one_of("cluster.in_network", self.in_network, *IN_NETWORK)
        for name in ("nodes", "gpus_per_node", "nics_per_node", "planes"):
            value = getattr(self, name)
            require(value >= 1, f"cluster.{name}", value, "at least 1")
        rule = f"a divisor of cluster.nics_per_node = {self.nics_per_node}"
        require(self.nics_per_node % self.planes == 0, "cluster.planes", self.planes, rule)
        most = self.gpu.multiprocessors - 1
        holds = 0 <= self.communication_sms <= most
        rule = f"from 0 to {most}, fewer than the GPU has"
        require(holds, "cluster.communication_sms", self.communication_sms, rule)

    @property
    def num_gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def network_share(self) -> float:
        """NICs a GPU."""
        return self.nics_per_node / self.gpus_per_node

    @property
    def nvlink(self) -> Link:
        gpu = self.gpu
        return Link(
            name="nvlink",
            bytes_per_second=gpu.nvlink_bytes_per_second,
            achieved_bytes_per_second=gpu.nvlink_achieved_bytes_per_second,
            latency_seconds=self.nvlink_latency_seconds,
        )

    @property
    def network(self) -> Link:
        """What a GPU has of its node's NICs."""
        gpu, share = self.gpu, self.network_share
        return Link(
            name=self.fabric,
            bytes_per_second=gpu.network_bytes_per_second * share,
            achieved_bytes_per_second=gpu.network_achieved_bytes_per_second * share,
            latency_seconds=self.network_latency_seconds,
        )

    @property
    def pcie(self) -> Link:
        return Link(
            name="pcie",
            bytes_per_second=self.pcie_bytes_per_second,
            achieved_bytes_per_second=self.pcie_achieved_bytes_per_second,
            latency_seconds=0.0,
        )


_TEXTS = ("name", "gpu", "fabric", "in_network")
_QUANTITIES = {
    name: next(o for o in (typing.get_args(hint) or (hint,)) if o is not type(None))
    for name, hint in typing.get_type_hints(Cluster).items()
    if name not in _TEXTS
}
_OPTIONAL = ("gpu_dollars_per_hour", "communication_sms", "in_network")


def cluster_names() -> list[str]:
    """Those that come with the package."""
    return sorted(path.stem for path in DIRECTORY.glob("*.toml"))


def find_cluster(name: str) -> Cluster:
    """The cluster of that name, or of the TOML file at that path; ValueError says what there is."""
    if name.endswith(".toml"):
        return read_cluster(Path(name))
    names = cluster_names()
    rule = f"one of {', '.join(names)}, or a .toml file"
    require(name in names, "--cluster", name, rule)
    return read_cluster(DIRECTORY / f"{name}.toml")


def read_cluster(path: Path) -> Cluster:
    """The cluster that the file at `path` describes; ValueError names what is wrong in it."""
    table, where = read_toml(path), path.name
    known = {*_TEXTS, *_QUANTITIES, "gpu_changes"}
    for field in table:
        require(field in known, where, field, f"one of {', '.join(sorted(known))}")
    missing = sorted(known - {*_OPTIONAL, "gpu_changes"} - set(table))
    require(not missing, where, sorted(table), f"{', '.join(missing)} as well")
    values: dict[str, Any] = {}
    for field, given in table.items():
        if field in _QUANTITIES:
            values[field], _ = read_quantity(where, field, given, _QUANTITIES[field])
        elif field in _TEXTS:
            require(isinstance(given, str), f"{where}: {field}", given, "a text")
            values[field] = given
    gpu = find_gpu(values.pop("gpu"))
    if changes := table.get("gpu_changes"):
        gpu = read_gpu(changes, f"{where}: gpu_changes", gpu)
    gpu = replace(gpu, gpus_per_node=values["gpus_per_node"])
    return Cluster(gpu=gpu, **values)


def read_sources(path: Path) -> dict[str, str]:
    """Where each number of the cluster and of its GPU is from, by field."""
    table = read_toml(path)
    given = table | table.pop("gpu_changes", {})
    own = {name: item["source"] for name, item in given.items() if isinstance(item, dict)}
    return gpu_sources(table["gpu"]) | own


def changed(cluster: Cluster, field: str, text: str) -> Cluster:
    """`cluster` with `cluster.FIELD` or `gpu.FIELD` set to `text`, in the field's own unit.

    ValueError names an unknown field, or a value that is none of its type.
    """
    section, _, name = field.partition(".")
    part = cluster.gpu if section == "gpu" else cluster
    hints = typing.get_type_hints(type(part))
    known = [f.name for f in fields(part) if hints[f.name] is not Gpu]
    require(name in known, f"{section}.FIELD", name, f"one of {', '.join(sorted(known))}")
    hint = hints[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next((kind for kind in kinds if kind in (int, float, str)), None)
    require(kind is not None, field, text, "a field that is one number or text")
    assert kind is not None
    value = text if kind is str else _number(field, text, kind)
    if section == "gpu":
        return replace(cluster, gpu=replace(cluster.gpu, **{name: value}))
    return replace(cluster, **{name: value})


def _number(field: str, text: str, kind: type) -> Any:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{field} is {text!r}, expected a number") from None
    zero = field == "cluster.communication_sms"
    holds = math.isfinite(value) and (value > 0 or (zero and value == 0))
    require(holds, field, text, "a positive number")
    require(kind is float or value == int(value), field, text, "a whole number")
    return kind(value)
