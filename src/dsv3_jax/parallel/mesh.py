"""The mesh `pipe data node gpu`, and on which axes what is spread.

Tokens are split over (data, node, gpu), experts over (node, gpu); everything else of a pipeline
rank is the same on all of them. Devices are taken in their order, so that `gpu` runs over the
devices of one host and `node` over hosts.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from dsv3_jax.config import ParallelConfig

PIPE_AXIS = "pipe"
AXES = (PIPE_AXIS, "data", "node", "gpu")
TOKEN_AXES = ("data", "node", "gpu")
EXPERT_AXES = ("node", "gpu")

GPU_COMPILER_OPTIONS: dict[str, Any] = {
    # Two transfers at a time, one over the network and one over NVLink: of an overlapped pair of
    # 671B layers 87 % of the transfers' time is under products, with one at a time 57 %.
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
    # Beyond its memory limit (this percentage of the card) the scheduler overlaps nothing, and it
    # takes a pipeline for beyond it that fits: its buffers pass through loops in place.
    "xla_gpu_memory_limit_slop_factor": 2000,
    # None of XLA's own kernels for small collectives, NCCL for all: of an integer maximum over 8
    # nodes of 8 GPUs its Triton kernel (jaxlib 0.12.0.1) ends the process in an LLVM error.
    "xla_gpu_experimental_use_collective_kernels": "",
}
"""XLA's options for a step on GPUs; docs/LOG.md, 2026-11-25."""


def make_mesh(config: ParallelConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (None: all there are), ValueError if it needs another number."""
    devices = jax.devices() if devices is None else devices
    if len(devices) != config.num_devices:
        sizes = " x ".join(str(size) for size in config.mesh_shape)
        raise ValueError(
            f"parallel.pipe x data x node x gpu is {sizes} = {config.num_devices} devices, expected"
            f" the {len(devices)} that there are (parallel.simulated_devices fakes some on CPU)"
        )
    grid = np.array(devices).reshape(config.mesh_shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, Any] | None:
    """What a program on this mesh is to be compiled with."""
    is_gpu = isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "gpu"
    return GPU_COMPILER_OPTIONS if is_gpu else None


def used_axes(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` with more than one device: a collective over the others does nothing."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)
