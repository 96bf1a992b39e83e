"""Attention over a paged latent cache for CPU: blocks of keys, as many as the longest request has.

The reference gathers every request's whole table, whatever its length. Here a loop whose length is
known on the device gathers a block of tokens of each request at a time, with the running maximum
and sum of flash attention. The maximum is an integer power of two, as the reference's is, so a
block that a request does not reach changes no bit of its result: it does not depend on the others.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dsv3_kernels.mla_decode.reference import LATENT_DIM, LOG2_E, unpack_fp8

BLOCK = 256
"""Tokens of a block at most, or one page if that is larger."""
GATHERED = 2048
"""Tokens of all requests that a block has at most: what many short ones have beyond their ends is
work for nothing, and what is gathered should stay in the cache (docs/LOG.md, 2026-11-26)."""

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend(
    q: Float[Array, "batch queries heads qk_dim"],
    pages: Float[Array, "pages page_size qk_dim"] | UInt8[Array, "pages page_size row_bytes"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = LATENT_DIM,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """As `reference.attend`."""
    page_size, (batch, queries, heads, _) = pages.shape[1], q.shape
    most = min(BLOCK, GATHERED // max(batch, 1))
    block_pages = min(max(1, most // page_size), page_table.shape[1])
    block = block_pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    last = lengths[:, None] - queries + jnp.arange(queries, dtype=lengths.dtype)

    def add_block(index, carry):
        largest, total, mixed = carry
        table = jax.lax.dynamic_slice_in_dim(page_table, index * block_pages, block_pages, 1)
        first = (index * block).astype(lengths.dtype)
        tokens = first + jnp.arange(block, dtype=lengths.dtype)
        is_cached = tokens < lengths[:, None]
        # Pages behind a request's last one, whose numbers may be anything, are read as page 0.
        rows = pages[jnp.where(is_cached[:, ::page_size], table, 0)]
        keys = rows.reshape(batch, block, rows.shape[-1])
        if keys.dtype == jnp.uint8:
            keys = unpack_fp8(keys, q.dtype, v_dim=v_dim)
        keys = keys.astype(q.dtype)
        visible = (tokens <= last[..., None])[:, :, None]
        x = (scale * LOG2_E) * _product("bqhd,bkd->bqhk", q, keys)
        x = jnp.where(visible, x, -jnp.inf)
        highest = jnp.maximum(largest, jnp.round(jnp.max(x, axis=-1, keepdims=True)))
        p = jnp.where(visible, jnp.exp2(x - highest), 0)
        shrink = jnp.where(jnp.isneginf(largest), 0, jnp.exp2(largest - highest))
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        # Another request's NaN times 0 would be NaN; of the keys' products `visible` lets none by.
        values = jnp.where(is_cached[..., None], keys[..., :v_dim], 0)
        of_block = _product("bqhk,bkv->bqhv", p.astype(q.dtype), values)
        return highest, total, mixed * shrink + of_block

    column = jnp.zeros((batch, queries, heads, 1), jnp.float32)
    start = column - jnp.inf, column, jnp.zeros((batch, queries, heads, v_dim), jnp.float32)
    blocks = -(-jnp.max(lengths, initial=0) // block)
    largest, total, mixed = jax.lax.fori_loop(0, blocks, add_block, start)
    out = jnp.where(total > 0, mixed / total, 0).astype(q.dtype)
    return out, ((largest + jnp.log2(total)) / LOG2_E)[..., 0]
