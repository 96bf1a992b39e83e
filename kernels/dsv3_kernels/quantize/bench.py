"""The Hopper kernels at the model's shapes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, memory_shares
from dsv3_kernels.quantize import mosaic_sm90, reference, shapes, tiles
from dsv3_kernels.quantize.reference import BLOCK
from dsv3_kernels.sass import Kernel


def _transposed(x: Array, **options: Any) -> tuple[Array, Array]:
    return reference.quantize(x.T, **options)


_IN_BLOCKS = {"tile": (BLOCK, BLOCK)}
KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rows": (mosaic_sm90.quantize, reference.quantize),
    "columns": (mosaic_sm90.quantize_transposed, _transposed),
    "blocks": (
        partial(mosaic_sm90.quantize, **_IN_BLOCKS),
        partial(reference.quantize, **_IN_BLOCKS),
    ),
}
"""The kernel and the reference of each."""


def cases() -> list[Case]:
    """All of `shapes` in BF16; the first of each kind with powers of two, and in FP32."""
    found = []
    for kind in KINDS:
        model = shapes.WEIGHTS if kind == "blocks" else shapes.ACTIVATIONS
        found += [_case(kind, shape) for shape in model]
        found.append(_case(kind, model[0], power_of_two=True))
        found.append(_case(kind, model[0], dtype="float32"))
    return found


def _case(
    kind: str, shape: tuple[int, int], dtype: str = "bfloat16", power_of_two: bool = False
) -> Case:
    height, scaled = (BLOCK, BLOCK**2) if kind == "blocks" else (tiles.M, BLOCK)
    itemsize = jnp.dtype(dtype).itemsize
    moved = itemsize + 1 + 4 / scaled

    def make(key: Array) -> tuple[Array, ...]:
        return (jax.random.normal(key, shape, dtype),)

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        size = height * tiles.K
        programs = tiles.programs_per_sm(itemsize, height, kernel.registers)
        return memory_shares(kernel, size * moved, itemsize * size, programs)

    run, expected = (partial(each, power_of_two=power_of_two) for each in KINDS[kind])
    what = ", powers of two" if power_of_two else ", FP32" if dtype == "float32" else ""
    return Case(
        op="quantize",
        name=f"{kind} of {list(shape)}{what}",
        run=run,
        make=make,
        unit="memory",
        work=shape[0] * shape[1] * moved,
        predict=predict,
        reference=expected,
    )
