"""Causal attention of training and prefill: the contract and the choice of implementation.

q       [batch, seq, heads, qk_dim]     of each head [q_nope ; q_rope], as q_b_proj's features are
kv      [batch, seq, heads, kv_dim]     of each head [k_nope ; v], as kv_b_proj's features are
k_rope  [batch, seq, rope_dim]          the rotary key, one for all heads

k = [k_nope ; k_rope], so k_nope has qk_dim - rope_dim values, and v the rest of kv_dim. Of the 671B
model: 192 = 128 + 64, and 256 = 128 + 128. What goes in and out are the projections' rows, heads
side by side, and so is every gradient: nothing is transposed, and the rotary key never repeated.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels import choice
from dsv3_kernels.mla_prefill import reference

IMPLEMENTATIONS = ("reference", "xla", "mosaic")
QUERY_CHUNK = 64
"""Fewest queries of a chunk of `xla`."""
MAX_QUERY_CHUNKS = 8


# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.5 s.


@partial(jax.jit, static_argnames=("scale", "implementation"))
def mla_prefill(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    scale: float,
    documents: Int[Array, "batch seq"] | None = None,
    *,
    implementation: str | None = None,
) -> tuple[Float[Array, "batch seq heads v_dim"], Float[Array, "batch heads seq"]]:
    """softmax(scale * q k^T) v over the keys at or before each query, and the log-sum-exp in FP32.

    With `documents`, a query sees only keys back to the last change of id: a document's tokens
    stand side by side. Differentiable in q, kv and k_rope, by both results; backward recomputes.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `xla`: `reference` in chunks of queries. Raises ValueError for an unknown implementation and for
    shapes that do not fit, NotImplementedError for a case that the named implementation lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    _check(q, kv, k_rope, scale, documents)
    if implementation == "mosaic" and (reason := _mosaic().unsupported(q, kv, k_rope)):
        raise NotImplementedError(f"mla_prefill on Hopper: {reason}")
    first_keys = None if documents is None else reference.first_keys_of(documents)
    return _attention(q, kv, k_rope, first_keys, scale, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, kv, k_rope, first_keys, scale: float, implementation: str | None):
    def on_mosaic(*operands):
        return _mosaic().attend(*operands, scale)

    def plain(chunks: int):
        return partial(reference.attend, scale=scale, chunks=chunks)

    return _chosen((q, kv, k_rope, first_keys), implementation, on_mosaic, plain)


def _forward(q, kv, k_rope, first_keys, scale: float, implementation: str | None):
    out, lse = _attention(q, kv, k_rope, first_keys, scale, implementation)
    return (out, lse), (q, kv, k_rope, first_keys, out, lse)


def _backward(scale: float, implementation: str | None, residuals, cotangents):
    *inputs, out, lse = residuals
    d_out, d_lse = cotangents
    products = d_out.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.swapaxes(jnp.sum(products, axis=-1), 1, 2) - d_lse

    def on_mosaic(*operands):
        return _mosaic("_backward").gradients(*operands, scale)

    def plain(chunks: int):
        return partial(reference.gradients, scale=scale, chunks=chunks)

    operands = (*inputs, lse, d_out, delta)
    return *_chosen(operands, implementation, on_mosaic, plain), None


_attention.defvjp(_forward, _backward)


def with_gradients(
    out: Float[Array, "batch seq heads v_dim"],
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    kept: Float[Array, "batch seq heads v_dim"],
    lse: Float[Array, "batch heads seq"],
    scale: float,
    documents: Int[Array, "batch seq"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "batch seq heads v_dim"]:
    """`out`, with the gradients that `mla_prefill` has in q, kv and k_rope.

    For who keeps attention's results, so that backward need not make them again: `kept` is `out`
    as it waited for backward, which may have rounded it. Chosen and raised as above.

    >>> out, lse = mla_prefill(*jax.lax.stop_gradient((q, kv, k_rope)), scale)
    >>> out = with_gradients(out, q, kv, k_rope, out, lse, scale)
    """
    _check(q, kv, k_rope, scale, documents)
    first_keys = None if documents is None else reference.first_keys_of(documents)
    return _from_kept(out, q, kv, k_rope, first_keys, kept, lse, scale, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _from_kept(out, q, kv, k_rope, first_keys, kept, lse, scale, implementation):
    del q, kv, k_rope, first_keys, kept, lse, scale, implementation
    return out


def _from_kept_forward(out, q, kv, k_rope, first_keys, kept, lse, scale, implementation):
    del scale, implementation
    return out, (q, kv, k_rope, first_keys, kept, lse)


def _from_kept_backward(scale, implementation, residuals, d_out):
    lse = residuals[-1]
    gradients = _backward(scale, implementation, residuals, (d_out, jnp.zeros_like(lse)))
    return None, *gradients, None, None


_from_kept.defvjp(_from_kept_forward, _from_kept_backward)


def _chosen(operands: tuple, implementation: str | None, on_mosaic, plain):
    """`on_mosaic` or `plain(chunks)` of `operands`, which begin with q, kv and k_rope."""
    if implementation == "reference":
        return plain(1)(*operands)
    seq = operands[0].shape[1]
    return choice.run(
        "mla_prefill",
        implementation,
        operands,
        kernel=lambda: on_mosaic,
        unsupported=lambda: _mosaic().unsupported(*operands[:3]),
        plain=plain(max(1, min(MAX_QUERY_CHUNKS, seq // QUERY_CHUNK))),
        plain_name="xla",
    )


def _mosaic(direction: str = "") -> Any:
    """Loaded when first asked for: it takes a second."""
    return importlib.import_module(f"dsv3_kernels.mla_prefill.mosaic_sm90{direction}")


def _check(q: Array, kv: Array, k_rope: Array, scale: float, documents: Array | None) -> None:
    if not kv.dtype == k_rope.dtype == q.dtype:
        found = f"{q.dtype}, {kv.dtype} and {k_rope.dtype}"
        raise ValueError(f"q, kv and k_rope are {found}, expected one dtype")
    if kv.shape[:3] != q.shape[:3]:
        expected = f"[{', '.join(map(str, q.shape[:3]))}, kv_dim] as q is {list(q.shape)}"
        raise ValueError(f"kv is {list(kv.shape)}, expected {expected}")
    if k_rope.shape[:2] != q.shape[:2] or k_rope.shape[-1] > q.shape[-1]:
        expected = f"[{q.shape[0]}, {q.shape[1]}, at most {q.shape[-1]}]"
        raise ValueError(f"k_rope is {list(k_rope.shape)}, expected {expected}")
    nope_dim = q.shape[-1] - k_rope.shape[-1]
    if kv.shape[-1] <= nope_dim:
        raise ValueError(f"kv_dim is {kv.shape[-1]}, expected over {nope_dim}, those of k_nope")
    if documents is not None and documents.shape != q.shape[:2]:
        raise ValueError(f"documents is {list(documents.shape)}, expected {list(q.shape[:2])}")
    if not scale > 0:
        raise ValueError(f"scale is {scale}, expected over 0")
