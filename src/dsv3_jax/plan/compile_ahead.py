"""Compiling a sharded step for GPUs that are not there.

XLA's GPU compiler runs without a GPU, given a description of one (hardware.py) and how many. It is
in two packages beside JAX, which `scripts/setup.sh compile` puts into .venv/compile-ahead; they are
put on the path here, when first asked for. JAX itself goes on running on what it runs on.
"""

import importlib
import importlib.util
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from dsv3_jax.parallel.mesh import GPU_COMPILER_OPTIONS
from dsv3_jax.plan.hardware import Gpu, target_config

PLUGIN = "jax_plugins.xla_cuda13"
PACKAGES = Path(sys.prefix) / "compile-ahead"
CUDA_TOOLS = PACKAGES / "nvidia" / "cu13"
INSTALL_HINT = (
    "compiling for GPUs needs jax-cuda13-pjrt and jax-cuda13-plugin, expected beside jax or in"
    " .venv/compile-ahead: run scripts/setup.sh compile"
)
DEFAULT_OPTIONS = GPU_COMPILER_OPTIONS | {
    # Nobody will run the machine code, only its size is read: it need not be good, and the first
    # of several ways to write a kernel will do. A third of the time to compile, the same schedule.
    "xla_backend_optimization_level": 0,
    "xla_gpu_disable_gpuasm_optimizations": True,
    "xla_gpu_autotune_level": 0,
    # Products are cuBLAS calls: which Triton kernel may be quicker only a GPU could tell.
    "xla_gpu_enable_triton_gemm": False,
}


@dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What XLA's compiler says of a program, per device where bytes are meant."""

    hlo_text: str
    """The final, scheduled program; hlo.py reads it."""
    compile_seconds: float
    host_peak_bytes: int
    """The most memory this process has held so far, tracing and all else included."""
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Of the outputs, those that lie where donated arguments lay."""
    temp_bytes: int
    code_bytes: int
    arguments: dict[str, int] = field(default_factory=dict)
    """Bytes of every argument by its path, e.g. `[0].params['lm_head'].kernel`."""

    @property
    def peak_bytes(self) -> int:
        """Arguments, results, temporaries and code, all of which the program holds at once."""
        new_outputs = self.output_bytes - self.alias_bytes
        return self.argument_bytes + new_outputs + self.temp_bytes + self.code_bytes


def topology_devices(gpu: Gpu, hosts: int) -> list[Any]:
    """The devices of `hosts` nodes in order: number i is GPU i % 8 of node i // 8.

    They take a mesh and a lowering, and run nothing. ValueError if the compiler is not installed.
    """
    if hosts < 1:
        raise ValueError(f"hosts is {hosts}, expected at least 1")
    _find_plugin()
    shape = f"{hosts}x1x{gpu.gpus_per_node}"  # NVLink domains x hosts of one x GPUs of a host
    description = dict(target_config=target_config(gpu), topology=shape)
    try:
        topology = topologies.get_topology_desc(platform="cuda", **description)
    except NotImplementedError:  # JAX had looked for plugins before this one was on the path
        importlib.import_module(PLUGIN).initialize()
        topology = topologies.get_topology_desc(platform="cuda", **description)
    return sorted(topology.devices, key=lambda device: device.id)


def compile_ahead(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """The program that `lowered`, on devices of `topology_devices`, becomes.

    `options` are XLA's flags without their dashes, e.g. `xla_gpu_enable_triton_gemm=False`.
    """
    chosen: dict[str, Any] = dict(DEFAULT_OPTIONS)
    if CUDA_TOOLS.is_dir():
        chosen["xla_gpu_cuda_data_dir"] = str(CUDA_TOOLS)
    chosen.update(options or {})
    started = time.perf_counter()
    compiled = lowered.compile(chosen)
    seconds = time.perf_counter() - started
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    if memory is None or text is None:
        raise ValueError(
            "the compiled program has no memory analysis or text, expected one lowered for GPUs"
            " of topology_devices"
        )
    return CompiledStep(
        hlo_text=text,
        compile_seconds=seconds,
        host_peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        arguments=_argument_bytes(lowered, compiled),
    )


def _find_plugin() -> None:
    """Puts the compiler on the path if it is not there."""
    # The plugin would refuse to be loaded without cuDNN, which only a GPU calls.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if _has_plugin():
        return
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
        importlib.invalidate_caches()
    if not _has_plugin():
        raise ValueError(INSTALL_HINT)
    # Of Mosaic's kernels, which look for it where the plugin would be installed.
    runtime = PACKAGES / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
    os.environ.setdefault("MOSAIC_GPU_RUNTIME_LIB_PATH", str(runtime))


def _has_plugin() -> bool:
    try:
        return importlib.util.find_spec(PLUGIN) is not None
    except ModuleNotFoundError:  # no plugin at all
        return False


def _argument_bytes(lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> dict[str, int]:
    """Of each argument that is used, the bytes of a device's shard."""
    infos = _by_path(lowered.args_info[0])
    sizes = {}
    for path, sharding in _by_path(compiled.input_shardings[0]).items():
        shard = jax.ShapeDtypeStruct(sharding.shard_shape(infos[path].shape), infos[path].dtype)
        sizes[path] = shard.size * shard.dtype.itemsize
    return sizes


def _by_path(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
