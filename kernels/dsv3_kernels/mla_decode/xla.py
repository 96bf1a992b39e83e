"""Attention over a paged latent cache for CPU: blocks of keys, as many as the longest request has.

The reference gathers every request's whole table, whatever its length. Here a loop whose length is
known on the device gathers `BLOCK` tokens of each request at a time, with the running maximum and
sum of flash attention. The maximum is an integer power of two, as the reference's is, so a block
that a request does not reach changes no bit of its result: it does not depend on the others.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dsv3_kernels.mla_decode.reference import LATENT_DIM, LOG2_E, gather, unpack_fp8

BLOCK = 256
"""Tokens of a block, or one page if that is larger."""

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
    block_pages = min(max(1, BLOCK // page_size), page_table.shape[1])
    block = block_pages * page_size
    page_table = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % block_pages)))
    last = lengths[:, None] - queries + jnp.arange(queries, dtype=lengths.dtype)

    def add_block(index, carry):
        largest, total, mixed = carry
        table = jax.lax.dynamic_slice_in_dim(page_table, index * block_pages, block_pages, 1)
        first = (index * block).astype(lengths.dtype)
        keys = gather(pages, table, lengths - first)
        if keys.dtype == jnp.uint8:
            keys = unpack_fp8(keys, q.dtype, v_dim=v_dim)
        keys = keys.astype(q.dtype)
        tokens = first + jnp.arange(block, dtype=lengths.dtype)
        visible = (tokens <= last[..., None])[:, :, None]
        x = (scale * LOG2_E) * _product("bqhd,bkd->bqhk", q, keys)
        x = jnp.where(visible, x, -jnp.inf)
        highest = jnp.maximum(largest, jnp.round(jnp.max(x, axis=-1, keepdims=True)))
        p = jnp.where(visible, jnp.exp2(x - highest), 0)
        shrink = jnp.where(jnp.isneginf(largest), 0, jnp.exp2(largest - highest))
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        of_block = _product("bqhk,bkv->bqhv", p.astype(q.dtype), keys[..., :v_dim])
        return highest, total, mixed * shrink + of_block

    column = jnp.zeros((batch, queries, heads, 1), jnp.float32)
    start = column - jnp.inf, column, jnp.zeros((batch, queries, heads, v_dim), jnp.float32)
    blocks = -(-jnp.max(lengths, initial=0) // block)
    largest, total, mixed = jax.lax.fori_loop(0, blocks, add_block, start)
    out = jnp.where(total > 0, mixed / total, 0).astype(q.dtype)
    return out, ((largest + jnp.log2(total)) / LOG2_E)[..., 0]
