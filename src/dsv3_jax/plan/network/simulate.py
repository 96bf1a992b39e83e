"""One exchange of a model on one network: what it takes, how full every link is, what holds it up.

A dispatch's (and a combine's) two hops run at the same time, as DeepEP's kernels chain them chunk
by chunk; the time of each is reported too. Propagation and posting are left out: see `latency`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.network.fabric import Fabric, make_fabric, parse_failures
from dsv3_jax.plan.network.fat_tree import build_ft2, build_ft3, build_mpft, build_mrft
from dsv3_jax.plan.network.fluid import Flows, Outcome, run_flows
from dsv3_jax.plan.network.gate import Gate
from dsv3_jax.plan.network.low_diameter import build_dragonfly, build_slim_fly
from dsv3_jax.plan.network.routes import ROUTINGS
from dsv3_jax.plan.network.table3 import count_topology, fit_prices
from dsv3_jax.plan.network.topology import Topology, count_nodes
from dsv3_jax.plan.network.transfers import (
    TRAFFICS,
    TokenCounts,
    Transfers,
    all_to_all,
    combine,
    count_tokens,
    dispatch,
    pipeline,
    ring_reduce,
    sample_counts,
)

TOPOLOGIES = ("ft2", "ft3", "mpft", "mrft", "slimfly", "dragonfly")
PLACEMENTS = ("packed", "scattered")
FP8_BYTES_PER_VALUE = 1 + 4 / 128
"""With an FP32 scale for each 128 values."""
BF16_BYTES_PER_VALUE = 2


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is simulated; `reduce`'s and `alltoall`'s bytes are `payload_bytes` a GPU."""

    topology: str
    gpus: int
    radix: int = 64
    gpu: str = "h800"
    is_achieved: bool = True
    """Links at the bandwidth achieved, not the nominal one."""
    traffic: str = "dispatch"
    routing: str = "adaptive"
    failures: tuple[str, ...] = ()
    placement: str = "packed"
    """Neighbouring nodes work together, or nodes drawn at random."""
    ep: int = 64
    tokens: int = 4096
    """A GPU's."""
    hidden_size: int = 7168
    experts_file: Path | None = None
    """A .npy of int [tokens, top_k], else a balanced gate is drawn from."""
    payload_bytes: float = 2.0**30
    group: int | None = None
    """GPUs that reduce together; None is all."""
    stages: int = 16
    seed: int = 0
    tolerance: float = 0.0

    def __post_init__(self):
        require_one_of("topology", self.topology, *TOPOLOGIES)
        require_one_of("traffic", self.traffic, *TRAFFICS)
        require_one_of("routing", self.routing, *ROUTINGS)
        require_one_of("placement", self.placement, *PLACEMENTS)
        count_nodes(self.gpus)
        require(self.hidden_size > 0, "hidden_size", self.hidden_size, "above 0")
        require(self.tokens > 0, "tokens", self.tokens, "above 0")
        require(self.payload_bytes > 0, "bytes", self.payload_bytes, "above 0")
        require(self.seed >= 0, "seed", self.seed, "at least 0")


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """Links at one place of the network, and the share of their capacity in use, over the time."""

    name: str
    links: int
    mean_use: float
    max_use: float


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """Figures of one exchange; bandwidths are bytes/s of a GPU one way."""

    topology: str
    gpus: int
    switches: int
    links: int
    cost_dollars: float
    """Switches and links at the prices fitted to the paper's Table 3."""
    traffic: str
    routing: str
    placement: str
    failures: str
    flows: int
    rounds: int
    """How often rates were computed."""
    tolerance: float
    """Of groups of many flows (`fluid`): about how much too late their ends may be."""
    seconds: float
    bound_seconds: float
    """What the busiest link needs."""
    network_seconds: float
    """When the last byte that crosses nodes has arrived."""
    nvlink_seconds: float
    """When the last transfer that stays in its node has."""
    network_bytes: float
    """Over the network, the mean of all GPUs."""
    network_bytes_per_second: float
    logical_bytes_per_second: float | None
    """As DeepEP counts: a copy for each node of a token, its own too; of dispatch and combine."""
    bottleneck: str
    layers: tuple[LayerUse, ...]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A report, with what a picture needs."""

    report: NetworkReport
    fabric: Fabric
    outcome: Outcome


def build_topology(name: str, gpus: int, radix: int = 64) -> Topology:
    """One of TOPOLOGIES for `gpus` GPUs; `radix` is of the fat trees."""
    require_one_of("topology", name, *TOPOLOGIES)
    if name == "slimfly":
        return build_slim_fly(gpus)
    if name == "dragonfly":
        return build_dragonfly(gpus)
    trees = {"ft2": build_ft2, "ft3": build_ft3, "mpft": build_mpft, "mrft": build_mrft}
    return trees[name](gpus, radix)


def simulate(scenario: Scenario) -> Simulated:
    """Runs one scenario."""
    s = scenario
    topology = build_topology(s.topology, s.gpus, s.radix)
    failures = parse_failures(list(s.failures))
    fabric = make_fabric(topology, find_gpu(s.gpu), achieved=s.is_achieved, failures=failures)
    rng = np.random.default_rng(s.seed)
    transfers, logical_bytes = _transfers(s, rng)
    if s.placement == "scattered":
        transfers = transfers.on_nodes(rng.permutation(count_nodes(s.gpus)))
    require(
        len(transfers.source) > 0, "traffic", s.traffic, f"one that moves bytes of {s.gpus} GPUs"
    )
    flows = fabric.flows(transfers, routing=s.routing, seed=s.seed)
    outcome = run_flows(flows, fabric.capacity, tolerance=s.tolerance)
    report = _make_report(s, fabric, flows, outcome, logical_bytes)
    return Simulated(report=report, fabric=fabric, outcome=outcome)


def _make_report(
    s: Scenario, fabric: Fabric, flows: Flows, outcome: Outcome, logical_bytes: float | None
) -> NetworkReport:
    topology, use, ends = fabric.topology, outcome.link_use, outcome.end_seconds
    crosses = fabric.crosses_nodes(flows)
    network_seconds = float(ends[crosses].max(initial=0.0))
    network_bytes = float(flows.size_bytes[crosses].sum()) / s.gpus
    logical = None if logical_bytes is None else logical_bytes / outcome.total_seconds
    layers = [
        LayerUse(
            name=name,
            links=len(links),
            mean_use=float(use[links].mean()),
            max_use=float(use[links].max()),
        )
        for name, links in fabric.link_layers().items()
    ]
    return NetworkReport(
        topology=topology.name,
        gpus=s.gpus,
        switches=topology.switches,
        links=len(topology.links),
        cost_dollars=fit_prices().cost_dollars(count_topology(topology)),
        traffic=s.traffic,
        routing=s.routing,
        placement=s.placement,
        failures=str(fabric.failures),
        flows=len(flows),
        rounds=outcome.rounds,
        tolerance=s.tolerance,
        seconds=outcome.total_seconds,
        bound_seconds=outcome.bound_seconds,
        network_seconds=network_seconds,
        nvlink_seconds=float(ends[~crosses].max(initial=0.0)),
        network_bytes=network_bytes,
        network_bytes_per_second=network_bytes / network_seconds if network_bytes else 0.0,
        logical_bytes_per_second=logical,
        bottleneck=_name_busiest(fabric, outcome),
        layers=tuple(layers),
    )


def _name_busiest(fabric: Fabric, outcome: Outcome) -> str:
    """The link with most to carry for its capacity, of equals the nearest to a GPU."""
    use = outcome.link_use
    is_busiest = use >= use.max() * (1 - 1e-9)
    order = np.concatenate(list(fabric.link_layers().values()))
    name = fabric.link_name(int(order[is_busiest[order]][0]))
    others = int(is_busiest.sum()) - 1
    return f"{name} and {others:,} more" if others else name


def _transfers(s: Scenario, rng: np.random.Generator) -> tuple[Transfers, float | None]:
    """What moves, and for dispatch and combine the bytes a GPU as DeepEP counts them."""
    if s.traffic == "alltoall":
        return all_to_all(s.gpus, s.payload_bytes), None
    if s.traffic == "pipeline":
        sent_bytes = float(s.tokens * s.hidden_size * BF16_BYTES_PER_VALUE)
        return pipeline(s.gpus, s.stages, sent_bytes), None
    if s.traffic == "reduce":
        size = s.gpus if s.group is None else s.group
        rule = f"a divisor of the {s.gpus} GPUs, at least 2"
        require(size >= 2 and s.gpus % size == 0, "group", size, rule)
        groups = np.arange(s.gpus).reshape(-1, size)
        return ring_reduce(groups, s.payload_bytes), None
    rule = f"a divisor of the {s.gpus} GPUs"
    require(s.ep > 0 and s.gpus % s.ep == 0, "ep", s.ep, rule)
    counts = _token_counts(s, rng)
    if s.traffic == "dispatch":
        token_bytes = s.hidden_size * FP8_BYTES_PER_VALUE
        return dispatch(counts, token_bytes), counts.copies * token_bytes
    token_bytes = float(s.hidden_size * BF16_BYTES_PER_VALUE)
    return combine(counts, token_bytes), counts.copies * token_bytes


def _token_counts(s: Scenario, rng: np.random.Generator) -> TokenCounts:
    groups = s.gpus // s.ep
    if s.experts_file is None:
        return sample_counts(Gate(), s.tokens, s.ep, groups, rng)
    experts = np.load(s.experts_file)
    field, rule = f"experts of {s.experts_file}", "a .npy array of integers [tokens, top_k]"
    require(
        experts.ndim == 2 and np.issubdtype(experts.dtype, np.integer),
        field,
        f"{experts.dtype}{list(experts.shape)}",
        rule,
    )
    return count_tokens(experts, Gate(), s.ep, groups)
