"""DeepEP's measured dispatch and combine beside what the models here say.

Normal kernels (two hops) are simulated by `fluid` as DeepEP's own test has them: 4,096 tokens a
GPU, hidden 7,168, 8 of 256 experts, a group of experts on each node, at most 4 groups, those with
the best expert; FP8 with a scale for each 128 values out, BF16 back. Bandwidths are counted as
DeepEP counts them: a copy for each node that a token needs, its own included (in one node: what a
GPU receives, its own included), over the time. Low-latency kernels (128 tokens) send a message for
each token and expert.

Sources: DeepEP, docs/legacy.md and tests/test_internode.py; for 128 GPUs Figure 7 of "Insights into
DeepSeek-V3" (arXiv 2505.09343).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.network.fabric import make_fabric
from dsv3_jax.plan.network.fat_tree import build_mpft
from dsv3_jax.plan.network.fluid import run_flows
from dsv3_jax.plan.network.gate import Gate
from dsv3_jax.plan.network.latency import CROSS_LEAF, SAME_LEAF, message_seconds
from dsv3_jax.plan.network.topology import GPUS_PER_NODE
from dsv3_jax.plan.network.transfers import TokenCounts, combine, dispatch, sample_counts

HIDDEN, TOKENS, TOP_K, EXPERTS = 7168, 4096, 8, 256
LOW_LATENCY_TOKENS = 128
FP8_BYTES = HIDDEN * (1 + 4 / 128)
"""A token with its FP32 scales."""
BF16_BYTES = HIDDEN * 2.0
LOW_LATENCY_HEADER_BYTES = 16
MEASURED_BYTES_PER_SECOND = {
    8: (153e9, 158e9),
    16: (43.05e9, 42.47e9),
    32: (58.02e9, 56.96e9),
    64: (50.58e9, 48.54e9),
    128: (45.34e9, 41.6e9),
}
"""GPUs: dispatch, combine."""
MEASURED_SECONDS = {
    8: (77e-6, 114e-6),
    16: (118e-6, 195e-6),
    32: (155e-6, 273e-6),
    64: (173e-6, 314e-6),
    128: (192e-6, 369e-6),
    256: (194e-6, 360e-6),
}
"""The low-latency kernels': GPUs: dispatch, combine."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A measured figure and the predicted one, in the same unit."""

    what: str
    gpus: int
    measured: float
    predicted: float

    @property
    def relative_error(self) -> float:
        return self.predicted / self.measured - 1


def compare_bandwidths(
    gpu: Gpu,
    *,
    sizes: Iterable[int] = tuple(MEASURED_BYTES_PER_SECOND),
    achieved: bool = True,
    seed: int = 0,
) -> list[Comparison]:
    """Bytes/s a GPU of the normal kernels, on a multi-plane fat tree of `gpu`'s links."""
    found = []
    for gpus in sizes:
        measured = MEASURED_BYTES_PER_SECOND[gpus]
        nodes = gpus // GPUS_PER_NODE
        gate = Gate(n_group=nodes, topk_group=min(nodes, 4), scores_of_group=1)
        counts = sample_counts(gate, TOKENS, gpus, 1, np.random.default_rng(seed))
        fabric = make_fabric(build_mpft(gpus), gpu, achieved=achieved)
        plans = (("dispatch", dispatch, FP8_BYTES), ("combine", combine, BF16_BYTES))
        for (what, plan, token_bytes), figure in zip(plans, measured, strict=True):
            flows = fabric.flows(plan(counts, token_bytes), routing="adaptive")
            seconds = run_flows(flows, fabric.capacity).total_seconds
            predicted = _counted_copies(counts) * token_bytes / seconds
            found.append(Comparison(what=what, gpus=gpus, measured=figure, predicted=predicted))
    return found


def _counted_copies(counts: TokenCounts) -> float:
    """Copies a GPU, as DeepEP's test counts them."""
    in_one_node = counts.to_node.shape[2] == 1
    return float(counts.to_gpu.sum() / counts.to_gpu.shape[1]) if in_one_node else counts.copies


def low_latency_seconds(
    gpus: int, token_bytes: float, gpu: Gpu, *, initiator: str = "ibgda"
) -> float:
    """What a GPU's messages of one low-latency dispatch or combine take, experts chosen evenly.

    Those to its own node go over NVLink, the others over the NIC, at the same time; a leaf of 64
    ports holds 32 nodes.
    """
    messages = LOW_LATENCY_TOKENS * TOP_K / gpus
    near = round(messages * (GPUS_PER_NODE - 1))
    far = round(messages * (gpus - GPUS_PER_NODE))
    switches = SAME_LEAF if gpus <= 32 * GPUS_PER_NODE else CROSS_LEAF
    seconds = message_seconds(
        "nvlink",
        token_bytes,
        switches=0,
        bytes_per_second=gpu.nvlink_achieved_bytes_per_second,
        messages=near,
    )
    if far:
        network = message_seconds(
            "ib",
            token_bytes,
            switches=switches,
            bytes_per_second=gpu.network_achieved_bytes_per_second,
            messages=far,
            initiator=initiator,
        )
        seconds = max(seconds, network)
    return seconds


def compare_latencies(gpu: Gpu, *, initiator: str = "ibgda") -> list[Comparison]:
    """Seconds of the low-latency kernels."""
    sizes = (
        ("dispatch", FP8_BYTES + LOW_LATENCY_HEADER_BYTES),
        ("combine", BF16_BYTES),
    )
    found = []
    for gpus, measured in MEASURED_SECONDS.items():
        for (what, token_bytes), figure in zip(sizes, measured, strict=True):
            seconds = low_latency_seconds(gpus, token_bytes, gpu, initiator=initiator)
            found.append(Comparison(what=what, gpus=gpus, measured=figure, predicted=seconds))
    return found
