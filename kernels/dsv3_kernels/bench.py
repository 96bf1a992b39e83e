"""How fast the kernels should be, read from what they compile to, and how fast they are.

Every op's `bench.py` has `cases()`: its kernel at the model's shapes. A case is compiled for sm_90a
without a GPU (`compiled`), or timed on one (`timed`). Where predictions come from, and how far off
they are: `dsv3_kernels.published`.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels import sass
from dsv3_kernels.quantize.tiles import MEMORY_BYTES_PER_CYCLE

OPS = (
    "quantize",
    "fp8_gemm",
    "grouped_gemm",
    "mla_prefill",
    "mla_decode",
    "permute",
    "swiglu_quantize",
    "logfmt",
)
Unit = Literal["fp8", "bf16", "memory"]
PEAK: dict[Unit, float] = {"fp8": 1978.9e12, "bf16": 989.4e12, "memory": 3.35e12}
"""Of an H800 or H100 SXM, a second: dense FLOPs of the tensor cores, bytes of HBM."""
BEST_OF_MEMORY = 3000 / 3350
"""Of the bandwidth, that has been reached: FlashMLA on an H800."""
MEMORY_CYCLES = 1000
"""After which memory answers, roughly."""
WARM_UP = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel at one of the model's shapes."""

    op: str
    name: str
    run: Callable[..., Any]
    """The Mosaic kernel, of arrays alone."""
    make: Callable[[Array], tuple[Any, ...]]
    """Its arguments, from a random key."""
    unit: Unit
    """What bounds it."""
    work: int | float
    """That it has to do: FLOPs, or for `memory` bytes to read and write."""
    predict: Callable[[Sequence[sass.Kernel]], dict[str, float]]
    """Of the compiled kernels: the share of the unit's peak that each limit leaves."""
    reference: Callable[..., Any] | None = None
    """What the results are to be, of the same arguments; None where it would not fit a GPU."""


@dataclass(frozen=True, kw_only=True)
class StaticReport:
    """A case compiled."""

    case: Case
    kernels: Sequence[sass.Kernel]
    shares: dict[str, float]
    """By limit; of the unit's peak."""

    @property
    def limit(self) -> str:
        """The hardest."""
        return min(self.shares, key=lambda name: self.shares[name])

    @property
    def share(self) -> float:
        """Predicted: what that limit leaves."""
        return self.shares[self.limit]

    @property
    def microseconds(self) -> float:
        """Predicted."""
        return 1e6 * self.case.work / (PEAK[self.case.unit] * self.share)


def all_cases(op: str | None = None) -> list[Case]:
    """Of all ops, or of one. ValueError for one that there is not."""
    if op not in (None, *OPS):
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    names = OPS if op is None else (op,)
    modules = [importlib.import_module(f"dsv3_kernels.{name}.bench") for name in names]
    return [case for module in modules for case in module.cases()]


def compiled(case: Case) -> StaticReport:
    """`case` compiled for an H800. ValueError where the compiler is not installed."""
    specs = jax.eval_shape(case.make, jax.random.key(0))
    kernels = sass.compile_for_hopper(case.run, *specs)
    return StaticReport(case=case, kernels=kernels, shares=case.predict(kernels))


def loop_shares(
    kernel: sass.Kernel, warpgroups: int, copied_bytes_an_mma: float
) -> dict[str, float]:
    """What issue slots and shared memory leave of the tensor cores in the main loop, which
    `warpgroups` run; `copied_bytes_an_mma` come to shared memory for an MMA of each of them."""
    loop = kernel.main_loop
    assert loop is not None
    mmas = sum(loop.instructions.get(name, 0) for name in ("HGMMA", "QGMMA"))
    shares = loop.share_of_peak(warpgroups, int(mmas * copied_bytes_an_mma))
    return {f"loop: {limit.replace('_', ' ')}": share for limit, share in shares.items()}


def memory_shares(
    kernel: sass.Kernel, moved_bytes: float, asked_bytes: float, programs: int
) -> dict[str, float]:
    """What is left of memory's bandwidth by the issue slots of a program that moves `moved_bytes`,
    and by its latency where `programs` of an SM wait for `asked_bytes` each."""
    # A warp of each program on each of four schedulers: an instruction a cycle.
    issue = moved_bytes / MEMORY_BYTES_PER_CYCLE / sum(kernel.instructions.values())
    latency = programs * asked_bytes / (MEMORY_CYCLES * MEMORY_BYTES_PER_CYCLE)
    shares = {"issue": min(1.0, issue), "latency": min(1.0, latency)}
    return shares | {"memory at its best": BEST_OF_MEMORY}


def timed(case: Case, repeats: int = 20) -> float:
    """Seconds of a run on this machine's GPU, the median of `repeats`, from the host's clock: some
    10 microseconds of launch are in it."""
    arguments = jax.jit(case.make)(jax.random.key(0))
    run = jax.jit(case.run)
    for _ in range(WARM_UP):
        jax.block_until_ready(run(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def relative_error(got: Array, want: Array) -> tuple[float, float]:
    """In the Frobenius norm: of the whole, and of the worst row against a usual row's norm."""
    got, want = (x.astype(jnp.float32).reshape(-1, x.shape[-1]) for x in (got, want))
    of_rows, norms = jnp.linalg.norm(got - want, axis=-1), jnp.linalg.norm(want, axis=-1)
    whole = jnp.linalg.norm(norms)
    usual = whole / jnp.sqrt(jnp.float32(norms.size))
    return float(jnp.linalg.norm(of_rows) / whole), float(jnp.max(of_rows) / usual)
