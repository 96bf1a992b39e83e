"""What Mosaic GPU kernels become for a Hopper GPU that is not there: registers, spills, SASS.

    python -c '
    import jax, jax.numpy as jnp
    from dsv3_kernels import sass
    from dsv3_kernels.quantize import mosaic_sm90
    x = jax.ShapeDtypeStruct((4096, 7168), jnp.bfloat16)
    print(sass.compile_for_hopper(mosaic_sm90.quantize, x))'

Needs JAX_PLATFORMS=cpu and what `scripts/setup.sh compile` installs: JAX's CUDA plugin (beside jax
or in .venv/compile-ahead), ptxas and nvdisasm. The MMAs of the innermost loop that has any, and the
instructions around them, give a bound on the speed: see `Loop.share_of_peak`.
"""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PLUGIN = "jax_plugins.xla_cuda13"
PACKAGES = Path(sys.prefix) / "compile-ahead"
CUDA = PACKAGES / "nvidia" / "cu13"
SCHEDULERS = 4
"""Of an SM: each starts one warp's instruction a cycle, and has a warp of each warpgroup."""
PORT_BYTES = 128
"""That an SM's shared memory moves in a cycle."""
H800 = """
gpu_device_info {
  name: "NVIDIA H800"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
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
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H800"
"""

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*)")
_LABEL = re.compile(r"^(\.L_\w+):")
_BRANCH = re.compile(r"`\((\.L_\w+)\)?")
_DUMP_NAME = re.compile(r'mosaic_gpu.dump_basename = "\w+"')
_MMA = re.compile(r"[A-Z]GMMA\.64x(\d+)x\d+")


_compiled: "dict[str, Kernel]" = {}
"""By what they are before compilation: Mosaic compiles none twice in a process."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop of a warpgroup that has MMAs: what one warp of it does in a turn."""

    instructions: Mapping[str, int]
    """How often each, by the first word of its name: QGMMA, FFMA, LDS."""
    tensor_cycles: float
    """Of the tensor cores. 64 x n by 32 bytes of k take n / 2."""
    operand_bytes: int
    """Of shared memory, that the MMAs read."""

    def share_of_peak(self, warpgroups: int, copied_bytes: int) -> dict[str, float]:
        """Tensor core cycles over the cycles of what else could be the bound; the least holds.

        `warpgroups` run this loop at once, so that one's other work is hidden by others' MMAs;
        `copied_bytes` go from L2 to shared memory in a turn of all. `issue`: a scheduler starts an
        instruction a cycle. `shared_memory`: operands, copies, and an access of 32 threads a cycle.
        """
        tensor = warpgroups * self.tensor_cycles
        issue = warpgroups * sum(self.instructions.values())
        accesses = sum(self.instructions.get(name, 0) for name in ("LDS", "STS", "LDSM", "STSM"))
        moved = warpgroups * self.operand_bytes + copied_bytes
        shared_memory = moved / PORT_BYTES + warpgroups * SCHEDULERS * accesses
        return {
            "issue": min(1.0, tensor / issue),
            "shared_memory": min(1.0, tensor / shared_memory),
        }


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A compiled kernel."""

    registers: int
    """Of a thread when the kernel starts; `set_max_registers` moves them between warpgroups."""
    spilled_bytes: int
    shared_memory_bytes: int
    instructions: Mapping[str, int]
    """How often each is in the program, by the first word of its name: QGMMA, UTMALDG."""
    main_loop: Loop | None
    """The innermost loop that has MMAs."""


def compile_for_hopper(
    function: Callable[..., Any], *arguments: jax.ShapeDtypeStruct | None
) -> list[Kernel]:
    """The Mosaic kernels of `function`, compiled for sm_90a.

    ValueError if there are none, or the compiler is not installed.
    """
    mesh = Mesh(np.array(_devices()), ("gpu",), axis_types=(AxisType.Auto,))
    whole = PartitionSpec()
    sharded = jax.jit(
        jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    )
    sharding = NamedSharding(mesh, whole)
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    options = {"xla_gpu_cuda_data_dir": str(CUDA)} if CUDA.is_dir() else {}
    with _dumped() as folder:
        sharded.lower(*placed).compile(options)
        kernels = _read_kernels(folder)
    if not kernels:
        raise ValueError("no Mosaic GPU kernel was compiled, expected at least one")
    return kernels


def read_sass(text: str) -> tuple[Counter[str], Loop | None]:
    """The instructions of nvdisasm's listing, and its innermost loop that has MMAs."""
    names: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    conditional: list[bool] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.search(line):
            names.append((instruction[2], instruction[3]))
            conditional.append(instruction[1] is not None)
    loops = []
    for end, (name, rest) in enumerate(names):
        # Without a condition it is the way back from code out of line: a barrier's further waits.
        target = _BRANCH.search(rest) if name == "BRA" and conditional[end] else None
        first = labels.get(target[1], end + 1) if target else end + 1
        if any(_MMA.match(inner) for inner, _ in names[first : end + 1]):
            loops.append(names[first : end + 1])
    return _count(names), _read_loop(min(loops, key=len)) if loops else None


