"""The products of groups: the definition. Every group is multiplied with all rows."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_kernels.fp8_gemm import reference as fp8_gemm

Scales = tuple[Float[Array, "..."], Float[Array, "..."]]


def ragged_rows(
    a: Float[Array, "rows k"],
    b: Float[Array, "groups n k"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
) -> Float[Array, "rows n"]:
    """a b^T, the first `group_sizes[0]` rows with b[0], and so on; zeros in rows past all."""
    a_scale, b_scale = scales or (None, None)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(a.shape[0])

    def add_group(out, group):
        b, b_scale, start, end = group
        is_own = (start <= row) & (row < end)
        return jnp.where(is_own[:, None], _product(a, a_scale, b, b_scale, out_dtype), out), None

    out = jnp.zeros((a.shape[0], b.shape[1]), out_dtype)
    return jax.lax.scan(add_group, out, (b, b_scale, ends - group_sizes, ends))[0]


def masked_rows(
    a: Float[Array, "groups max_rows k"],
    b: Float[Array, "groups n k"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
) -> Float[Array, "groups max_rows n"]:
    """a b^T by group; zeros past the first `group_sizes[g]` rows."""
    a_scale, b_scale = scales or (None, None)
    is_filled = jnp.arange(a.shape[1]) < group_sizes[:, None]
    return jnp.where(is_filled[..., None], _product(a, a_scale, b, b_scale, out_dtype), 0)


def ragged_k(
    a: Float[Array, "m rows"],
    b: Float[Array, "n rows"],
    group_sizes: Int[Array, " groups"],
    scales: Scales | None,
    out_dtype: DTypeLike,
) -> Float[Array, "groups m n"]:
    """a b^T over the rows of each group."""
    a_scale, b_scale = scales or (None, None)
    row = jnp.arange(a.shape[1])

    def of_group(bounds):
        is_own = (bounds[0] <= row) & (row < bounds[1])
        own = jnp.where(is_own, a, jnp.zeros((), a.dtype))
        other = jnp.where(is_own, b, jnp.zeros((), b.dtype))
        return _product(own, a_scale, other, b_scale, out_dtype)

    ends = jnp.cumsum(group_sizes)
    return jax.lax.map(of_group, (ends - group_sizes, ends))


def _product(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"] | None,
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"] | None,
    out_dtype: DTypeLike,
) -> Float[Array, "*batch m n"]:
    if a_scale is not None and b_scale is not None:
        return fp8_gemm.gemm(a, a_scale, b, b_scale, out_dtype)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum("...mk,...nk->...mn", a, b, precision="highest").astype(out_dtype)
