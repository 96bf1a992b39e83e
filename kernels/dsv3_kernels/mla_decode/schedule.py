"""Who works on which keys: all requests' blocks of keys, cut into parts of equal work.

Requests are laid side by side on a line, each as long as its blocks and what it costs to begin one:

    request        |    0    |          1           |2|      3     |     0 has 7 blocks, 2 none
    part           |    0     |     1    |     2    |     3    |         each `size` long

A part works on what of each request lies within it. So a batch of one long request keeps all parts
busy as well as one of many short ones does. Only the device knows the lengths: the cuts are made
there, by a few small operations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from dsv3_kernels.mla_decode.tiles import BLOCK, ITEM_BLOCKS


class Schedule(NamedTuple):
    """Block k of request b is in part (origins[b] + k) // size, part p of it in slot p + b."""

    origins: Int[Array, " batch"]
    """Where on the line a request's first block lies."""
    ends: Int[Array, " batch"]
    """Where its last one ends."""
    requests: Int[Array, "parts two"]
    """The first one of a part, and the one behind its last."""
    size: Int[Array, " one"]
    """Of a part, in blocks."""


def make(lengths: Int[Array, " batch"], parts: int) -> Schedule:
    """The cuts for requests of so many tokens."""
    blocks = (lengths + (BLOCK - 1)) // BLOCK
    ends = jnp.cumsum(jnp.where(blocks > 0, blocks + ITEM_BLOCKS, 0)).astype(jnp.int32)
    origins = ends - blocks
    size = jnp.maximum((ends[-1] + (parts - 1)) // parts, 1)
    starts = jnp.arange(parts, dtype=jnp.int32) * size
    first = jnp.sum(ends <= starts[:, None], axis=1, dtype=jnp.int32)
    behind = jnp.sum(origins < starts[:, None] + size, axis=1, dtype=jnp.int32)
    return Schedule(origins, ends, jnp.stack([first, behind], axis=1), size[None])


@dataclass(frozen=True)
class Turns:
    """What a program of part `part` works on, as it reads from a schedule in memory."""

    part: Any
    lengths: Any
    schedule: Schedule

    def each(self, work: Callable[[Any, Any, Any, Any], Any]) -> None:
        """work(b, first, end, step) for blocks `first` to `end` of each of its requests.

        `step` is what the one before gave, 0 at first: blocks that the part had before.
        """
        origins, _, requests, sizes = self.schedule
        size = sizes[0]
        start = self.part * size

        def of_request(b, step):
            origin = origins[b]
            blocks = lax.div(self.lengths[b] + (BLOCK - 1), BLOCK)
            first, end = lax.max(start - origin, 0), lax.min(start + size - origin, blocks)
            return lax.cond(first < end, lambda: work(b, first, end, step), lambda: step)

        lax.fori_loop(requests[self.part, 0], requests[self.part, 1], of_request, jnp.int32(0))
