"""Experts in slots other than their own number: replicated, and placed by load, for serving.

A device holds slots; the router goes on choosing experts, and a table says in which slots each is.
The slots of one expert hold the same weights, so any of them may compute a pair.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.parallel.exchange_plan import NO_EXPERT
from dsv3_jax.parallel.expert_placement import Placement


class SlotTable(nnx.Variable):
    """Where experts are: changes while a model is served, and is no weight."""


class ExpertSlots(nnx.Module):
    """The slots of each expert of a layer (or of all layers of a stack, one after the other).

    Rows take an expert's replicas in turn, beginning on each device of `axes` with another one.
    """

    def __init__(self, placement: Placement, most: int, axes: Sequence[str] = ()):
        """`most` replicas of an expert are there at any time."""
        slots, counts = slot_tables(placement, most)
        self.of_expert = SlotTable(jnp.asarray(slots))
        self.replicas = SlotTable(jnp.asarray(counts))
        self.axes = tuple(axes)

    def __call__(self, experts: Int[Array, "tokens top_k"]) -> Int[Array, "tokens top_k"]:
        """A slot of each expert; of none where there is none."""
        row = jnp.arange(experts.shape[0], dtype=experts.dtype)
        if self.axes:
            row += jax.lax.axis_index(self.axes).astype(experts.dtype)
        number = jnp.maximum(experts, 0)
        replica = row[:, None] % self.replicas[...][number]
        return jnp.where(experts < 0, NO_EXPERT, self.of_expert[...][number, replica])


def slot_tables(
    placement: Placement, most: int
) -> tuple[Int[np.ndarray, "layers experts most"], Int[np.ndarray, "layers experts"]]:
    """Each expert's slots, -1 behind its last, `most` places or more, and how many they are."""
    slots = placement.slots_of()
    padding = ((0, 0), (0, 0), (0, max(0, most - slots.shape[2])))
    return (
        np.pad(slots, padding, constant_values=NO_EXPERT).astype(np.int32),
        placement.replicas.astype(np.int32),
    )


def move_slots(
    local: Array, source: Int[Array, " slots"], axes: tuple[str, ...], devices: int
) -> Array:
    """This device's slots once slot s has what slot source[s] had; inside shard_map over `axes`.

    Slot by slot of all devices, so memory holds one expert of every device at a time.
    """
    count = local.shape[0]
    if not axes:
        return local[source]
    first = jax.lax.axis_index(axes) * count
    wanted = jax.lax.dynamic_slice_in_dim(source, first, count)

    def from_slot(index: Int[Array, ""], moved: Array) -> Array:
        # w[...], slot `index` of this device -> w[devices, ...]
        everyone = jax.lax.all_gather(local[index], axes)
        is_there = (wanted % count == index).reshape(-1, *[1] * (local.ndim - 1))
        return jnp.where(is_there, everyone[jnp.minimum(wanted // count, devices - 1)], moved)

    return jax.lax.fori_loop(0, count, from_slot, local)
