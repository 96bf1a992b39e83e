"""Attention of decoding over the paged latent cache: the contract and the choice of implementation.

q           [batch, queries, heads, qk_dim]    absorbed: of each head [q_nope W_UK ; q_rope]
pages       [pages, page_size, qk_dim]         of each token [latent ; rotary key], or
            [pages, page_size, row_bytes]      uint8: the same in 8 bits, see `pack_fp8`; computed
                                               with in q's dtype, whatever the pages have
page_table  [batch, max_pages]                 token t is in page page_table[b, t // page_size]
lengths     [batch]                            tokens cached, with those of the queries

Of the 671B model: qk_dim is 576 = 512 + 64, row_bytes 656; the kernel's page_size is 64. Query i of
`queries` (more than one if tokens are guessed ahead) sees the keys 0 ... length - queries + i. A
length may be 0, for a slot without a request, and less than `queries`. A table's entries behind a
request's last page may be anything.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from dsv3_kernels import choice
from dsv3_kernels.mla_decode import reference, xla
from dsv3_kernels.mla_decode.reference import LATENT_DIM, pack_fp8, packed_bytes, unpack_fp8
from dsv3_kernels.mla_decode.tiles import BLOCK as PAGE_SIZE

__all__ = ["PAGE_SIZE", "mla_decode", "mla_decode_rows", "pack_fp8", "packed_bytes", "unpack_fp8"]
IMPLEMENTATIONS = ("reference", "xla", "mosaic")
ROWS_IMPLEMENTATIONS = ("reference", "mosaic")


# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.5 s.


@partial(jax.jit, static_argnames=("scale", "v_dim", "splits", "implementation"))
def mla_decode(
    q: Float[Array, "batch queries heads qk_dim"],
    pages: Float[Array, "pages page_size qk_dim"] | UInt8[Array, "pages page_size row_bytes"],
    page_table: Int[Array, "batch max_pages"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = LATENT_DIM,
    splits: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """softmax(scale * q k^T) v over the keys a query sees, and the log-sum-exp in FP32.

    0 and -inf where it sees none. No gradient. `splits` is how many parts of equal work the kernel
    cuts all requests' keys into; None: as many as run at once.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `xla`, which reads no further than the longest request. Raises ValueError for an unknown
    implementation and for shapes that do not fit, NotImplementedError for a case that the named
    implementation lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _check(q, pages, page_table, lengths, scale, v_dim, splits)
    operands = q, pages, page_table, lengths
    options = dict(scale=scale, v_dim=v_dim)
    return choice.run(
        "mla_decode",
        implementation,
        operands,
        kernel=lambda: partial(_mosaic().attend, splits=splits, **options),
        unsupported=lambda: _mosaic().unsupported(q, pages, page_table, v_dim),
        plain=partial((reference if implementation == "reference" else xla).attend, **options),
        plain_name="xla",
    )


@partial(jax.jit, static_argnames=("scale", "v_dim", "implementation"))
def mla_decode_rows(
    q: Float[Array, "batch queries heads qk_dim"],
    cache: Float[Array, "batch tokens qk_dim"],
    lengths: Int[Array, " batch"],
    scale: float,
    *,
    v_dim: int = LATENT_DIM,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch queries heads v_dim"], Float[Array, "batch queries heads"]]:
    """`mla_decode` over a cache in which each request's tokens lie side by side.

    To the kernel that is a cache of pages in their order, if it has a multiple of `PAGE_SIZE`
    tokens. None chooses as above, but `reference` in place of `xla`; raises as above.
    """
    choice.require_known(implementation, ROWS_IMPLEMENTATIONS)
    batch, tokens, qk_dim = cache.shape
    if batch != q.shape[0]:
        raise ValueError(f"cache is {list(cache.shape)}, expected [{q.shape[0]}, ...] as q has")

    def in_pages(cache):
        table = jnp.arange(batch * tokens // PAGE_SIZE, dtype=jnp.int32).reshape(batch, -1)
        return cache.reshape(-1, PAGE_SIZE, qk_dim), table

    def kernel(q, cache, lengths):
        return _mosaic().attend(q, *in_pages(cache), lengths, scale=scale, v_dim=v_dim)

    def unsupported() -> str:
        if tokens % PAGE_SIZE:
            return f"cache has {tokens} tokens, expected a multiple of {PAGE_SIZE}"
        return _mosaic().unsupported(q, *in_pages(cache), v_dim)

    def named():
        if reason := unsupported():
            raise NotImplementedError(f"mla_decode on Hopper: {reason}")
        return kernel

    return choice.run(
        "mla_decode",
        implementation,
        (q, cache, lengths),
        kernel=named,
        unsupported=unsupported,
        plain=partial(reference.attend_rows, scale=scale, v_dim=v_dim),
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second."""
    return importlib.import_module("dsv3_kernels.mla_decode.mosaic_sm90")


def _check(
    q: Array,
    pages: Array,
    page_table: Array,
    lengths: Array,
    scale: float,
    v_dim: int,
    splits: int | None,
) -> None:
    batch, _, _, qk_dim = q.shape
    if not 0 < v_dim <= qk_dim:
        raise ValueError(f"v_dim is {v_dim}, expected 1 to {qk_dim}, the qk_dim of q")
    is_packed = pages.dtype == jnp.uint8
    if not is_packed and not jnp.issubdtype(pages.dtype, jnp.floating):
        raise ValueError(f"pages is {pages.dtype}, expected floating point, or uint8")
    row = packed_bytes(qk_dim, v_dim) if is_packed else qk_dim
    if pages.shape[-1] != row:
        expected = f"[pages, page_size, {row}] as q is {list(q.shape)} and v_dim {v_dim}"
        raise ValueError(f"pages is {list(pages.shape)}, expected {expected}")
    if page_table.shape[0] != batch or lengths.shape != (batch,):
        found = f"page_table is {list(page_table.shape)} and lengths {list(lengths.shape)}"
        raise ValueError(f"{found}, expected [{batch}, max_pages] and [{batch}]")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected over 0")
    if splits is not None and splits < 1:
        raise ValueError(f"splits is {splits}, expected at least 1")
