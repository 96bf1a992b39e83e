"""Ring collectives over RoCE under each routing, beside the bars of a published figure.

NCCL's AllGather and ReduceScatter for tensor parallelism of 8, 4 and 2 ("Insights into
DeepSeek-V3", arXiv 2505.09343, Figure 8): a data-parallel group then has 1, 2 or 4 GPUs in each
node, so as many rings, and the 8, 4 or 2 groups of a node run at once (both are our reading). A
collective is as fast as its slowest hop times its rings. The bars are read off the figure by a
third party, so they are approximate; the size of the cluster is not published: `NODES` nodes are
assumed, four to a leaf of radix 64.
"""

from dataclasses import dataclass

import numpy as np

from dsv3_jax.plan.network.fabric import Fabric
from dsv3_jax.plan.network.fat_tree import build_ft2
from dsv3_jax.plan.network.fluid import max_min_rates
from dsv3_jax.plan.network.routes import ROUTINGS
from dsv3_jax.plan.network.topology import GPUS_PER_NODE
from dsv3_jax.plan.network.transfers import ring_reduce

NODES, LINK_BYTES_PER_SECOND, NVLINK_BYTES_PER_SECOND = 16, 50e9, 200e9
PUBLISHED_BYTES_PER_SECOND = {
    8: {"ecmp": 45e9, "adaptive": 57e9, "static": 57e9},
    4: {"ecmp": 83e9, "adaptive": 103e9, "static": 103e9},
    2: {"ecmp": 97e9, "adaptive": 190e9, "static": 190e9},
}
"""By the degree of tensor parallelism; approximate."""


@dataclass(frozen=True, kw_only=True)
class RingBandwidth:
    """Bytes/s of the mean data-parallel group, and about what the figure shows."""

    tensor_parallel: int
    routing: str
    published: float
    predicted: float


def compare_rings(seeds: int = 20) -> list[RingBandwidth]:
    """Every bar, with the mean over `seeds` hashes of ecmp."""
    fabric = Fabric(
        build_ft2(GPUS_PER_NODE * NODES),
        network_bytes_per_second=LINK_BYTES_PER_SECOND,
        nvlink_bytes_per_second=NVLINK_BYTES_PER_SECOND,
    )
    found = []
    for tensor_parallel, bars in PUBLISHED_BYTES_PER_SECOND.items():
        for routing in ROUTINGS:
            count = seeds if routing == "ecmp" else 1
            rates = [ring_rate(fabric, tensor_parallel, routing, seed) for seed in range(count)]
            found.append(
                RingBandwidth(
                    tensor_parallel=tensor_parallel,
                    routing=routing,
                    published=bars[routing],
                    predicted=float(np.mean(rates)),
                )
            )
    return found


def ring_rate(fabric: Fabric, tensor_parallel: int, routing: str, seed: int) -> float:
    """Bytes/s of the mean group while all run at once."""
    gpus = np.arange(fabric.gpus)
    groups = [gpus[gpus % tensor_parallel == rank] for rank in range(tensor_parallel)]
    transfers = ring_reduce(groups, 1.0)
    flows = fabric.flows(transfers, routing=routing, seed=seed)
    crosses = fabric.crosses_nodes(flows)
    rate = max_min_rates(flows, fabric.capacity)[crosses]
    group = transfers.source[crosses] % tensor_parallel  # without failures a flow is a transfer
    slowest = np.full(tensor_parallel, np.inf)
    np.minimum.at(slowest, group, rate)
    return float(slowest.mean()) * GPUS_PER_NODE / tensor_parallel
