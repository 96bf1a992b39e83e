"""Causal attention over an expanded latent: the definition, forward and backward, in plain jnp.

With c = scale * log2(e) and x = c (q k^T), over the keys that a query sees:

    m = round(max x)    p = 2^(x - m)    l = sum p    out = (p v) / l    lse = ln(2) (m + log2 l)

    P = 2^(x - log2(e) lse)    delta = sum(d_out * out) - d_lse    dS = P (d_out v^T - delta)
    d_v = P^T d_out    d_q = scale dS k    d_k = scale dS^T q    d_k_rope = its sum over heads

All in FP32, but p, P and dS are rounded to the inputs' dtype, where they are used. m is an integer,
so p is rounded alike whatever m is: the result does not depend on the order in which a kernel meets
the keys.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LOG2_E = math.log2(math.e)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32, precision="highest")


def attend(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    scale: float,
    *,
    chunks: int = 1,
) -> tuple[Float[Array, "batch seq heads v_dim"], Float[Array, "batch heads seq"]]:
    """The output and the log-sum-exp of each query's scores.

    A query sees the keys from its `first_keys`, or 0, to itself. Queries go in `chunks`, each
    against the keys up to its last: with many, little more than half of the square is computed.
    """
    q, k, v = _by_head(q, kv, k_rope)
    outputs, sums = [], []
    for start, stop in _spans(q.shape[2], chunks):
        x = _exponents(q[:, :, start:stop], k[:, :, :stop], first_keys, start, scale)
        largest = jnp.round(jnp.max(x, axis=-1, keepdims=True))
        p = jnp.exp2(x - largest)
        total = jnp.sum(p, axis=-1, keepdims=True)
        mixed = _product("bhqk,bhkv->bhqv", p.astype(v.dtype), v[:, :, :stop])
        outputs.append((mixed / total).astype(v.dtype))
        sums.append(((largest + jnp.log2(total)) / LOG2_E)[..., 0])
    return jnp.swapaxes(jnp.concatenate(outputs, axis=2), 1, 2), jnp.concatenate(sums, axis=2)


def gradients(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
    *,
    chunks: int = 1,
) -> tuple[
    Float[Array, "batch seq heads qk_dim"],
    Float[Array, "batch seq heads kv_dim"],
    Float[Array, "batch seq rope_dim"],
]:
    """Those of q, kv and k_rope, from what `attend` gave and `delta`."""
    q, k, v = _by_head(q, kv, k_rope)
    d_out = jnp.swapaxes(d_out, 1, 2)
    d_q, d_k, d_v = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _spans(q.shape[2], chunks):
        rows, keys = slice(start, stop), slice(0, stop)
        x = _exponents(q[:, :, rows], k[:, :, keys], first_keys, start, scale)
        probs = jnp.exp2(x - LOG2_E * lse[:, :, rows, None]).astype(v.dtype)
        d_probs = _product("bhqv,bhkv->bhqk", d_out[:, :, rows], v[:, :, keys])
        d_scores = probs.astype(jnp.float32) * (d_probs - delta[:, :, rows, None])
        d_scores = d_scores.astype(q.dtype)
        d_q.append((scale * _product("bhqk,bhkd->bhqd", d_scores, k[:, :, keys])).astype(q.dtype))
        d_k = d_k.at[:, :, keys].add(_product("bhqk,bhqd->bhkd", d_scores, q[:, :, rows]))
        d_v = d_v.at[:, :, keys].add(_product("bhqk,bhqv->bhkv", probs, d_out[:, :, rows]))
    nope_dim = k.shape[-1] - k_rope.shape[-1]
    d_kv = jnp.concatenate([scale * d_k[..., :nope_dim], d_v], axis=-1).astype(kv.dtype)
    d_k_rope = scale * jnp.sum(d_k[..., nope_dim:], axis=1)
    d_q = jnp.concatenate(d_q, axis=2)
    return jnp.swapaxes(d_q, 1, 2), jnp.swapaxes(d_kv, 1, 2), d_k_rope.astype(k_rope.dtype)


def first_keys_of(documents: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Where each token's document begins, after the last change of id: [0, 0, 2] of [4, 4, 9]."""
    positions = jnp.arange(documents.shape[1], dtype=jnp.int32)
    changes = documents != jnp.roll(documents, 1, axis=1)
    return jax.lax.cummax(jnp.where(changes, positions, 0).at[:, 0].set(0), axis=1)


def _by_head(q: Array, kv: Array, k_rope: Array) -> tuple[Array, Array, Array]:
    """q, k and v as [batch, heads, seq, ...], the rotary key in every head's k."""
    q, kv = jnp.swapaxes(q, 1, 2), jnp.swapaxes(kv, 1, 2)
    nope_dim = q.shape[-1] - k_rope.shape[-1]
    k_rope = jnp.broadcast_to(k_rope[:, None], (*q.shape[:3], k_rope.shape[-1]))
    return q, jnp.concatenate([kv[..., :nope_dim], k_rope], axis=-1), kv[..., nope_dim:]


def _exponents(q: Array, k: Array, first_keys: Array | None, start: int, scale: float) -> Array:
    """x [batch, heads, queries, keys] of queries from `start` on, -inf for keys unseen."""
    x = (scale * LOG2_E) * _product("bhqd,bhkd->bhqk", q, k)
    queries, keys = jnp.arange(start, start + q.shape[2])[:, None], jnp.arange(k.shape[2])
    visible = keys <= queries
    if first_keys is not None:
        from_first = keys >= first_keys[:, start : start + q.shape[2], None]
        visible = visible & from_first[:, None]
    return jnp.where(visible, x, -jnp.inf)


def _spans(seq: int, chunks: int) -> list[tuple[int, int]]:
    size = -(-seq // chunks)
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]
