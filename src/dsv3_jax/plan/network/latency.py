"""What small messages take: over switches, by NVLink, with and without a CPU proxy.

Measured end to end for 64 bytes from the CPU ("Insights into DeepSeek-V3", arXiv 2505.09343, Table
5): InfiniBand 2.8 µs under one leaf and 3.7 µs across leaves, RoCE 3.6 and 5.6, NVLink 3.33. Across
leaves are two more switches, so a switch is half the difference and the ends are the rest.

A proxy thread on the CPU posts a GPU's messages one after the other, about 1.7 million a second
however many GPU threads ask; a GPU that writes requests and doorbells itself (IBGDA, §5.2.3)
reaches 180 million (NVIDIA, "Improving Network Performance of HPC Systems Using NVIDIA Magnum IO
NVSHMEM and GPUDirect Async"). How much longer than the posting a message's detour over the CPU
takes is not published, so times with a proxy are lower bounds.
"""

from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_one_of

MESSAGE_BYTES = 64
"""Of the measured latencies."""
INITIATORS = ("ibgda", "proxy")
MESSAGES_PER_SECOND = {"ibgda": 180e6, "proxy": 1.7e6}
SAME_LEAF, CROSS_LEAF = 1, 3
"""Switches on the way in a fat tree."""


@dataclass(frozen=True, kw_only=True)
class LinkLatency:
    """Seconds of a 64-byte message: of both ends together, and of each switch between them."""

    name: str
    ends_seconds: float
    switch_seconds: float

    def first_byte_seconds(self, switches: int) -> float:
        """Until a small message has arrived."""
        require(switches >= 0, "switches", switches, "at least 0")
        return self.ends_seconds + switches * self.switch_seconds


def _from_table(name: str, same_leaf_seconds: float, cross_leaf_seconds: float) -> LinkLatency:
    switch = (cross_leaf_seconds - same_leaf_seconds) / (CROSS_LEAF - SAME_LEAF)
    return LinkLatency(
        name=name, ends_seconds=same_leaf_seconds - switch * SAME_LEAF, switch_seconds=switch
    )


LATENCIES = {
    "ib": _from_table("ib", 2.8e-6, 3.7e-6),
    "roce": _from_table("roce", 3.6e-6, 5.6e-6),
    "nvlink": LinkLatency(name="nvlink", ends_seconds=3.33e-6, switch_seconds=0.0),
}


def message_seconds(
    link: str,
    message_bytes: float | int,
    *,
    switches: int,
    bytes_per_second: float,
    messages: int = 1,
    initiator: str = "ibgda",
) -> float:
    """Until the last of `messages` equal messages of one GPU has arrived.

    They are posted and sent one behind the other, whichever is slower; switches pass a message on
    while it still comes in, so each adds its latency once.
    """
    require_one_of("link", link, *LATENCIES)
    require_one_of("initiator", initiator, *INITIATORS)
    require(messages >= 1, "messages", messages, "at least 1")
    require(message_bytes > 0, "message_bytes", message_bytes, "above 0")
    require(bytes_per_second > 0, "bytes_per_second", bytes_per_second, "above 0")
    first = LATENCIES[link].first_byte_seconds(switches)
    post = 1 / MESSAGES_PER_SECOND[initiator] if link != "nvlink" else 0.0
    wire = message_bytes / bytes_per_second
    # The measured 64 bytes hold their own posting (by the CPU) and wire time.
    detour = post if initiator == "proxy" else 0.0
    after_first = (messages - 1) * max(post, wire)
    return first + detour + max(message_bytes - MESSAGE_BYTES, 0) / bytes_per_second + after_first
