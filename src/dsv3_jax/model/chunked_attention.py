"""Attention of a prompt's chunk to itself, and to all of the prompt before it in the paged cache.

To itself it is training's causal attention. Blocks of what is cached before are expanded to keys
and values one at a time, as many as the longest request has, with flash attention's running maximum
and sum: no array is as long as the prompt. Expanding a key costs as much as some 170 queries save
by it (DeepSeek-V3: 33.5 MFLOP a key, 0.2 a pair), so shorter chunks attend in the absorbed form
(attention.py).
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.model.cache import NewTokens, Pool, gather_block, unpacked
from dsv3_kernels.mla_prefill.op import mla_prefill

LOG2_E = math.log2(math.e)
BLOCK = 256
"""Cached tokens that are expanded at a time, or one page if that is larger."""
_product = partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_to_prompt(
    q: Float[Array, "batch queries heads qk_dim"],
    latents: Float[Array, "batch queries latent"],
    expand: Callable[[Array], Array],
    pool: Pool,
    new: NewTokens,
    *,
    scale: float,
    latent_dim: int,
) -> Float[Array, "batch queries heads v_dim"]:
    """softmax(scale * q k^T) v over the tokens up to each query's own.

    `latents` are the queries' own, as the cache has them. `new.table` has the pages as the pool
    counts them, its layer's first page added. `expand` makes [batch, tokens, heads, nope + v_dim],
    keys then values, of latents without their rotary part.
    """
    rope = latents[..., latent_dim:]
    out, lse = mla_prefill(q, expand(latents[..., :latent_dim]), rope, scale)
    page_size, nope = pool.shape[1], q.shape[-1] - rope.shape[-1]
    block_pages = min(max(1, BLOCK // page_size), new.table.shape[1])
    block = block_pages * page_size
    table = jnp.pad(new.table, ((0, 0), (0, -new.table.shape[1] % block_pages)))
    before = jnp.where(new.valid[:, 0], new.positions[:, 0], 0)

    def add_block(index, carry):
        largest, total, mixed = carry
        pages = jax.lax.dynamic_slice_in_dim(table, index * block_pages, block_pages, 1)
        rows = unpacked(gather_block(pool, pages), q.dtype, latent_dim)
        keys_values = expand(rows[..., :latent_dim])
        x = _product("bqhn,bkhn->bhqk", q[..., :nope], keys_values[..., :nope])
        x += _product("bqhr,bkr->bhqk", q[..., nope:], rows[..., latent_dim:])
        tokens = index * block + jnp.arange(block, dtype=index.dtype)
        visible = tokens < before[:, None, None, None]
        x = jnp.where(visible, (scale * LOG2_E) * x, -jnp.inf)
        highest = jnp.maximum(largest, jnp.round(jnp.max(x, axis=-1, keepdims=True)))
        p = jnp.where(visible, jnp.exp2(x - highest), 0)
        shrink = jnp.exp2(largest - highest)
        total = total * shrink + jnp.sum(p, axis=-1, keepdims=True)
        of_block = _product("bhqk,bkhv->bhqv", p.astype(rows.dtype), keys_values[..., nope:])
        return highest, total, mixed * shrink + of_block

    # The chunk's own part is the first block, of which the sum is known by its logarithm.
    log2_sum = LOG2_E * lse[..., None]
    largest = jnp.round(log2_sum)
    total = jnp.exp2(log2_sum - largest)
    start = largest, total, total * jnp.swapaxes(out, 1, 2).astype(jnp.float32)
    blocks = -(-jnp.max(before) // block)
    _, total, mixed = jax.lax.fori_loop(0, blocks, add_block, start)
    return jnp.swapaxes(mixed / total, 1, 2).astype(q.dtype)
