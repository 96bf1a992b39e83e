"""The products of groups of rows, an expert's each: the contract and the choice of implementation.

ragged rows (training, prefill)    [rows, n]               a [rows, k]              b [groups, n, k]
masked rows (decode)               [groups, max_rows, n]   a [groups, max_rows, k]  b [groups, n, k]
ragged k (gradient of weights)     [groups, m, n]          a [rows, m]              b [rows, n]
    with scales                                            a [m, rows]              b [n, rows]

Rows are sorted by group, and only the device knows how many a group has: none, one, all.
`alignment` promises that every size is a multiple of it, because whoever sorted the rows padded the
groups (with zeros, say); padding counts as rows. A multiple of 128 spares the kernel all care at
groups' ends.

Operands are BF16 or FP32; or E4M3, with scales of a for 1x128 values and of b for 128x128. Where k
is ragged, both have them for 1x128 (the 128x1 of dy and x), and no tile may be of two groups. Sums
are in FP32.
"""

import importlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels import choice
from dsv3_kernels.grouped_gemm import reference, xla
from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.quantize.reference import BLOCK

IMPLEMENTATIONS = ("reference", "xla", "mosaic")


# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.3 s.


@partial(jax.jit, static_argnames=("out_dtype", "transpose_b", "alignment", "implementation"))
def ragged_rows(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    out_dtype: DTypeLike,
    *,
    scales: Scales | None = None,
    transpose_b: bool = False,
    alignment: int = 1,
    implementation: str | None = None,
) -> Float[Array, "rows n"]:
    """a b^T by group, or a b with `transpose_b`; zeros in the rows past the last group.

    Has a gradient for a and b where there are no scales. None chooses `mosaic` where the program is
    for Hopper and the kernel has the case, otherwise `xla`. Raises ValueError for an unknown
    implementation and for shapes that do not fit, NotImplementedError for a case that the named
    implementation lacks. Sizes that break a promise or exceed the rows make it undefined.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _require_operands(a.shape, b.shape, group_sizes.shape, scales, transpose_b)
    _require_alignment(alignment)
    static = _Static(jnp.dtype(out_dtype), transpose_b, alignment, implementation)
    if scales is None:
        return _ragged_rows(static, a, b, group_sizes)
    return _ragged_rows_any(static, a, b, group_sizes, scales)


@partial(jax.jit, static_argnames=("out_dtype", "transpose_b", "expected_rows", "implementation"))
def masked_rows(
    a: Float[Array, "groups max_rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    group_sizes: Int[Array, " groups"],
    out_dtype: DTypeLike,
    *,
    scales: Scales | None = None,
    transpose_b: bool = False,
    expected_rows: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "groups max_rows n"]:
    """a b^T by group, or a b with `transpose_b`, for the first `group_sizes[g]` rows of each.

    What the other rows hold is undefined, for little is computed of them. No gradient.
    `expected_rows` of a group, if known, choose the kernel's tiles and are what its FLOPs count.
    Implementations and errors are those of `ragged_rows`.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _require_operands(a.shape, b.shape, group_sizes.shape, scales, transpose_b)
    shape = *a.shape[:2], b.shape[2 if transpose_b else 1]
    if 0 in (*shape, a.shape[2]):
        return jnp.zeros(shape, out_dtype)
    operands = a, b, group_sizes, scales
    if implementation == "reference":
        b = jnp.swapaxes(b, 1, 2) if transpose_b else b
        return reference.masked_rows(a, b, group_sizes, scales, out_dtype)
    options = dict(out_dtype=out_dtype, transpose_b=transpose_b)
    return choice.run(
        "grouped_gemm masked_rows",
        implementation,
        operands,
        kernel=lambda: partial(_mosaic().masked_rows, expected_rows=expected_rows, **options),
        unsupported=lambda: _mosaic().unsupported(a, b, scales, out_dtype),
        plain=partial(xla.masked_rows, **options),
        plain_name="xla",
    )


