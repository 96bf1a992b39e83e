"""Which slot every pair of a token and an expert gets: index arithmetic, no data moved.

experts of 3 tokens  [[0 2] [2 -] [0 2]]      4 experts, alignment 2: 6 + 4 slots
row_of_slot          0 2 | | 0 1 2 - | | - - - -
slot_of_row          [[0 2] [3 -] [1 4]]      group_starts 0 2 2 6, group_sizes 2 0 3 0
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

NOTHING = -1
"""The row of an empty slot, the slot of a pair without one."""


class Plan(NamedTuple):
    """Slots of an expert are side by side, in the order of tokens."""

    row_of_slot: Int[Array, " slots"]
    slot_of_row: Int[Array, "tokens top_k"]
    group_sizes: Int[Array, " experts"]
    """Rows in the slots of each expert."""
    padded_sizes: Int[Array, " experts"]
    """Up to the next multiple of the alignment: what a grouped product of these groups is told."""
    group_starts: Int[Array, " experts"]


def slots_of(pairs: int, num_experts: int, alignment: int, capacity: int | None) -> int:
    """Slots that are enough for any routing, or `capacity` for each expert."""
    if capacity is not None:
        return num_experts * capacity
    most = pairs + num_experts * (alignment - 1)
    return -(-most // alignment) * alignment


def plan(
    experts: Int[Array, "tokens top_k"],
    num_experts: int,
    alignment: int = 1,
    capacity: int | None = None,
) -> Plan:
    """Slots for a routing; a negative expert is of nobody here.

    Each expert's slots begin at a multiple of `alignment`, one expert's behind the other's; or with
    `capacity` at a multiple of that, and pairs that come after have no slot.
    Raises ValueError for sizes that cannot be.
    """
    _check(experts.size, num_experts, alignment, capacity)
    tokens, top_k = experts.shape
    pairs = tokens * top_k
    is_here = (experts >= 0) & (experts < num_experts)
    flat = jnp.where(is_here, experts, num_experts).reshape(-1)
    index = jnp.arange(pairs, dtype=flat.dtype)
    # One key sorts by expert, then by pair: quicker than a stable argsort.
    ordered = jnp.sort(flat * pairs + index) % max(pairs, 1)
    counts = jnp.zeros((num_experts,), flat.dtype).at[flat].add(1, mode="drop")
    rank = index - _starts(counts)[jnp.minimum(flat[ordered], num_experts - 1)]
    rank = jnp.zeros((pairs,), flat.dtype).at[ordered].set(rank, unique_indices=True)
    sizes = counts if capacity is None else jnp.minimum(counts, capacity)
    padded = -(-sizes // alignment) * alignment
    starts = _starts(padded if capacity is None else jnp.full_like(counts, capacity))
    slot = starts[jnp.minimum(flat, num_experts - 1)] + rank
    has_slot = is_here.reshape(-1) & (capacity is None or rank < capacity)
    slots = slots_of(pairs, num_experts, alignment, capacity)
    # Each pair without one has its own place beyond the end, so that unique is true.
    place = jnp.where(has_slot, slot, slots + index)
    row_of_slot = jnp.full((slots,), NOTHING, flat.dtype)
    row_of_slot = row_of_slot.at[place].set(
        index // max(top_k, 1), mode="drop", unique_indices=True
    )
    slot_of_row = jnp.where(has_slot, slot, NOTHING).reshape(tokens, top_k)
    return Plan(row_of_slot, slot_of_row, sizes, padded, starts)


def _starts(sizes: Int[Array, " experts"]) -> Int[Array, " experts"]:
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def _check(pairs: int, num_experts: int, alignment: int, capacity: int | None) -> None:
    for name, value in (("num_experts", num_experts), ("alignment", alignment)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if capacity is not None and (capacity < 1 or capacity % alignment):
        raise ValueError(f"capacity is {capacity}, expected a multiple of alignment {alignment}")
    if (num_experts + 1) * pairs >= 2**31:
        raise ValueError(f"{pairs} pairs of {num_experts} experts, expected fewer than 2^31 keys")
