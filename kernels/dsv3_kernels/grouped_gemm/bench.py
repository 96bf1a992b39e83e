"""The Hopper kernel at the model's shapes, of groups of the same size; and, as a command, `xla`.

`python -m dsv3_kernels.grouped_gemm.bench` times `xla` on this machine's CPU, for even groups and
uneven ones, beside one dense product of as many FLOPs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_kernels.bench import WARM_UP, Case, loop_shares
from dsv3_kernels.grouped_gemm import mosaic_sm90, reference, shapes, xla
from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.quantize.reference import BLOCK, quantize
from dsv3_kernels.sass import Kernel


def cases() -> list[Case]:
    """All of `shapes`."""
    return [_case(shape) for shape in (*shapes.FP8, *shapes.BF16)]


def chosen_tiles(shape: shapes.Shape) -> sizes.Tiles:
    """What the kernel takes for `shape`."""
    b_in_rows = shape.form == "ragged_k" and shape.is_fp8
    rows, n = group_rows(shape), shape.n
    return sizes.choose(rows, shape.groups, n, is_fp8=shape.is_fp8, b_in_rows=b_in_rows)


def group_rows(shape: shapes.Shape) -> int:
    """Of a group's result."""
    if shape.form == "ragged_k":
        return shape.k
    return shape.rows if shape.form == "masked_rows" else shape.rows // shape.groups


def _case(shape: shapes.Shape) -> Case:
    is_masked = shape.form == "masked_rows"
    rows = shape.rows * (shape.groups if is_masked else 1)

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        tiles, of_group = chosen_tiles(shape), (group_rows(shape), shape.groups, shape.n)
        b_in_rows = shape.form == "ragged_k" and shape.is_fp8
        k = rows // shape.groups if shape.form == "ragged_k" else shape.k
        k_bytes, out_bytes = k * (1 if shape.is_fp8 else 2), jnp.dtype(shape.out_dtype).itemsize
        copied = (sizes.M + tiles.n) * sizes.K_BYTES / 4
        return loop_shares(kernel, 2, copied) | {
            "tiles": tiles.share_of_peak(*of_group, b_in_rows),
            "tiles' costs": tiles.share_with_tile_costs(*of_group, k_bytes, b_in_rows, out_bytes),
        }

    run, expected = _functions(shape)
    return Case(
        op="grouped_gemm",
        name=f"{'FP8' if shape.is_fp8 else 'BF16'} {shape.name}",
        run=run,
        make=partial(_make, shape),
        unit="fp8" if shape.is_fp8 else "bf16",
        work=2 * rows * shape.n * shape.k,
        predict=predict,
        reference=expected,
    )


def _functions(shape: shapes.Shape) -> tuple[Any, Any]:
    """The kernel and the reference, of arrays alone."""
    form, options = shape.form, {}
    if form != "masked_rows":
        options["alignment"] = shape.alignment
    if shape.transpose_b:
        options["transpose_b"] = True

    def run(a, b, group_sizes, *scales):
        kernel = getattr(mosaic_sm90, form)
        return kernel(a, b, group_sizes, scales or None, shape.out_dtype, **options)

    def expected(a, b, group_sizes, *scales):
        if shape.transpose_b:
            b = jnp.swapaxes(b, 1, 2)
        if form == "ragged_k" and not scales:
            a, b = a.T, b.T
        return getattr(reference, form)(a, b, group_sizes, scales or None, shape.out_dtype)

    return run, expected


def _make(shape: shapes.Shape, key: Array) -> tuple[Array, ...]:
    groups, rows, n, k = shape.groups, shape.rows, shape.n, shape.k
    is_masked, is_of_k = shape.form == "masked_rows", shape.form == "ragged_k"
    sizes_of = jnp.full((groups,), rows if is_masked else rows // groups, jnp.int32)
    a, b = (rows, k), (groups, *((k, n) if shape.transpose_b else (n, k)))
    if is_masked:
        a = (groups, rows, k)
    if is_of_k:
        a, b = ((k, rows), (n, rows)) if shape.is_fp8 else ((rows, k), (rows, n))
    keys = jax.random.split(key)
    a, b = jax.random.normal(keys[0], a), jax.random.normal(keys[1], b)
    if not shape.is_fp8:
        return a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), sizes_of
    (a, a_scale), (b, b_scale) = quantize(a), quantize(b, (1 if is_of_k else BLOCK, BLOCK))
    return a, b, sizes_of, a_scale, b_scale


