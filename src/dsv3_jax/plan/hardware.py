"""What a GPU can do, and how XLA is told of one that is not there. Imports no JAX.

The numbers are in gpus/*.toml, each with its source: bandwidths of one direction, rates dense (no
sparsity), for the SXM boards of an 8-GPU node.

Sources: NVIDIA's data sheets of H100, H200 and HGX B200; for the H800 "Insights into DeepSeek-V3"
(arXiv 2505.09343) §2 and §4.3; sizes that XLA asks for from its own published target
configurations (h100_sxm, h200, b200).
"""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3_jax.config.checks import require
from dsv3_jax.plan.quantities import read_quantity, read_toml

DIRECTORY = Path(__file__).with_name("gpus")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU model, its memory, matrix rates and links."""

    name: str
    device_name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    clock_ghz: float
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_second: float
    bf16_flops_per_second: float
    fp8_flops_per_second: float
    tf32_flops_per_second: float
    fp32_flops_per_second: float
    """Of the ordinary FP32 units, which products of highest precision run on."""
    nvlink_links: int
    nvlink_bytes_per_second: float
    nvlink_achieved_bytes_per_second: float
    network_bytes_per_second: float
    network_achieved_bytes_per_second: float
    pcie_bytes_per_second: int
    gpus_per_node: int = 8


QUANTITIES = {
    name: hint
    for name, hint in typing.get_type_hints(Gpu).items()
    if name not in ("name", "device_name", "compute_capability", "gpus_per_node")
}
"""Fields that a file gives with unit and source."""


def read_gpu(table: Mapping[str, Any], where: str, base: Gpu | None = None) -> Gpu:
    """The GPU of a file's table; what it leaves out is `base`'s.

    ValueError names a field that is not there, not known, or without unit or source.
    """
    known = {"name", "device_name", "compute_capability", *QUANTITIES}
    for field in table:
        require(field in known, where, field, f"one of {', '.join(sorted(known))}")
    missing = sorted(known - set(table)) if base is None else []
    require(not missing, where, sorted(table), f"{', '.join(missing)} as well")
    values: dict[str, Any] = {}
    for field, given in table.items():
        if field in QUANTITIES:
            values[field], _ = read_quantity(where, field, given, QUANTITIES[field])
        elif field == "compute_capability":
            holds = isinstance(given, list) and [type(part) for part in given] == [int, int]
            require(holds, f"{where}: {field}", given, "two whole numbers, e.g. [9, 0]")
            values[field] = tuple(given)
        else:
            require(isinstance(given, str), f"{where}: {field}", given, "a text")
            values[field] = given
    return Gpu(**values) if base is None else replace(base, **values)


def _read_file(name: str) -> Gpu:
    path = DIRECTORY / f"{name}.toml"
    table = read_toml(path)
    base = table.pop("based_on", None)
    return read_gpu(table, path.name, None if base is None else _read_file(base))


def gpu_sources(name: str) -> dict[str, str]:
    """Where each number of a GPU's file is from, by field."""
    table = read_toml(DIRECTORY / f"{name}.toml")
    base = table.pop("based_on", None)
    found = {} if base is None else gpu_sources(base)
    return found | {field: table[field]["source"] for field in QUANTITIES if field in table}


GPUS: dict[str, Gpu] = {name: _read_file(name) for name in ("h100", "h200", "h800", "b200")}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name; ValueError names those there are."""
    if name not in GPUS:
        raise ValueError(f"gpu is {name!r}, expected one of {', '.join(GPUS)}")
    return GPUS[name]


def target_config(gpu: Gpu) -> str:
    """XLA's description of `gpu` (stream_executor GpuTargetConfigProto, text format).

    The limits per block and per multiprocessor are those of compute capability 9.0 and 10.0, which
    agree (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    """
    major, minor = gpu.compute_capability
    return f"""gpu_device_info {{
  name: "{gpu.device_name}"
  core_count: {gpu.multiprocessors}
  fpus_per_core: 128
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {gpu.memory_bytes_per_second:.0f}
  device_memory_size: {gpu.memory_bytes}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  threads_per_warp: 32
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: ACCELERATED_FEATURES
  }}
  pcie_bandwidth: {gpu.pcie_bytes_per_second}
  device_interconnect_info {{ active_links: {gpu.nvlink_links} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{gpu.device_name}"
"""
