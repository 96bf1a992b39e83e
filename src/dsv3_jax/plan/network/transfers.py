"""What a model's exchanges send from GPU to GPU.

dispatch  hop 1: a token once to each node it needs, to the GPU of the sender's index there;
          hop 2: from there over NVLink to the GPUs of its experts. Groups of `ep` GPUs.
combine   the same back, partial sums added before the slow hop, so as many copies
alltoall  each GPU an equal part of its bytes to every other
reduce    the rings of a reduce-scatter (or an all-gather) over groups: a ring for each GPU of a
          node, which leaves the node on that GPU's NIC and passes the others by NVLink
pipeline  each GPU a micro-batch's activations to the same place of the next stage, and the
          gradient of another back
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from dsv3_jax.config.checks import require
from dsv3_jax.plan.network.gate import (
    Experts,
    Gate,
    gpus_touched,
    nodes_touched,
    sample_experts,
)
from dsv3_jax.plan.network.topology import GPUS_PER_NODE, count_nodes

BLOCKS = 16
"""Parts in which a GPU's drawn tokens are dealt to other groups."""
MOST_ALL_TO_ALL = 2_048
"""GPUs: every pair is a flow."""
TRAFFICS = ("dispatch", "combine", "alltoall", "reduce", "pipeline")

PerTransfer = Int[np.ndarray, " transfers"]


