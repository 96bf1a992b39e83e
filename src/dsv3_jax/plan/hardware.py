"""What a GPU can do, and how XLA is told of one that is not there. Imports no JAX.

All bandwidths are bytes/s in one direction, all rates dense (no sparsity), for the SXM boards of an
8-GPU node.

Sources: NVIDIA's data sheets of H100, H200 and HGX B200; for the H800 "Insights into DeepSeek-V3"
(arXiv 2505.09343) §2 and §4.3; sizes that XLA asks for from its own published target
configurations (h100_sxm, h200, b200).
"""

from dataclasses import dataclass, replace


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


# "Insights" §4.3: of the H800's 200 GB/s of NVLink 160 are achieved, of 50 GB/s of InfiniBand 40.
# The same shares are assumed of the other models, for which no such pair is published.
ACHIEVED_SHARE = 0.8

_H100 = Gpu(
    name="h100",
    device_name="NVIDIA H100 80GB HBM3",
    compute_capability=(9, 0),
    multiprocessors=132,  # data sheet: 16,896 FP32 cores / 128
    clock_ghz=1.98,  # XLA's h100_sxm
    l2_bytes=52_428_800,  # XLA's h100_sxm
    memory_bytes=84_942_979_072,  # XLA's h100_sxm: 80 GB, as the driver counts
    memory_bytes_per_second=3.35e12,  # data sheet
    bf16_flops_per_second=989.4e12,  # data sheet: 1,979e12 with sparsity
    fp8_flops_per_second=1_978.9e12,  # data sheet: 3,958e12 with sparsity
    tf32_flops_per_second=494.7e12,  # data sheet: 989e12 with sparsity
    fp32_flops_per_second=66.9e12,  # data sheet: 67e12
    nvlink_links=18,
    nvlink_bytes_per_second=450e9,  # data sheet: 900 GB/s both ways
    nvlink_achieved_bytes_per_second=450e9 * ACHIEVED_SHARE,
    network_bytes_per_second=50e9,  # one 400 Gbit/s port a GPU: DGX H100 data sheet
    network_achieved_bytes_per_second=50e9 * ACHIEVED_SHARE,
    pcie_bytes_per_second=34_359_738_368,  # XLA's h100_sxm
)
_H200 = replace(  # data sheet: the H100's chip with another memory
    _H100,
    name="h200",
    device_name="NVIDIA H200 141GB HBM3e",
    memory_bytes=151_397_597_184,  # XLA's h200
    memory_bytes_per_second=4.8e12,  # data sheet
)
_H800 = replace(  # the H100's chip with fewer NVLinks: MFU in "Insights" Table 4 is of 989e12
    _H100,
    name="h800",
    device_name="NVIDIA H800",
    nvlink_links=8,
    nvlink_bytes_per_second=200e9,  # "Insights" §4.3: 400 GB/s both ways
    nvlink_achieved_bytes_per_second=160e9,  # "Insights" §4.3
    network_bytes_per_second=50e9,  # "Insights" §4.3: 400 Gbit/s InfiniBand
    network_achieved_bytes_per_second=40e9,  # "Insights" §4.3
)
_B200 = Gpu(
    name="b200",
    device_name="NVIDIA B200",
    compute_capability=(10, 0),
    multiprocessors=148,  # XLA's b200
    clock_ghz=1.965,  # XLA's b200
    l2_bytes=132_644_864,  # XLA's b200
    memory_bytes=191_514_411_008,  # XLA's b200: 180 GB of 192 are for programs
    memory_bytes_per_second=7.67e12,  # XLA's b200; the data sheet says "up to 8 TB/s"
    bf16_flops_per_second=2_250e12,  # data sheet of HGX B200, 1,000 W: half of 4.5e15
    fp8_flops_per_second=4_500e12,  # data sheet: half of 9e15
    tf32_flops_per_second=1_100e12,  # data sheet: half of 2.2e15
    fp32_flops_per_second=80e12,  # data sheet
    nvlink_links=18,
    nvlink_bytes_per_second=900e9,  # data sheet: 1.8 TB/s both ways
    nvlink_achieved_bytes_per_second=900e9 * ACHIEVED_SHARE,
    network_bytes_per_second=50e9,  # one 400 Gbit/s port a GPU: DGX B200 data sheet
    network_achieved_bytes_per_second=50e9 * ACHIEVED_SHARE,
    pcie_bytes_per_second=68_719_476_736,  # XLA's b200
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in (_H100, _H200, _H800, _B200)}


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
