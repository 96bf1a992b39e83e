"""The Hopper kernels at the model's shapes, in BF16."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, memory_shares
from dsv3_kernels.sass import Kernel
from dsv3_kernels.swiglu_quantize import mosaic_sm90, reference, tiles
from dsv3_kernels.swiglu_quantize.shapes import FILLED_ROWS, SHAPES, Shape

FORMS = {
    "rows": "swiglu_quantize",
    "columns": "swiglu_quantize_transposed",
    "backward": "swiglu_backward",
}
"""The functions of the kernel and of the reference."""


def cases() -> list[Case]:
    """Each shape in each form."""
    return [_case(shape, form) for shape in SHAPES for form in FORMS]


def _case(shape: Shape, form: str) -> Case:
    is_backward = form == "backward"
    moved, asked = (of(2, is_backward) for of in (tiles.moved_bytes, tiles.asked_bytes))

    def make(key: Array) -> tuple[Any, ...]:
        h = jax.random.normal(key, shape.h, jnp.bfloat16)
        d_a = [h[..., : shape.width]] if is_backward else []
        if not shape.routed:
            return h, None, *d_a
        weights = jnp.full(shape.h[:-1], 0.125, jnp.float32)
        return h, weights, *d_a, jnp.full(shape.h[:-2], FILLED_ROWS, jnp.int32)

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        programs = tiles.programs_per_sm(kernel.shared_memory_bytes, kernel.registers)
        return memory_shares(kernel, moved, asked, programs)

    rows = math.prod(shape.h[:-2]) * FILLED_ROWS if shape.routed else shape.h[0]
    return Case(
        op="swiglu_quantize",
        name=f"{form} of {shape.name} {list(shape.h)}",
        run=getattr(mosaic_sm90, FORMS[form]),
        make=make,
        unit="memory",
        work=rows * shape.width * moved / (tiles.M * tiles.K),
        predict=predict,
        reference=getattr(reference, FORMS[form]),
    )