@dataclass(frozen=True, kw_only=True)
class Transfers:
    """Bytes from one GPU to another; a pair may occur more than once."""

    source: PerTransfer
    target: PerTransfer
    size_bytes: np.ndarray

    def reverse(self) -> "Transfers":
        return Transfers(source=self.target, target=self.source, size_bytes=self.size_bytes)

    def on_nodes(self, node: Int[np.ndarray, " nodes"]) -> "Transfers":
        """The same where what was on node n is on node `node[n]`."""
        place = (node[:, None] * GPUS_PER_NODE + np.arange(GPUS_PER_NODE)).ravel()
        return Transfers(
            source=place[self.source], target=place[self.target], size_bytes=self.size_bytes
        )


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Tokens that GPUs have for nodes and for GPUs, for each expert-parallel group."""

    to_node: Int[np.ndarray, "groups ep nodes"]
    to_gpu: Int[np.ndarray, "groups ep ep"]

    @property
    def copies(self) -> float:
        """What a GPU sends on average, its own node's share too: DeepEP's bandwidth counts that."""
        return float(self.to_node.sum() / np.prod(self.to_node.shape[:2]))


def count_tokens(experts: Experts, gate: Gate, ep: int, groups: int) -> TokenCounts:
    """Counts for tokens in the GPUs' order: of all groups, or of one that stands for each."""
    _check_group(ep, gate)
    require(
        len(experts) % ep == 0, "experts", len(experts), f"a multiple of the {ep} GPUs of a group"
    )
    shape = (-1, ep, len(experts) // ep)
    if len(experts) % (ep * groups) == 0:
        shape = (groups, ep, len(experts) // (ep * groups))
    touched = gpus_touched(experts, gate.n_routed_experts, ep)
    to_gpu = touched.reshape(*shape, ep).sum(axis=2)
    to_node = nodes_touched(touched).reshape(*shape, ep // GPUS_PER_NODE).sum(axis=2)
    repeats = groups // len(to_gpu)
    return TokenCounts(
        to_node=np.tile(to_node, (repeats, 1, 1)), to_gpu=np.tile(to_gpu, (repeats, 1, 1))
    )


def sample_counts(
    gate: Gate, tokens: int, ep: int, groups: int, rng: np.random.Generator
) -> TokenCounts:
    """Counts for `tokens` tokens a GPU by a balanced gate.

    One group's tokens are drawn. Each further group has the same ones, dealt to its GPUs anew in
    blocks and with its nodes, and the GPUs of each, renumbered at random: a draw as likely as any,
    but not an independent one.
    """
    _check_group(ep, gate)
    require(tokens > 0, "tokens", tokens, "at least 1")
    nodes, blocks = ep // GPUS_PER_NODE, math.gcd(tokens, BLOCKS)
    drawn = [_count_blocks(gate, tokens, blocks, ep, rng) for _ in range(ep)]
    gpu_blocks = np.concatenate([of_gpus for of_gpus, _ in drawn])
    node_blocks = np.concatenate([of_nodes for _, of_nodes in drawn])
    to_node, to_gpu = [], []
    for _ in range(groups):
        deal = rng.permutation(ep * blocks).reshape(ep, blocks)
        node = rng.permutation(nodes)
        inside = rng.permuted(np.tile(np.arange(GPUS_PER_NODE), (nodes, 1)), axis=1)
        gpu = (node[:, None] * GPUS_PER_NODE + inside).ravel()
        to_node.append(node_blocks[deal].sum(axis=1)[:, node])
        to_gpu.append(gpu_blocks[deal].sum(axis=1)[:, gpu])
    return TokenCounts(to_node=np.stack(to_node), to_gpu=np.stack(to_gpu))


def _count_blocks(
    gate: Gate, tokens: int, blocks: int, ep: int, rng: np.random.Generator
) -> tuple[Int[np.ndarray, "blocks ep"], Int[np.ndarray, "blocks nodes"]]:
    """Tokens for each GPU and each node, in `blocks` parts of one GPU's tokens."""
    touched = gpus_touched(sample_experts(gate, tokens, rng), gate.n_routed_experts, ep)
    to_nodes = nodes_touched(touched)
    return (
        touched.reshape(blocks, -1, ep).sum(axis=1),
        to_nodes.reshape(blocks, tokens // blocks, -1).sum(axis=1),
    )


def _check_group(ep: int, gate: Gate) -> None:
    count_nodes(ep)
    rule = f"a divisor of n_routed_experts = {gate.n_routed_experts}"
    require(gate.n_routed_experts % ep == 0, "ep", ep, rule)


def dispatch(counts: TokenCounts, token_bytes: float) -> Transfers:
    """Both hops of a dispatch in each group of neighbouring GPUs."""
    groups, ep, nodes = counts.to_node.shape
    gpu = np.arange(ep)
    index, home = gpu % GPUS_PER_NODE, gpu // GPUS_PER_NODE
    far = np.arange(nodes)[None, :] * GPUS_PER_NODE + index[:, None]  # [sender, node]
    crosses = far // GPUS_PER_NODE != home[:, None]
    # Hop 2: what all senders of an index have for a GPU, its node's GPU of that index hands on.
    by_index = counts.to_gpu.reshape(groups, nodes, GPUS_PER_NODE, ep).sum(axis=1)
    forwarder = home[None, :] * GPUS_PER_NODE + np.arange(GPUS_PER_NODE)[:, None]  # [index, target]
    hands_on = forwarder != gpu[None, :]
    first = np.arange(groups)[:, None] * ep
    pairs = [
        (np.broadcast_to(gpu[:, None], far.shape)[crosses], far[crosses]),
        (forwarder[hands_on], np.broadcast_to(gpu, forwarder.shape)[hands_on]),
    ]
    sizes = [counts.to_node[:, crosses], by_index[:, hands_on]]
    return _transfers(
        np.concatenate([(first + source).ravel() for source, _ in pairs]),
        np.concatenate([(first + target).ravel() for _, target in pairs]),
        np.concatenate([size.ravel() for size in sizes]) * token_bytes,
    )


def combine(counts: TokenCounts, token_bytes: float) -> Transfers:
    """Both hops of a combine: the dispatch's copies the other way."""
    return dispatch(counts, token_bytes).reverse()


def all_to_all(gpus: int, sent_bytes: float) -> Transfers:
    """`sent_bytes` of each GPU, of which it keeps 1/gpus for itself."""
    require(gpus <= MOST_ALL_TO_ALL, "gpus", gpus, f"at most {MOST_ALL_TO_ALL} in an alltoall")
    source, target = (grid.ravel() for grid in np.indices((gpus, gpus)))
    moves = source != target
    size = np.full(int(moves.sum()), sent_bytes / gpus)
    return _transfers(source[moves], target[moves], size)


def ring_reduce(groups: Iterable[Int[np.ndarray, " members"]], reduced_bytes: float) -> Transfers:
    """The rings of a reduce-scatter of `reduced_bytes` a GPU; an all-gather's results take as much.

    A GPU sends V = reduced_bytes (n-1)/n of a group of n: with L of them in each node V/L over its
    NIC, V (L-1)/L over NVLink, all of V where the group has one node only (as `plan.links` counts).
    """
    parts = []
    for group in groups:
        members = np.sort(group)
        nodes, local = np.unique(members // GPUS_PER_NODE, return_counts=True)
        rule = "groups with the same number of GPUs in each of their nodes"
        require(len(set(local.tolist())) == 1, "group", members.tolist(), rule)
        rows = members.reshape(len(nodes), -1)
        volume, width = reduced_bytes * (len(members) - 1) / len(members), rows.shape[1]
        network = 0.0 if len(nodes) == 1 else volume / width
        parts.append((rows, np.roll(rows, -1, axis=0), network))
        parts.append((rows, np.roll(rows, -1, axis=1), volume - network))
    columns = [(s.ravel(), t.ravel(), np.full(s.size, size)) for s, t, size in parts]
    source, target, size = (np.concatenate(column) for column in zip(*columns, strict=True))
    return _transfers(source, target, size)


def pipeline(gpus: int, stages: int, sent_bytes: float) -> Transfers:
    """Activations to the next stage and gradients to the one before, at the same time."""
    require(2 <= stages <= gpus, "stages", stages, f"2 to {gpus}")
    require(gpus % stages == 0, "stages", stages, f"a divisor of the {gpus} GPUs")
    earlier = np.arange(gpus - gpus // stages)
    later = earlier + gpus // stages
    size = np.full(2 * len(earlier), float(sent_bytes))
    return _transfers(np.concatenate([earlier, later]), np.concatenate([later, earlier]), size)


def _transfers(source: PerTransfer, target: PerTransfer, size: np.ndarray) -> Transfers:
    """Those that move something."""
    moves = (size > 0) & (source != target)
    return Transfers(source=source[moves], target=target[moves], size_bytes=size[moves])
