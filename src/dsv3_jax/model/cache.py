"""The paged latent cache: what lies where, and how new tokens are written into it.

One array holds the pages of all layers: page p of layer l is at l * pages + p, so a program that
scans the layers updates it in place. A token's row is its latent and rotary key in the model's
dtype, or 8 bits a value (`dsv3_kernels.mla_decode`: 656 bytes instead of 1,152 for DeepSeek-V3).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from dsv3_jax.config import ModelConfig
from dsv3_kernels.mla_decode.op import pack_fp8, packed_bytes, unpack_fp8

Pool = Float[Array, "layer_pages page_size latent"] | UInt8[Array, "layer_pages page_size bytes"]
CACHE_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp8": jnp.uint8}
"""By `serve.cache_dtype`."""


class NewTokens(NamedTuple):
    """Tokens of some requests that follow one another from a position on."""

    positions: Int[Array, "batch queries"]
    valid: Bool[Array, "batch queries"]
    """False for what only fills the shape: not written, not sent to experts, its output unused."""
    table: Int[Array, "batch max_pages"]
    """Of each request, the pages of its tokens in order."""

    @property
    def lengths(self) -> Int[Array, " batch"]:
        """Tokens cached once these are; 0 where none is valid."""
        return jnp.where(self.valid[:, 0], self.positions[:, -1] + 1, 0)


def row_shape(config: ModelConfig, cache_dtype: str) -> tuple[int, jnp.dtype]:
    """Values of one token's row, and their dtype."""
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    if cache_dtype == "fp8":
        latent = packed_bytes(latent, config.kv_lora_rank)
    return latent, jnp.dtype(CACHE_DTYPES[cache_dtype])


def row_bytes(config: ModelConfig, cache_dtype: str) -> int:
    """Bytes of a token in one layer: of DeepSeek-V3 1,152 in bf16, 656 in fp8."""
    values, dtype = row_shape(config, cache_dtype)
    return values * dtype.itemsize


def empty_pool(
    config: ModelConfig, cache_dtype: str, layers: int, pages: int, page_size: int
) -> Pool:
    """Pages of zeros for `layers` layers."""
    values, dtype = row_shape(config, cache_dtype)
    return jnp.zeros((layers * pages, page_size, values), dtype)


def write(
    pool: Pool,
    latents: Float[Array, "batch queries latent"],
    new: NewTokens,
    first_page: Int[Array, ""] | int,
    latent_dim: int,
) -> Pool:
    """The pool with the latents of the valid tokens in a layer's pages, from `first_page` on."""
    page_size = pool.shape[1]
    page = jnp.take_along_axis(new.table, new.positions // page_size, axis=1, mode="clip")
    page = jnp.where(new.valid, page + first_page, pool.shape[0])  # beyond the end: dropped
    rows = packed(latents, pool.dtype, latent_dim)
    return pool.at[page, new.positions % page_size].set(rows, mode="drop")


def packed(
    latents: Float[Array, "batch tokens latent"], dtype: DTypeLike, latent_dim: int
) -> Float[Array, "batch tokens latent"] | UInt8[Array, "batch tokens bytes"]:
    """Latents as a pool of that dtype has them."""
    if dtype == jnp.uint8:
        return pack_fp8(latents, v_dim=latent_dim)
    return latents.astype(dtype)


def unpacked(
    rows: Float[Array, "batch tokens latent"] | UInt8[Array, "batch tokens bytes"],
    dtype: DTypeLike,
    latent_dim: int,
) -> Float[Array, "batch tokens latent"]:
    """The latents of a pool's rows."""
    if rows.dtype == jnp.uint8:
        return unpack_fp8(rows, dtype, v_dim=latent_dim)
    return rows.astype(dtype)


def copy_pages(
    pool: Pool, source: Int[Array, " copies"], target: Int[Array, " copies"], layers: int
) -> Pool:
    """Copies whole pages in every layer; a target beyond the pages of a layer copies nothing."""
    pages = pool.shape[0] // layers
    first = jnp.arange(layers, dtype=source.dtype)[:, None] * pages
    places = jnp.where(target < pages, first + target, pool.shape[0])
    return pool.at[places].set(pool[first + jnp.clip(source, 0, pages - 1)], mode="drop")


def read_pages(
    pool: Pool, pages: Int[Array, " count"], layers: int
) -> Float[Array, "layers count page_size latent"] | UInt8[Array, "layers count page_size bytes"]:
    """The content of pages in every layer."""
    first = jnp.arange(layers, dtype=pages.dtype)[:, None] * (pool.shape[0] // layers)
    return pool[first + pages]


def write_pages(
    pool: Pool,
    pages: Int[Array, " count"],
    content: Float[Array, "layers count page_size latent"]
    | UInt8[Array, "layers count page_size bytes"],
) -> Pool:
    """The pool with that content; a page beyond those of a layer is left out."""
    layers = content.shape[0]
    per_layer = pool.shape[0] // layers
    first = jnp.arange(layers, dtype=pages.dtype)[:, None] * per_layer
    places = jnp.where(pages < per_layer, first + pages, pool.shape[0])
    return pool.at[places].set(content, mode="drop")


def gather_block(
    pool: Pool, table: Int[Array, "batch block_pages"]
) -> Float[Array, "batch tokens latent"] | UInt8[Array, "batch tokens bytes"]:
    """The rows of some pages, side by side."""
    batch, count = table.shape
    rows = pool[jnp.clip(table, 0, pool.shape[0] - 1)]
    return rows.reshape(batch, count * pool.shape[1], pool.shape[2])
