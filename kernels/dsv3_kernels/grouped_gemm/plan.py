"""Which problems the Hopper kernel takes, and how it works on one."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels.grouped_gemm import tiles as sizes
from dsv3_kernels.grouped_gemm.reference import Scales
from dsv3_kernels.grouped_gemm.tiles import ROWS, Tiles
from dsv3_kernels.quantize.reference import E4M3

OUT_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A problem and how it is worked on."""

    is_k_ragged: bool
    is_fp8: bool
    is_a_transposed: bool
    """k is the first of its dims."""
    is_b_transposed: bool
    is_b_in_rows: bool
    """Each row of b has scales of its own."""
    has_partial_stores: bool
    """A group may end within the rows of a warpgroup, and another begin."""
    groups: int
    m: int
    """Rows of the result: of all groups where they are ragged, else of each."""
    n: int
    out_dtype: jnp.dtype
    flops: int
    tiles: Tiles

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(E4M3 if self.is_fp8 else jnp.bfloat16)

    @property
    def depth(self) -> int:
        """Of k in one step."""
        return sizes.K_BYTES // self.dtype.itemsize

    @property
    def clusters(self) -> int:
        return self.tiles.programs // self.tiles.cluster

    @property
    def column_tiles(self) -> int:
        """Of a cluster."""
        return -(-self.n // self.tiles.cluster_n)

    @property
    def row_tiles(self) -> int:
        """Of a group, where k is ragged."""
        return -(-self.m // sizes.M)

    @property
    def store_slots(self) -> int:
        """For whole pieces."""
        return self.tiles.store_slots - self.has_partial_stores

    @property
    def store_columns(self) -> int:
        """Of the result in one store."""
        return sizes.STORE_BYTES // self.out_dtype.itemsize


def plan_rows(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"] | Float[Array, "groups k n"],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    transpose_b: bool,
    group_rows: int,
    alignment: int,
    tiles: Tiles | None,
) -> Plan:
    """For groups of rows, of which each is expected to have `group_rows`."""
    (rows, k), groups = a.shape, b.shape[0]
    n, is_fp8 = b.shape[2 if transpose_b else 1], scales is not None
    return Plan(
        is_k_ragged=False,
        is_fp8=is_fp8,
        is_a_transposed=False,
        is_b_transposed=transpose_b,
        is_b_in_rows=False,
        has_partial_stores=alignment % ROWS != 0,
        groups=groups,
        m=rows,
        n=n,
        out_dtype=jnp.dtype(out_dtype),
        flops=2 * groups * group_rows * k * n,
        tiles=tiles or sizes.choose(group_rows, groups, n, is_fp8=is_fp8, b_in_rows=False),
    )


def plan_ragged_k(
    a: Float[Array, "a_rows a_columns"],
    b: Float[Array, "b_rows b_columns"],
    groups: int,
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    tiles: Tiles | None,
) -> Plan:
    """For groups of k."""
    is_fp8 = scales is not None
    (rows, m), n = (a.shape[::-1], b.shape[0]) if is_fp8 else (a.shape, b.shape[1])
    return Plan(
        is_k_ragged=True,
        is_fp8=is_fp8,
        is_a_transposed=not is_fp8,
        is_b_transposed=not is_fp8,
        is_b_in_rows=is_fp8,
        has_partial_stores=False,
        groups=groups,
        m=m,
        n=n,
        out_dtype=jnp.dtype(out_dtype),
        flops=2 * rows * m * n,
        tiles=tiles or sizes.choose(m, groups, n, is_fp8=is_fp8, b_in_rows=is_fp8),
    )


def unsupported(
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    scales: Scales | None,
    out_dtype: DTypeLike,
    *,
    k_alignment: int | None = None,
) -> str:
    """Why the kernel will not take these, or an empty string; only shapes and dtypes are looked at.

    `k_alignment` is that of groups of k, None where they are of rows, which may begin anywhere.
    """
    dtype = jnp.dtype(jnp.bfloat16 if scales is None else E4M3)
    named = [("a", a, dtype), ("b", b, dtype)]
    if scales is not None:
        named += [("a_scale", scales[0], jnp.float32), ("b_scale", scales[1], jnp.float32)]
    for name, array, expected in named:
        if array.dtype != expected:
            return f"{name} is {array.dtype}, expected {jnp.dtype(expected)}"
        if array.size == 0:
            return f"{name} is {list(array.shape)}, expected at least one value"
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        return f"out_dtype is {jnp.dtype(out_dtype)}, expected bfloat16 or float32"
    depth = sizes.K_BYTES // dtype.itemsize
    if k_alignment is not None and k_alignment % depth:
        return f"alignment is {k_alignment}, expected a multiple of {depth} where k is ragged"
    return ""
