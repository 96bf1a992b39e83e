"""A cluster's figures as a table, each with its source. Imports no JAX."""

from pathlib import Path

from dsv3_jax.plan.cluster import DIRECTORY, cluster_names, find_cluster, read_sources
from dsv3_jax.plan.table import Table


def cluster_list() -> Table:
    """The clusters that come with the package."""
    rows = []
    for name in cluster_names():
        c = find_cluster(name)
        gpu = c.gpu
        rows.append(
            (
                name,
                c.num_gpus,
                gpu.device_name,
                gpu.memory_bytes / 1e9,
                gpu.memory_bytes_per_second / 1e12,
                gpu.bf16_flops_per_second / 1e12,
                c.nvlink.bytes_per_second / 1e9,
                c.network.bytes_per_second / 1e9,
                c.gpu_dollars_per_hour,
            )
        )
    columns = ("cluster", "GPUs", "GPU", "memory (GB)", "HBM (TB/s)", "BF16 (TFLOP/s)")
    return Table(
        title="Clusters; bandwidths of a GPU, one way",
        columns=(*columns, "NVLink (GB/s)", "network (GB/s)", "$/h"),
        rows=tuple(rows),
    )


def cluster_table(name: str) -> Table:
    """Every number of one cluster, a name or a file."""
    cluster = find_cluster(name)
    path = Path(name) if name.endswith(".toml") else DIRECTORY / f"{name}.toml"
    values = vars(cluster.gpu) | vars(cluster)
    rows = tuple((field, values[field], source) for field, source in read_sources(path).items())
    return Table(
        title=f"{cluster.name}: {cluster.num_gpus:,} x {cluster.gpu.device_name}",
        columns=("field", "value", "source"),
        rows=rows,
    )
