"""Upper bounds of decoding: by the experts' rows on the network, by memory on a PC. Imports no JAX.

Source: "Insights into DeepSeek-V3" (arXiv 2505.09343) §2.3.2 and §2.2.3.
"""

from dataclasses import dataclass

from dsv3_jax.config.checks import require, require_at_least
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.model_arithmetic import cache_bytes, count
from dsv3_jax.plan.model_shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class DecodeLimit:
    """One expert a device, all computation hidden: what sending a step's rows takes.

    The defaults are the paper's; it calculates with a hidden size of 7,000 for "7K".
    """

    hidden_size: int = 7000
    tokens: Number = 32.0
    """That a device's expert is sent in a step; each is of another request."""
    sends: int = 9
    """Experts of a token: eight routed, one shared."""
    dispatch_bytes: Number = 1.0
    """Of one value on its way there."""
    combine_bytes: Number = 2.0
    """And back."""
    bytes_per_second: Number = 50e9
    latency_seconds: Number = 0.0
    """Of each of the two transfers; the paper leaves it out."""
    micro_batches: int = 2
    """Of which one computes while the other's rows travel, so that a layer lasts for the rows of
    both."""
    layers: int = 61

    def __post_init__(self):
        names = ("hidden_size", "tokens", "sends", "micro_batches", "layers", "bytes_per_second")
        for name in names:
            value = getattr(self, name)
            require(value > 0, f"limits.{name}", value, "a positive number")
        require_at_least("limits", self, 0, "dispatch_bytes", "combine_bytes", "latency_seconds")

    @property
    def sent_bytes(self) -> Number:
        """Of one micro-batch and layer, there and back."""
        value = self.dispatch_bytes + self.combine_bytes
        return value * self.tokens * self.sends * self.hidden_size

    @property
    def exchange_seconds(self) -> Number:
        """Of both transfers: 120.96 us over 50 GB/s, 6.72 us over 900."""
        return self.sent_bytes / self.bytes_per_second + 2 * self.latency_seconds

    @property
    def layer_seconds(self) -> Number:
        return self.micro_batches * self.exchange_seconds

    @property
    def token_seconds(self) -> Number:
        """Time per output token at best: 14.76 and 0.82 ms."""
        return self.layers * self.layer_seconds

    @property
    def tokens_per_second(self) -> Number:
        """Of one request."""
        return 1 / self.token_seconds


@dataclass(frozen=True, kw_only=True)
class LocalLimit:
    """One request on one machine, whose memory gives each active weight once a token."""

    weight_bytes: Number
    """Read for a token."""
    cache_bytes: Number
    held_bytes: Number
    """All weights and the cache: what the memory must hold."""
    token_seconds: Number

    @property
    def tokens_per_second(self) -> Number:
        return 1 / self.token_seconds


def local_limit(
    shape: ModelShape,
    *,
    bytes_per_second: Number,
    bits: Number = 4.5,
    context: int = 4096,
    efficiency: Number = 1.0,
    accepted: Number = 0.0,
) -> LocalLimit:
    """Of weights with `bits` each (4.5 with the scales of a 4-bit format), a BF16 cache.

    `accepted` is the share of steps in which one more token, drafted by an MTP module, is right;
    what drafting reads is left out.
    """
    for name, value in (("bandwidth", bytes_per_second), ("bits", bits), ("context", context)):
        require(value > 0, name, value, "a positive number")
    require(0 < efficiency <= 1, "efficiency", efficiency, "above 0, at most 1")
    require(0 <= accepted <= 1, "acceptance", accepted, "from 0 to 1")
    parameters = count(shape)
    weights = parameters.active_without_embedding * bits / 8
    cache = cache_bytes(shape, context)
    seconds = (weights + cache) / (bytes_per_second * efficiency)
    return LocalLimit(
        weight_bytes=weights,
        cache_bytes=cache,
        held_bytes=parameters.total * bits / 8 + cache,
        token_seconds=seconds / (1 + accepted),
    )
