"""SwiGLU and quantisation in one pass over h: the contract and the choice of implementation.

h = [gate ; up] [..., rows, 2F] -> a = silu(gate) * up * weight [..., rows, F], which is not written

swiglu_quantize(h)               a in E4M3, tiles 1x128: what the down-projection reads
swiglu_quantize_transposed(h)    a^T in E4M3, tiles 128x1 of a: what its weight gradient reads
swiglu_backward(h, w, d_a)       gradients of h and of the weights, from h again

`weights` [..., rows] are the routing weights of the rows. `filled` [...] says how many rows of each
matrix are there: the others may hold anything, NaN too, and count as zero: value 0, scale 1,
gradient 0.
"""

import importlib
from functools import partial
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from dsv3_kernels import choice
from dsv3_kernels.swiglu_quantize import reference

IMPLEMENTATIONS = ("reference", "mosaic")
# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.3 s.


@partial(jax.jit, static_argnames=("power_of_two", "implementation"))
def swiglu_quantize(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch rows width"], Float[Array, "*batch rows width_tiles"]]:
    """Values in E4M3 and FP32 scales of 1x128 tiles of a; a is computed in FP32, and rounded once
    to h's dtype before it is quantised.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `reference`. Raises ValueError for an unknown implementation and for shapes that do not fit,
    NotImplementedError for a case that the named implementation lacks.
    """
    _check(h, weights, filled, implementation)
    operands = h, weights, filled
    return _chosen("swiglu_quantize", implementation, operands, power_of_two=power_of_two)


@partial(jax.jit, static_argnames=("power_of_two", "implementation"))
def swiglu_quantize_transposed(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch width rows"], Float[Array, "*batch width row_tiles"]]:
    """The transpose of the same a in 1x128 tiles, 128x1 of a. Chosen and raised as above."""
    _check(h, weights, filled, implementation)
    operands = h, weights, filled
    return _chosen(
        "swiglu_quantize_transposed", implementation, operands, power_of_two=power_of_two
    )


@partial(jax.jit, static_argnames="implementation")
def swiglu_backward(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None,
    d_a: Float[Array, "*batch rows width"],
    filled: Int[Array, "*batch"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "*batch rows double_width"], Float[Array, "*batch rows"] | None]:
    """d_h in h's dtype and d_weights in FP32 (None without weights), of a's gradient `d_a`.

    In FP32 inside, rounded once; a's own roundings count as nothing. Chosen and raised as above.
    """
    _check(h, weights, filled, implementation)
    expected = (*h.shape[:-1], h.shape[-1] // 2)
    if d_a.shape != expected:
        raise ValueError(f"d_a is {list(d_a.shape)}, expected {list(expected)}")
    return _chosen("swiglu_backward", implementation, (h, weights, d_a, filled), d_a)


def _chosen(
    name: str, named: str | None, operands: tuple, d_a: Array | None = None, **options: bool
):
    """The function of that name, of the kernel or of the reference. `operands`: h, weights, ..."""
    return choice.run(
        name,
        named,
        operands,
        kernel=lambda: partial(getattr(_mosaic(), name), **options),
        unsupported=lambda: _mosaic().unsupported(*operands[:2], d_a),
        plain=partial(getattr(reference, name), **options),
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second, which a start without FP8 can do without."""
    return importlib.import_module("dsv3_kernels.swiglu_quantize.mosaic_sm90")


def _check(h: Array, weights: Array | None, filled: Array | None, named: str | None) -> None:
    choice.require_known(named, IMPLEMENTATIONS)
    if h.shape[-1] % 2:
        raise ValueError(f"h is {list(h.shape)}, expected an even number of columns, [gate ; up]")
    if weights is not None and weights.shape != h.shape[:-1]:
        raise ValueError(f"weights are {list(weights.shape)}, expected {list(h.shape[:-1])}")
    if filled is not None and filled.shape != h.shape[:-2]:
        raise ValueError(f"filled is {list(filled.shape)}, expected {list(h.shape[:-2])}")
