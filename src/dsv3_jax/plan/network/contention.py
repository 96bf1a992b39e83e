"""PCIe shared by expert-parallel traffic and by keys and values fetched from host memory.

A GPU, its NIC and a port of the CPU hang on one PCIe switch. What the network brings to the GPU and
what the GPU fetches from host memory meet on the switch's link down to the GPU; what the GPU sends
goes the other way and meets neither.

    host ==> switch ==> GPU      fetched keys and values
    NIC  ==> switch ==> GPU      received tokens
    NIC  <== switch <== GPU      sent tokens

PCIe as it is shares evenly between the two; with a priority the preferred traffic takes what it can
and the other what is left, which is what "Insights into DeepSeek-V3" (arXiv 2505.09343) §4.5 asks
for.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dsv3_jax.config.checks import require, require_one_of
from dsv3_jax.plan.network.fluid import NO_LINK, Flows, max_min_rates
from dsv3_jax.plan.network.routes import Routes

PRIORITIES = ("none", "ep", "kv")
RECEIVED, SENT, FETCHED = range(3)
_HOST_DOWN, _GPU_DOWN, _GPU_UP, _NIC_UP, _NIC_DOWN = range(5)
_OWN = np.array([[_NIC_UP, _GPU_DOWN], [_GPU_UP, _NIC_DOWN], [_HOST_DOWN, _GPU_DOWN]])


@dataclass(frozen=True, kw_only=True)
class Contention:
    """Seconds of both kinds of traffic, alone and at the same time."""

    priority: str
    ep_alone_seconds: float
    kv_alone_seconds: float
    ep_seconds: float
    kv_seconds: float

    @property
    def ep_slowdown(self) -> float:
        return self.ep_seconds / self.ep_alone_seconds

    @property
    def kv_slowdown(self) -> float:
        return self.kv_seconds / self.kv_alone_seconds


def pcie_bytes_per_second(
    *, transfers_per_second: float = 32e9, lanes: int = 16, payload_bytes: int = 256
) -> float:
    """Payload one way; 57.6 GB/s for PCIe 5.0 x16.

    Of 130 bits on a lane 128 are data, and a packet adds 24 bytes to its payload (header of 16,
    sequence number, checksum and framing). Source: PCI Express Base Specification 5.0, §2.2, §4.2.
    """
    raw = transfers_per_second * lanes / 8 * 128 / 130
    return raw * payload_bytes / (payload_bytes + 24)


def share_pcie(
    *,
    ep_bytes: float,
    kv_bytes: float,
    network_bytes_per_second: float,
    pcie: float | None = None,
    priority: str = "none",
) -> Contention:
    """What a GPU's dispatch or combine (`ep_bytes` in, as many out) and a fetch of `kv_bytes` take.

    `pcie` are payload bytes/s of each PCIe link one way, by default PCIe 5.0 x16's. Both start at
    the same time.
    """
    require_one_of("priority", priority, *PRIORITIES)
    pcie = pcie_bytes_per_second() if pcie is None else pcie
    for field, value in (
        ("ep_bytes", ep_bytes),
        ("kv_bytes", kv_bytes),
        ("network_bytes_per_second", network_bytes_per_second),
        ("pcie", pcie),
    ):
        require(value > 0, field, value, "above 0")
    nic = min(network_bytes_per_second, pcie)
    capacity = np.array([pcie, pcie, pcie, nic, nic])
    rank = {"none": (0, 0, 0), "ep": (0, 0, 1), "kv": (1, 1, 0)}[priority]
    size = np.array([ep_bytes, ep_bytes, kv_bytes], dtype=np.float64)
    end = _run(size, np.array(rank), capacity)
    return Contention(
        priority=priority,
        ep_alone_seconds=ep_bytes / nic,
        kv_alone_seconds=kv_bytes / pcie,
        ep_seconds=float(max(end[RECEIVED], end[SENT])),
        kv_seconds=float(end[FETCHED]),
    )


def _run(
    size: Float[np.ndarray, " flows"],
    rank: Int[np.ndarray, " flows"],
    capacity: Float[np.ndarray, " links"],
) -> Float[np.ndarray, " flows"]:
    """When each flow ends, the lower ranks served first."""
    left, end, now = size.copy(), np.zeros(len(size)), 0.0
    while left.any():
        rate = _ranked_rates(left > 0, rank, capacity)
        seconds = np.divide(left, rate, np.full(len(size), np.inf), where=rate > 0)
        seconds[left == 0] = np.inf
        step = float(seconds.min())
        now += step
        ended = seconds <= step * (1 + 1e-12)
        end[ended] = now
        left = np.where(ended, 0.0, np.maximum(left - rate * step, 0.0))
    return end


def _ranked_rates(
    active: np.ndarray, rank: Int[np.ndarray, " flows"], capacity: Float[np.ndarray, " links"]
) -> Float[np.ndarray, " flows"]:
    """Rates where each rank shares what the ranks before it leave."""
    free, rate = capacity.copy(), np.zeros(len(rank))
    for level in np.unique(rank):
        has_room = (free[_OWN] > 1e-9 * capacity[_OWN]).all(axis=1)
        chosen = np.flatnonzero(active & (rank == level) & has_room)
        if not chosen.size:
            continue
        flows = Flows(
            size_bytes=np.ones(len(chosen)),
            own=_OWN[chosen],
            route=np.full(len(chosen), NO_LINK),
            routes=Routes(start=np.array([0]), link=np.array([], dtype=int), share=np.array([])),
        )
        rate[chosen] = max_min_rates(flows, free)
        free = free - flows.load(rate[chosen], len(free))
    return rate
