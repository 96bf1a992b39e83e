"""Seconds that a step's optimizer takes, and its sharded state's gathers. Imports no JAX.

Copies of a parameter reduce their gradients, each updates its share, and all gather the weights:
over NVLink inside a node, then over the network between the GPUs of the same index.
"""

from collections.abc import Sequence

from dsv3_jax.config import RunConfig
from dsv3_jax.parallel.pipeline.stages import Unit
from dsv3_jax.plan.cluster import Cluster
from dsv3_jax.plan.links import Number
from dsv3_jax.plan.roofline import MEMORY_EFFICIENCY
from dsv3_jax.plan.state_sizes import COMPUTE_BYTES, copies, every_rank, moment_bytes


def optimizer_seconds(
    cluster: Cluster, config: RunConfig, stages: Sequence[Sequence[Unit]]
) -> Number:
    """Of the slowest rank; gradients go as FP32, weights come back in BF16, nothing overlaps. With
    parallel.zero=3 both have travelled before (`gather_seconds`)."""
    expert_copies, dense_copies = copies(config)
    in_node = _in_node(cluster, config)
    moments = moment_bytes(config)
    sizes = (4.0, 2.0) if config.parallel.zero == 1 else ()
    slowest = 0.0
    for held in every_rank(config, stages):
        others = held.dense + held.embedding
        seconds = 0.0
        for size in sizes:
            seconds += _ring(cluster, size * held.experts, expert_copies, in_node)
            seconds += _ring(cluster, size * others, dense_copies, cluster.gpus_per_node)
        share = held.experts / expert_copies + others / dense_copies
        # Gradient, master and moments are read, master, moments and weight written; the gradients
        # are cleared.
        touched = share * (4 + 2 * (4 + moments) + 2) + 4 * held.total
        slowest = max(slowest, seconds + _moved(cluster, touched))
    return slowest


def _moved(cluster: Cluster, num_bytes: Number) -> Number:
    return num_bytes / (MEMORY_EFFICIENCY * cluster.gpu.memory_bytes_per_second)


def gather_seconds(cluster: Cluster, config: RunConfig, stages: Sequence[Sequence[Unit]]) -> Number:
    """Of a step's weights that are gathered where they are used, forward and backward, and of their
    gradients, in every part of the batch; 0 unless parallel.zero is 3."""
    if config.parallel.zero != 3:
        return 0.0
    expert_copies, dense_copies = copies(config)
    in_node = _in_node(cluster, config)
    size = 2 * min(2.0, COMPUTE_BYTES[config.precision.recipe]) + 4.0
    seconds = 0.0
    for held in every_rank(config, stages):
        others = held.dense + held.embedding
        experts = _ring(cluster, size * held.experts, expert_copies, in_node)
        rest = _ring(cluster, size * others, dense_copies, cluster.gpus_per_node)
        seconds = max(seconds, experts + rest)
    return config.parts * seconds


def _ring(cluster: Cluster, num_bytes: Number, members: int, in_node: int) -> Number:
    """One reduce-scatter or all-gather of `num_bytes` over `members` GPUs."""
    inside = min(members, in_node)
    nodes = members / inside
    seconds = num_bytes * (inside - 1) / inside / cluster.nvlink.achieved_bytes_per_second
    rest = num_bytes / inside * (nodes - 1) / nodes
    return seconds + rest / cluster.network.achieved_bytes_per_second


def _in_node(cluster: Cluster, config: RunConfig) -> int:
    """Copies of an expert in one node: they are a whole expert group apart."""
    return max(1, cluster.gpus_per_node // (config.parallel.node * config.parallel.gpu))
