"""Which (token, expert) pairs go where: index arithmetic only, no data moved.

The T*K pairs are sorted by expert. The first `capacity` pairs of each expert fill a static table of
slots [E, C], which one batched product computes. What does not fit is cut into overflow blocks of
`block` pairs of one expert each; only as many blocks are computed as the routing needs. So no token
is ever dropped, shapes are static, and an even load costs no overflow at all.

    T=4 tokens, K=2, E=3, C=2, block=2     pairs sorted by expert: | 0 0 0 0 | 1 1 1 | 2 |
    slots     expert 0: [p p]   expert 1: [p p]   expert 2: [p -]
    overflow  block 0: expert 0, [p p]     block 1: expert 1, [p -]
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dsv3_kernels.permute.plan import NOTHING

MAX_BLOCK = 128
SMALL_BATCH = 32
"""Up to this many tokens, as in decoding, the slots hold four times the mean load; of fewer experts
than `MANY_EXPERTS` every possible pair: it costs little, and an overflow cannot happen."""
MANY_EXPERTS = 32


class DispatchPlan(NamedTuple):
    """Where every pair goes. Pair t*K+k is the k-th expert of token t; M = T*K pairs."""

    slot_pair: Int[Array, "experts capacity"]
    """The pair in each slot; `NOTHING` where the slot is empty."""
    slot_token: Int[Array, "experts capacity"]
    """The token of that pair, `NOTHING` as well."""
    pair_slot: Int[Array, "tokens top_k"]
    """The flat slot of each pair; `NOTHING` where it is in an overflow block or goes nowhere."""
    sorted_pairs: Int[Array, " pairs"]
    """All pairs, sorted by expert, in token order within an expert."""
    group_start: Int[Array, " experts"]
    """First place of each expert in `sorted_pairs`."""
    group_size: Int[Array, " experts"]
    block_end: Int[Array, " experts"]
    """Overflow blocks of this expert and all before it."""


def choose_capacity(tokens: int, top_k: int, num_experts: int, rows: int) -> int:
    """Slots for each expert: 1.125 times the mean load for many tokens; for few, whose loads differ
    more, four times, and no less than 8, or all.

    `tokens` and `num_experts` are a device's own, where the others have as many; `rows` are what
    could come to one expert, from all devices.
    """
    mean = tokens * top_k / num_experts
    if tokens <= SMALL_BATCH:
        return rows if num_experts < MANY_EXPERTS else min(rows, max(8, math.ceil(4 * mean)))
    return min(rows, -(-int(1.125 * mean + 1) // 8) * 8)


def overflow_block(tokens: int) -> int:
    """Pairs of one overflow block. No expert gets more than one pair of a token."""
    return min(tokens, MAX_BLOCK)


def plan_dispatch(
    experts: Int[Array, "tokens top_k"], num_experts: int, capacity: int
) -> DispatchPlan:
    """The plan for a routing whose `experts` are distinct for each token.

    A negative expert is one of another device: its pair goes nowhere.
    """
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    flat = jnp.where(experts < 0, num_experts, experts).reshape(-1)  # sorted behind all others
    # One key sorts by expert, then by pair: quicker than a stable argsort.
    sorted_keys = jnp.sort(flat * pairs + jnp.arange(pairs, dtype=flat.dtype))
    sorted_pairs = sorted_keys % pairs
    limits = (jnp.arange(num_experts, dtype=flat.dtype) + 1) * pairs
    group_end = _count_below(sorted_keys, limits)
    group_start = jnp.concatenate([jnp.zeros((1,), flat.dtype), group_end[:-1]])
    group_size = group_end - group_start
    rank_in_order = jnp.arange(pairs, dtype=flat.dtype) - group_start[flat[sorted_pairs]]
    rank = jnp.zeros((pairs,), flat.dtype).at[sorted_pairs].set(rank_in_order, unique_indices=True)
    in_slot = (rank < capacity) & (flat < num_experts)
    places = group_start[:, None] + jnp.arange(capacity, dtype=flat.dtype)
    blocks = -(-jnp.maximum(group_size - capacity, 0) // overflow_block(tokens))
    is_filled = jnp.arange(capacity) < group_size[:, None]
    slot_pair = sorted_pairs[jnp.minimum(places, pairs - 1)]
    return DispatchPlan(
        slot_pair=jnp.where(is_filled, slot_pair, NOTHING),
        slot_token=jnp.where(is_filled, slot_pair // top_k, NOTHING),
        pair_slot=jnp.where(in_slot, flat * capacity + rank, NOTHING).reshape(tokens, top_k),
        sorted_pairs=sorted_pairs,
        group_start=group_start,
        group_size=group_size,
        block_end=jnp.cumsum(blocks, dtype=flat.dtype),
    )


def _count_below(
    ordered: Int[Array, " keys"], limits: Int[Array, " experts"]
) -> Int[Array, " experts"]:
    """Keys below each limit: whole strides of about sqrt(keys), then within the last one begun.

    Two small sums, where `jnp.searchsorted` is a loop of many kernels on a GPU.
    """
    size = ordered.shape[0]
    stride = math.isqrt(size)
    begun = jnp.sum(ordered[::stride] < limits[:, None], axis=1, dtype=ordered.dtype)
    first = jnp.maximum(begun - 1, 0) * stride
    place = first[:, None] + jnp.arange(stride, dtype=ordered.dtype)
    below = (place < size) & (ordered[jnp.minimum(place, size - 1)] < limits[:, None])
    return first + jnp.sum(below, axis=1, dtype=ordered.dtype)


def overflow_pairs(
    plan: DispatchPlan, index: Int[Array, ""], capacity: int, block: int
) -> tuple[Int[Array, ""], Int[Array, " block"], Bool[Array, " block"]]:
    """The expert of overflow block `index`, its pairs, and which of them are real."""
    expert = jnp.sum(plan.block_end <= index, dtype=index.dtype)
    first_block = jnp.where(expert > 0, plan.block_end[expert - 1], 0)
    rank = capacity + (index - first_block) * block + jnp.arange(block, dtype=index.dtype)
    place = jnp.minimum(plan.group_start[expert] + rank, plan.sorted_pairs.shape[0] - 1)
    return expert, plan.sorted_pairs[place], rank < plan.group_size[expert]