@partial(jax.jit, static_argnames=("out_dtype", "alignment", "implementation"))
def ragged_k(
    a: Float[Array, "a_rows a_columns"],
    b: Float[Array, "b_rows b_columns"],
    group_sizes: Int[Array, " groups"],
    out_dtype: DTypeLike,
    *,
    scales: Scales | None = None,
    alignment: int = 1,
    implementation: str | None = None,
) -> Float[Array, "groups m n"]:
    """a^T b over the rows of each group; a b^T with scales, for operands that are transposed.

    No gradient. Implementations and errors are those of `ragged_rows`; the kernel needs an
    alignment that is a multiple of 64, and FP8 one of 128.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    rows_dim = 0 if scales is None else 1
    rows, m, n = a.shape[rows_dim], a.shape[1 - rows_dim], b.shape[1 - rows_dim]
    if b.shape[rows_dim] != rows:
        raise ValueError(f"a is {list(a.shape)} and b {list(b.shape)}, expected as many rows")
    _require_alignment(alignment)
    if scales is not None:
        if alignment % BLOCK:
            raise ValueError(f"alignment is {alignment}, expected a multiple of {BLOCK} in FP8")
        _require_scale("a", a.shape, scales[0].shape, (m, -(-rows // BLOCK)))
        _require_scale("b", b.shape, scales[1].shape, (n, -(-rows // BLOCK)))
    shape = group_sizes.size, m, n
    if 0 in (*shape, rows):
        return jnp.zeros(shape, out_dtype)
    operands = a, b, group_sizes, scales
    if implementation == "reference":
        a, b = (a.T, b.T) if scales is None else (a, b)
        return reference.ragged_k(a, b, group_sizes, scales, out_dtype)
    return choice.run(
        "grouped_gemm ragged_k",
        implementation,
        operands,
        kernel=lambda: partial(_mosaic().ragged_k, out_dtype=out_dtype, alignment=alignment),
        unsupported=lambda: _mosaic().unsupported(a, b, scales, out_dtype, k_alignment=alignment),
        plain=partial(xla.ragged_k, out_dtype=out_dtype),
        plain_name="xla",
    )


class _Static(NamedTuple):
    """What of ragged rows is known when they are traced."""

    out_dtype: np.dtype
    transpose_b: bool
    alignment: int
    implementation: str | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged_rows(static: _Static, a: Array, b: Array, group_sizes: Array) -> Array:
    return _ragged_rows_any(static, a, b, group_sizes, None)


def _forward(static: _Static, a: Array, b: Array, group_sizes: Array) -> tuple[Array, Any]:
    return _ragged_rows(static, a, b, group_sizes), (a, b, group_sizes)


def _backward(static: _Static, residuals: Any, dy: Array) -> tuple[Array, Array, None]:
    a, b, group_sizes = residuals
    back = static._replace(out_dtype=a.dtype, transpose_b=not static.transpose_b)
    dy = dy.astype(a.dtype)
    da = _ragged_rows_any(back, dy, b, group_sizes, None)
    operands = (a, dy) if static.transpose_b else (dy, a)
    options = dict(alignment=static.alignment, implementation=static.implementation)
    return da, ragged_k(*operands, group_sizes, b.dtype, **options), None


_ragged_rows.defvjp(_forward, _backward)


def _ragged_rows_any(
    static: _Static, a: Array, b: Array, group_sizes: Array, scales: Scales | None
) -> Array:
    out_dtype, transpose_b, alignment, implementation = static
    shape = a.shape[0], b.shape[2 if transpose_b else 1]
    if 0 in (*shape, b.shape[0], a.shape[1]):
        return jnp.zeros(shape, out_dtype)
    operands = a, b, group_sizes, scales
    if implementation == "reference":
        b = jnp.swapaxes(b, 1, 2) if transpose_b else b
        return reference.ragged_rows(a, b, group_sizes, scales, out_dtype)
    options = dict(out_dtype=out_dtype, transpose_b=transpose_b)
    return choice.run(
        "grouped_gemm ragged_rows",
        implementation,
        operands,
        kernel=lambda: partial(_mosaic().ragged_rows, alignment=alignment, **options),
        unsupported=lambda: _mosaic().unsupported(a, b, scales, out_dtype),
        plain=partial(xla.ragged_rows, **options),
        plain_name="xla",
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second, which a start on CPU can do without."""
    return importlib.import_module("dsv3_kernels.grouped_gemm.mosaic_sm90")


def _require_operands(
    a: tuple[int, ...],
    b: tuple[int, ...],
    group_sizes: tuple[int, ...],
    scales: Scales | None,
    transpose_b: bool,
) -> None:
    """Of shapes; a begins with the groups where rows are masked."""
    if a[-1] != b[1 if transpose_b else 2]:
        raise ValueError(f"a is {list(a)} and b {list(b)}, expected the same k")
    of_a = a[:1] if len(a) == 3 else b[:1]
    if not of_a == b[:1] == group_sizes:
        named = f"a is {list(a)}, b {list(b)} and group_sizes {list(group_sizes)}"
        raise ValueError(f"{named}, expected as many groups")
    if scales is None:
        return
    if transpose_b:
        raise ValueError("transpose_b is True, expected False with scales")
    columns = -(-a[-1] // BLOCK)
    _require_scale("a", a, scales[0].shape, (*a[:-1], columns))
    _require_scale("b", b, scales[1].shape, (b[0], -(-b[1] // BLOCK), columns))


def _require_scale(
    name: str, shape: tuple[int, ...], scale: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    if scale != expected:
        found = f"scale of {name} {list(shape)} is {list(scale)}"
        raise ValueError(f"{found}, expected {list(expected)}")


def _require_alignment(alignment: int) -> None:
    if alignment < 1:
        raise ValueError(f"alignment is {alignment}, expected at least 1")
