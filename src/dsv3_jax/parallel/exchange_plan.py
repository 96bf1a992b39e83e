"""Which rows go to which peer in which round: index arithmetic for NumPy and JAX arrays alike.

A row (a token, or a copy of one) goes once to every peer that holds any of its experts, however
many of them. Rows for a peer keep their order; the first `capacity` of them are sent in round 0,
the next in round 1, until every peer of every sender is served. So no row is ever dropped, buffers
have a static size, and an even load takes one round.

    4 rows, 2 peers of 2 experts, capacity 2      experts of the rows: {0,1} {0,2} {1,3} {0,3}
    wanted by peer 0: rows 0 1 2 3                wanted by peer 1: rows 1 2 3
    round 0   peer 0: [0 1]  peer 1: [1 2]
    round 1   peer 0: [2 3]  peer 1: [3 -]
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

NO_EXPERT = -1
"""Stands for an expert that another peer computes, or for no expert at all."""


class RoundPlan(NamedTuple):
    """One round. R rows, P peers, C slots a peer; no row is R, no slot is P*C."""

    slot_row: Int[Any, "peers capacity"]
    row_slot: Int[Any, "rows sends"]
    """The flat slots in which a row goes to its peers, in their order: of every peer, or of those
    that it goes to."""


def wanted_by(
    experts: Int[Any, "rows top_k"], peers: int, experts_per_peer: int
) -> Bool[Any, "rows peers"]:
    """Whether a peer holds any of a row's experts; `NO_EXPERT` is held by none."""
    xp = experts.__array_namespace__()
    peer = xp.where(experts >= 0, experts // experts_per_peer, NO_EXPERT)
    return xp.any(peer[:, :, None] == xp.arange(peers, dtype=experts.dtype), axis=1)


def rounds_needed(wanted: Bool[Any, "rows peers"], capacity: int) -> Int[Any, ""]:
    """Rounds until this sender's fullest peer is served; at least 1, so that peers agree."""
    xp = wanted.__array_namespace__()
    most = xp.max(xp.sum(wanted, axis=0, dtype=np.int32))
    return xp.maximum(-(-most // capacity), 1)


def plan_round(
    wanted: Bool[Any, "rows peers"], index: Any, capacity: int, most: int | None = None
) -> RoundPlan:
    """What round `index` sends. No row goes to more than `most` peers (None: to all)."""
    xp = wanted.__array_namespace__()
    peers = wanted.shape[1]
    sent = xp.cumsum(wanted, axis=0, dtype=np.int32)  # up to and including a row
    slot = sent - 1 - index * capacity
    first_slot = capacity * xp.arange(peers, dtype=np.int32)
    in_round = wanted & (slot >= 0) & (slot < capacity)
    row_slot = xp.where(in_round, first_slot + slot, peers * capacity).astype(np.int32)
    slot_row = _rows_of_slots(row_slot, peers * capacity).reshape(peers, capacity)
    if most is not None and most < peers:
        row_slot = xp.sort(row_slot, axis=1)[:, :most]  # no slot is the largest number
    return RoundPlan(slot_row, row_slot)


def _rows_of_slots(row_slot: Int[Any, "rows peers"], slots: int) -> Int[Any, " slots"]:
    """The row that goes into each slot, R where none does."""
    xp = row_slot.__array_namespace__()
    rows = row_slot.shape[0]
    row = xp.broadcast_to(xp.arange(rows, dtype=np.int32)[:, None], row_slot.shape)
    if xp is np:
        slot_row = np.full(slots + 1, rows, np.int32)  # the last takes what is not sent
        slot_row[row_slot] = row
        return slot_row[:-1]
    # One kernel on a GPU, where a search is a loop. Each pair not sent has its own index beyond the
    # end, so that unique is true.
    beyond = slots + xp.arange(row_slot.size, dtype=np.int32).reshape(row_slot.shape)
    place = xp.where(row_slot < slots, row_slot, beyond)
    return xp.full(slots, rows, np.int32).at[place].set(row, mode="drop", unique_indices=True)


def localise(
    experts: Int[Any, "rows top_k"], peer: Any, experts_per_peer: int
) -> Int[Any, "rows top_k"]:
    """Expert numbers as `peer` counts its own, `NO_EXPERT` for those of others."""
    xp = experts.__array_namespace__()
    here = (experts >= 0) & (experts // experts_per_peer == peer)
    return xp.where(here, experts % experts_per_peer, NO_EXPERT)


def rows_by_hop(
    experts: Int[np.ndarray, "senders tokens top_k"], nodes: int, gpus: int, num_experts: int
) -> dict[str, int]:
    """Rows on the wire of one layer's dispatch, summed over senders; combine sends as many back.

    Sender s is GPU s % gpus of node s // gpus. `flat` counts copies that leave the sender when each
    GPU gets its own; `between_nodes` copies that cross nodes in two hops, one a token and node;
    `inside_nodes` the copies that hop 2 then passes on to another GPU of the node.
    """
    senders = np.arange(experts.shape[0])
    node_of, gpu_of = senders // gpus, senders % gpus
    device = experts // (num_experts // (nodes * gpus))
    wants = (device[..., None] == np.arange(nodes * gpus)).any(axis=2)
    by_node = wants.reshape(*wants.shape[:2], nodes, gpus)
    to_node = by_node.any(axis=3)
    return {
        "flat": int(wants.sum() - wants[senders, :, senders].sum()),
        "between_nodes": int(to_node.sum() - to_node[senders, :, node_of].sum()),
        "inside_nodes": int(by_node.sum() - by_node[senders, :, :, gpu_of].sum()),
    }
