"""The product of two quantised matrices: the definition, and a form that is fast on CPU."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_kernels.quantize.reference import BLOCK, dequantize, in_tiles


def gemm(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"],
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"],
    out_dtype: DTypeLike,
) -> Float[Array, "*batch m n"]:
    """a b^T: 128 of k at a time are summed in FP32, times both scales, and added up in FP32."""
    a_tiles = in_tiles(a, (1, BLOCK)).astype(jnp.float32)[..., :, 0, :, :]
    b_tiles = in_tiles(b, (1, BLOCK)).astype(jnp.float32)[..., :, 0, :, :]
    parts = jnp.einsum("...mtk,...ntk->...tmn", a_tiles, b_tiles, precision="highest")
    a_scale = jnp.swapaxes(a_scale, -1, -2)[..., :, None]  # [t, m, 1]
    b_scale = jnp.swapaxes(_spread_rows(b_scale, b.shape[-2]), -1, -2)[..., None, :]  # [t, 1, n]
    return jnp.sum(parts * a_scale * b_scale, axis=-3).astype(out_dtype)


def gemm_dequantised(
    a: Float[Array, "*batch m k"],
    a_scale: Float[Array, "*batch m k_tiles"],
    b: Float[Array, "*batch n k"],
    b_scale: Float[Array, "*batch n_tiles k_tiles"],
    out_dtype: DTypeLike,
) -> Float[Array, "*batch m n"]:
    """The same as one FP32 product of what the operands stand for, equal up to FP32 rounding."""
    batch = tuple(range(a.ndim - 2))
    left = dequantize(a, a_scale)
    right = dequantize(b, _spread_rows(b_scale, b.shape[-2]))
    contract = (((a.ndim - 1,), (b.ndim - 1,)), (batch, batch))
    return jax.lax.dot_general(left, right, contract).astype(out_dtype)


def _spread_rows(
    scale: Float[Array, "*batch n_tiles k_tiles"], rows: int
) -> Float[Array, "*batch n k_tiles"]:
    """The scales of each row: those of its block where there is one for 128 rows."""
    if scale.shape[-2] == rows:
        return scale
    return jnp.repeat(scale, BLOCK, axis=-2, total_repeat_length=scale.shape[-2] * BLOCK)[
        ..., :rows, :
    ]