def _count(names: list[tuple[str, str]]) -> Counter[str]:
    return Counter(name.split(".")[0] for name, _ in names)


def _read_loop(names: list[tuple[str, str]]) -> Loop:
    cycles, operand_bytes = 0.0, 0
    for name, operands in names:
        if mma := _MMA.match(name):
            n = int(mma[1])
            cycles += n / 2
            # The left operand may be in registers, the right one never is.
            left_in_memory = operands.split(",")[1].strip().startswith("gdesc")
            operand_bytes += 32 * (n + 64 * left_in_memory)
    return Loop(instructions=_count(names), tensor_cycles=cycles, operand_bytes=operand_bytes)


def _read_kernels(folder: Path) -> list[Kernel]:
    """What Mosaic GPU wrote there, in the order that kernels were lowered in.

    It numbers what it lowers, and apart from that what it compiles: a kernel that is new to the
    process. Both go by the kernel's name and their own order. Of one with lane semantics it does
    not write what it was, so that such a one is taken for new.
    """
    written = list(zip(*(_dumps(folder, suffix) for suffix in ("ptxas", "sass_ctrl")), strict=True))
    found: dict[str, Kernel] = {}
    for resources in _dumps(folder, "resources.txt"):
        stem = resources.name.partition(".")[0]
        before = folder / f"{stem}.before_layout_inference.txt"
        text = _DUMP_NAME.sub("", before.read_text()) if before.is_file() else stem
        if text not in _compiled:
            own = [pair for pair in written if _name(pair[0]) == _name(resources)]
            if not own:
                raise ValueError(f"kernel {stem} was compiled before, expected a new one")
            written.remove(own[0])
            dumps = *own[0], resources
            _compiled[text] = _read_kernel(*(dump.read_text() for dump in dumps))
        found[text] = _compiled[text]
    return list(found.values())


def _dumps(folder: Path, suffix: str) -> list[Path]:
    """By number."""
    return sorted(folder.glob(f"*.{suffix}"), key=lambda path: int(_stem(path)[2]))


def _name(path: Path) -> str:
    """Of the kernel."""
    return _stem(path)[0]


def _stem(path: Path) -> tuple[str, str, str]:
    return path.name.partition(".")[0].rpartition("_")


def _read_kernel(ptxas: str, listing: str, resources: str) -> Kernel:
    counts, main_loop = read_sass(listing)
    return Kernel(
        registers=_number(r"Used (\d+) registers", ptxas),
        spilled_bytes=_number(r"(\d+) bytes spill stores", ptxas),
        shared_memory_bytes=_number(r"smem_scratch_bytes=(\d+)", resources),
        instructions=counts,
        main_loop=main_loop,
    )


def _number(pattern: str, text: str) -> int:
    if not (match := re.search(pattern, text)):
        raise ValueError(f"the compiler wrote nothing like {pattern!r}: {text!r}")
    return int(match[1])


@contextlib.contextmanager
def _dumped() -> Iterator[Path]:
    """A folder into which Mosaic GPU writes PTX, ptxas' report and SASS of what it compiles."""
    # JAX sets these when it imports Mosaic GPU, to nothing of use if its plugin is not there yet.
    if CUDA.is_dir():
        os.environ["MOSAIC_GPU_CUDA_ROOT"] = str(CUDA)
    runtime = PACKAGES / "jax_cuda13_plugin" / "libmosaic_gpu_runtime.so"
    if runtime.is_file():
        os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]


def _devices() -> list[Any]:
    """One H800."""
    # The plugin would refuse to be loaded without cuDNN, which only a GPU calls.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if PACKAGES.is_dir() and str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))
        importlib.invalidate_caches()
    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec(PLUGIN) is None:
        raise ValueError(
            "compiling for GPUs needs jax-cuda13-pjrt and jax-cuda13-plugin, expected beside jax or"
            " in .venv/compile-ahead: run scripts/setup.sh compile"
        )
    description = dict(target_config=H800, topology="1x1x1")
    try:
        topology = topologies.get_topology_desc(platform="cuda", **description)
    except NotImplementedError:  # JAX had looked for plugins before this one was on the path
        importlib.import_module(PLUGIN).initialize()
        topology = topologies.get_topology_desc(platform="cuda", **description)
    return list(topology.devices)