@dataclass(frozen=True, kw_only=True)
class CpuTiming:
    """A product of groups and a dense one, medians of runs in turn."""

    name: str
    form: str
    """forward, dx or dw."""
    seconds: dict[str, float]
    """By how the rows are spread."""
    dense_seconds: dict[str, float]
    """Beside each."""
    gflops: float
    """Of the dense product, a second."""

    @property
    def shares(self) -> dict[str, float]:
        """Of the dense product's speed."""
        return {spread: self.dense_seconds[spread] / s for spread, s in self.seconds.items()}


def spreads(rows: int, groups: int) -> dict[str, np.ndarray]:
    """Sizes of groups: the same, three uneven ones, all rows in one."""
    random, one, two = np.random.default_rng(0), np.zeros(groups, int), np.zeros(groups, int)
    one[groups // 3], two[[0, groups // 2]] = rows, (rows // 3, rows - rows // 3)
    mild, skewed = (
        random.multinomial(rows, random.dirichlet(np.full(groups, even))) for even in (5.0, 0.3)
    )
    even = np.full(groups, rows // groups)
    return {"even": even, "mild": mild, "skewed": skewed, "two": two, "one": one}


def timed_on_cpu(shape: shapes.Shape, repeats: int) -> list[CpuTiming]:
    """Of `shape` in FP32, forward and both gradients."""
    rows, n, k = shape.rows, shape.n, shape.k
    random, dtype = np.random.default_rng(0), jnp.float32
    sizes_of_arrays = (rows, k), (rows, n), (shape.groups, n, k)
    x, dy, weights = (jnp.asarray(random.standard_normal(s), dtype) for s in sizes_of_arrays)

    def forward(a, b, sizes_of):
        return xla.ragged_rows(a, b, sizes_of, None, dtype)

    def dx(a, b, sizes_of):
        return xla.ragged_rows(a, b, sizes_of, None, dtype, transpose_b=True)

    def dw(a, b, sizes_of):
        return xla.ragged_k(a, b, sizes_of, None, dtype)

    products = [
        ("forward", forward, (x, weights), lambda a, b: a @ b.T, (x, weights[0])),
        ("dx", dx, (dy, weights), jnp.matmul, (dy, weights[0])),
        ("dw", dw, (dy, x), lambda a, b: a.T @ b, (dy, x)),
    ]
    timings = []
    for form, grouped, operands, dense, dense_operands in products:
        grouped, dense = jax.jit(grouped), partial(jax.jit(dense), *dense_operands)
        medians = {
            spread: _in_turn(partial(grouped, *operands, jnp.asarray(found)), dense, repeats)
            for spread, found in spreads(rows, shape.groups).items()
        }
        seconds, beside = ({spread: m[i] for spread, m in medians.items()} for i in (0, 1))
        timings.append(
            CpuTiming(
                name=shape.name,
                form=form,
                seconds=seconds,
                dense_seconds=beside,
                gflops=2e-9 * rows * n * k / statistics.median(beside.values()),
            )
        )
    return timings


def _in_turn(one: Callable[[], Array], other: Callable[[], Array], repeats: int) -> list[float]:
    """Median seconds of each."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(WARM_UP + repeats):
        for run, found in zip((one, other), seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(run())
            found.append(time.perf_counter() - start)
    return [statistics.median(found[WARM_UP:]) for found in seconds]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table of `shapes.ON_CPU`."""
    parser = argparse.ArgumentParser(prog="dsv3_kernels.grouped_gemm.bench", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="runs of each, at least 1")
    repeats = parser.parse_args(arguments).repeats
    if repeats < 1:
        parser.error(f"--repeats is {repeats}, expected at least 1")
    names = spreads(1, 3)
    print("| product | dense, GFLOP/s |", *(f"{name} |" for name in names))
    print("|---|---:|" + "---:|" * len(names))
    with jax.default_device(jax.devices("cpu")[0]):
        for shape in shapes.ON_CPU:
            for timing in timed_on_cpu(shape, repeats):
                shares = (f"{timing.shares[name]:.2f} |" for name in names)
                print(f"| {timing.name} {timing.form} | {timing.gflops:.0f} |", *shares, flush=True)


if __name__ == "__main__":
    main()
