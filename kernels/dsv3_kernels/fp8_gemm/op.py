"""The product of two quantised matrices, a b^T: the contract and the choice of implementation.

a [m, k] in tiles of 1x128; b [n, k] in tiles of 1x128 or blocks of 128x128; FP32 sums

forward            y [m, n]   = x in rows        weight in blocks
input gradient     dx [m, n]  = dy in rows       weight^T in blocks
weight gradient    dw [m, n]  = dy^T in rows     x^T in rows          (128x1 of dy and x)
"""

import importlib
from functools import partial
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels import choice
from dsv3_kernels.fp8_gemm import reference

IMPLEMENTATIONS = ("reference", "xla", "mosaic")


# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.3 s.


@partial(jax.jit, static_argnames=("out_dtype", "implementation"))
def fp8_gemm(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"],
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"],
    out_dtype: DTypeLike,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch m n"]:
    """a b^T in `out_dtype`.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `xla`. Raises ValueError for an unknown implementation and for shapes that do not fit,
    NotImplementedError for a case that the named implementation lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    if (*a.shape[:-2], a.shape[-1]) != (*b.shape[:-2], b.shape[-1]):
        expected = "the same k and the same dims before the last two"
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}, expected {expected}")
    _require_tiles("a", a.shape, a_scale.shape, rows=(a.shape[-2],))
    _require_tiles("b", b.shape, b_scale.shape, rows=(b.shape[-2], -(-b.shape[-2] // 128)))
    operands = a, a_scale, b, b_scale
    if implementation == "reference":
        return reference.gemm(*operands, out_dtype)
    return choice.run(
        "fp8_gemm",
        implementation,
        operands,
        kernel=lambda: partial(_mosaic().gemm, out_dtype=out_dtype),
        unsupported=lambda: _mosaic().unsupported(*operands, out_dtype),
        plain=partial(reference.gemm_dequantised, out_dtype=out_dtype),
        plain_name="xla",
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second, which a start without FP8 can do without."""
    return importlib.import_module("dsv3_kernels.fp8_gemm.mosaic_sm90")


def _require_tiles(
    name: str, shape: tuple[int, ...], scale: tuple[int, ...], rows: tuple[int, ...]
) -> None:
    columns = -(-shape[-1] // 128)
    if scale[-2] not in rows or scale[-1] != columns:
        expected = " or ".join(f"[{count}, {columns}]" for count in rows)
        raise ValueError(f"scale of {name} {list(shape)} is {list(scale)}, expected {expected}")
