"""Quantisation in tiles: the contract and the choice of implementation.

quantize(x, tile)          rows 1x128, blocks 128x128, or any tile, laid out as x
quantize_transposed(x)     columns 128x1, laid out as x^T: what a product over x's rows reads
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels import choice
from dsv3_kernels.quantize import reference
from dsv3_kernels.quantize.reference import BLOCK, E4M3, dequantize

__all__ = ["BLOCK", "E4M3", "dequantize", "quantize", "quantize_transposed"]
IMPLEMENTATIONS = ("reference", "mosaic")
_STATIC = ("tile", "dtype", "power_of_two", "implementation")
# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.3 s.


@partial(jax.jit, static_argnames=_STATIC)
def quantize(
    x: Float[Array, "*batch rows columns"],
    tile: tuple[int, int] = (1, BLOCK),
    *,
    dtype: DTypeLike = E4M3,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch rows columns"], Float[Array, "*batch row_tiles column_tiles"]]:
    """Values in `dtype` and FP32 scales, one for each tile of the last two dims.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `reference`. Raises ValueError for an unknown implementation, NotImplementedError for a case
    that the named one lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    options = {"dtype": dtype, "power_of_two": power_of_two}
    return choice.run(
        "quantize",
        implementation,
        (x,),
        kernel=lambda: partial(_mosaic().quantize, tile=tile, **options),
        unsupported=lambda: _mosaic().unsupported(x, tile, dtype),
        plain=partial(reference.quantize, tile=tile, **options),
    )


@partial(jax.jit, static_argnames=_STATIC[1:])
def quantize_transposed(
    x: Float[Array, "*batch rows columns"],
    *,
    dtype: DTypeLike = E4M3,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch columns rows"], Float[Array, "*batch columns row_tiles"]]:
    """The transpose of `x` in tiles of 1x128, that is 128x1 of `x`. Chosen and raised as above."""
    choice.require_known(implementation, IMPLEMENTATIONS)
    options = {"dtype": dtype, "power_of_two": power_of_two}

    def plain(x):
        return reference.quantize(jnp.swapaxes(x, -1, -2), **options)

    return choice.run(
        "quantize_transposed",
        implementation,
        (x,),
        kernel=lambda: partial(_mosaic().quantize_transposed, **options),
        unsupported=lambda: _mosaic().unsupported(x, (1, BLOCK), dtype),
        plain=plain,
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second, which a start without FP8 can do without."""
    return importlib.import_module("dsv3_kernels.quantize.mosaic_sm90")
