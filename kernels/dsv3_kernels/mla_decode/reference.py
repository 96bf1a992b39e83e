"""Attention over a paged latent cache, and its FP8 layout: the definitions, in plain jnp.

A token's cached row is [latent ; rotary]: the whole of it is the key, the latent is the value, both
of all heads. With c = scale * log2(e) and x = c (q k^T), over the keys that a query sees:

    m = round(max x)    p = 2^(x - m)    l = sum p    out = (p v) / l    lse = ln(2) (m + log2 l)

All in FP32, but p is rounded to q's dtype, where it is used. m is an integer, so p is rounded alike
whatever m is: the result does not depend on where a kernel splits the keys.

A row in 8 bits, as bytes (656 for a latent of 512 values and 64 rotary ones):

    latent in E4M3, 512    |    FP32 scale of each 128 values, 4 x 4    |    rotary in BF16, 64 x 2

Source: DeepSeek-V2 (arXiv 2405.04434) §2.1.2 for absorption; the layout is FlashMLA's.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from dsv3_kernels.quantize import reference as quantization
from dsv3_kernels.quantize.reference import BLOCK, E4M3

LOG2_E = math.log2(math.e)
LATENT_DIM = 512
"""Of DeepSeek-V3."""

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")


def attend(
    q: Float[Array, "batch queries heads qk_dim"],
    pages: Float[Array, "pages page_size qk_dim"] | UInt8[Array, "pages page_size row_bytes"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = LATENT_DIM,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """The output and the log-sum-exp of each query's scores: 0 and -inf if it sees no key."""
    keys = gather(pages, page_table, lengths)
    if keys.dtype == jnp.uint8:
        keys = unpack_fp8(keys, q.dtype, v_dim=v_dim)
    return attend_rows(q, keys.astype(q.dtype), lengths, scale, v_dim=v_dim)


def attend_rows(
    q: Float[Array, "batch queries heads qk_dim"],
    keys: Float[Array, "batch tokens qk_dim"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = LATENT_DIM,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """The same of rows that lie side by side, finite ones from a request's length on."""
    queries, tokens = q.shape[1], jnp.arange(keys.shape[1])
    last = lengths[:, None] - queries + jnp.arange(queries)
    visible = (tokens <= last[..., None])[:, :, None]
    x = (scale * LOG2_E) * _product("bqhd,bkd->bqhk", q, keys)
    x = jnp.where(visible, x, -jnp.inf)
    largest = jnp.round(jnp.max(x, axis=-1, keepdims=True, initial=-jnp.inf))
    p = jnp.where(visible, jnp.exp2(x - largest), 0)
    total = jnp.sum(p, axis=-1, keepdims=True)
    mixed = _product("bqhk,bkv->bqhv", p.astype(q.dtype), keys[..., :v_dim])
    out = jnp.where(total > 0, mixed / total, 0).astype(q.dtype)
    return out, ((largest + jnp.log2(total)) / LOG2_E)[..., 0]


def gather(
    pages: Float[Array, "pages page_size row"] | UInt8[Array, "pages page_size row"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
) -> Float[Array, "batch tokens row"] | UInt8[Array, "batch tokens row"]:
    """Each request's rows in the order of its tokens, zeros from its length on.

    No entry of the table behind a request's last page is looked at.
    """
    (batch, max_pages), (_, page_size, row) = page_table.shape, pages.shape
    used = jnp.arange(max_pages) * page_size < lengths[:, None]
    rows = pages[jnp.where(used, page_table, 0)].reshape(batch, max_pages * page_size, row)
    cached = jnp.arange(max_pages * page_size) < lengths[:, None]
    return jnp.where(cached[..., None], rows, jnp.zeros((), pages.dtype))


def packed_bytes(qk_dim: int, v_dim: int = LATENT_DIM) -> int:
    """Of a token's row in 8 bits: 656 for 576. Its rotary values begin at `packed_bytes(v_dim)`."""
    return v_dim + 4 * -(-v_dim // BLOCK) + 2 * (qk_dim - v_dim)


def pack_fp8(
    latents: Float[Array, "*tokens qk_dim"], *, v_dim: int = LATENT_DIM
) -> UInt8[Array, "*tokens row_bytes"]:
    """Rows in 8 bits, latents quantised in tiles of 1x128 as `quantize` does."""
    rows = latents.reshape(-1, latents.shape[-1])
    values, scale = quantization.quantize(rows[:, :v_dim])
    parts = values, scale, rows[:, v_dim:].astype(jnp.bfloat16)
    packed = jnp.concatenate([_bytes_of(part) for part in parts], axis=-1)
    return packed.reshape(*latents.shape[:-1], packed.shape[-1])


def unpack_fp8(
    packed: UInt8[Array, "*tokens row_bytes"], dtype: DTypeLike, *, v_dim: int = LATENT_DIM
) -> Float[Array, "*tokens qk_dim"]:
    """value * scale in FP32, and the rotary values, in `dtype`: in FP32 exactly what is stored."""
    rows = packed.reshape(-1, packed.shape[-1])
    rope_start = packed_bytes(v_dim, v_dim)
    values = jax.lax.bitcast_convert_type(rows[:, :v_dim], E4M3)
    scale = _from_bytes(rows[:, v_dim:rope_start], jnp.float32)
    latents = quantization.dequantize(values, scale, dtype=dtype)
    rope = _from_bytes(rows[:, rope_start:], jnp.bfloat16).astype(dtype)
    unpacked = jnp.concatenate([latents, rope], axis=-1)
    return unpacked.reshape(*packed.shape[:-1], unpacked.shape[-1])


def _bytes_of(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(x: Array, dtype: DTypeLike) -> Array:
    width = jnp.dtype(dtype).itemsize
    return jax.lax.bitcast_convert_type(x.reshape(x.shape[0], x.shape[1] // width, width), dtype)
