"""Attention of a prompt's chunk to all of the prompt so far, which is in the paged cache.

Blocks of the cache are expanded to keys and values one at a time, as many as the longest request
has, with flash attention's running maximum and sum: no array is as long as the prompt. Expanding a
key costs as much as some 170 queries save by it (DeepSeek-V3: 33.5 MFLOP a key, 0.2 a pair), so
shorter chunks attend in the absorbed form (attention.py).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.model.cache import NewTokens, Pool, gather_block
from dsv3_kernels.mla_decode.op import unpack_fp8

BLOCK = 256
"""Cached tokens that are expanded at a time, or one page if that is larger."""
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_to_cache(
    q_nope: Float[Array, "batch queries heads nope"],
    q_rope: Float[Array, "batch queries heads rope"],
    expand: Callable[[Array], Array],
    pool: Pool,
    new: NewTokens,
    *,
    scale: float,
    latent_dim: int,
) -> Float[Array, "batch queries heads v_dim"]:
    """softmax(scale * q k^T) v over the cached tokens up to each query's own.

    `new.table` has the pages as the pool counts them, its layer's first page added. `expand` makes
    [batch, tokens, heads, nope + v_dim], keys then values, of latents.
    """
    page_size, (batch, queries, heads, nope) = pool.shape[1], q_nope.shape
    block_pages = min(max(1, BLOCK // page_size), new.table.shape[1])
    block = block_pages * page_size
    table = jnp.pad(new.table, ((0, 0), (0, -new.table.shape[1] % block_pages)))
    latent = jax.ShapeDtypeStruct((batch, block, latent_dim), q_nope.dtype)
    v_dim = jax.eval_shape(expand, latent).shape[-1] - nope

    def add_block(index, carry):
        largest, total, mixed = carry
        pages = jax.lax.dynamic_slice_in_dim(table, index * block_pages, block_pages, 1)
        rows = gather_block(pool, pages)
        if rows.dtype == jnp.uint8:
            rows = unpack_fp8(rows, q_nope.dtype, v_dim=latent_dim)
        rows = rows.astype(q_nope.dtype)
        keys_values = expand(rows[..., :latent_dim])
        x = _product("bqhn,bkhn->bhqk", q_nope, keys_values[..., :nope])
        x += _product("bqhr,bkr->bhqk", q_rope, rows[..., latent_dim:])
        tokens = index * block + jnp.arange(block, dtype=index.dtype)
        visible = tokens <= new.positions[:, None, :, None]
        x = jnp.where(visible, (scale * math.log2(math.e)) * x, -jnp.inf)
        highest = jnp.maximum(largest, jnp.round(jnp.max(x, axis=-1, keepdims=True)))
        p = jnp.where(visible, jnp.exp2(x - highest), 0)
        shrink = jnp.where(jnp.isneginf(largest), 0, jnp.exp2(largest - highest))
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        of_block = _product("bhqk,bkhv->bhqv", p.astype(rows.dtype), keys_values[..., nope:])
        return highest, total, mixed * shrink + of_block

    column = jnp.zeros((batch, heads, queries, 1), jnp.float32)
    start = column - jnp.inf, column, jnp.zeros((batch, heads, queries, v_dim), jnp.float32)
    blocks = -(-jnp.max(new.lengths) // block)
    _, total, mixed = jax.lax.fori_loop(0, blocks, add_block, start)
    out = jnp.where(total > 0, mixed / total, 0)
    return jnp.swapaxes(out, 1, 2).astype(q_nope.dtype)
