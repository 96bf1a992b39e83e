"""Causal attention on Hopper, backward: a kernel for d_q and one for d_kv, built as the forward's.

    mla_prefill_dq     a tile of 128 queries stays, blocks of 64 keys pass by, in 3 stages
    mla_prefill_dkv    a tile of 128 keys stays, blocks of 32 queries pass by, in 4 stages

      warpgroup 2        TMA of what stays, for each tile; of what passes by, for each step
      24 registers

      warpgroups 0, 1    for each step of dq, [64, 64]: 64 queries of the tile, the block's keys
      240 registers        scores = q k, d_probs = d_out v       12 + 8 HGMMA 64 x 64 x 16
                           P = 2^(scores - lse), dS = P (d_probs - delta)
                           d_q [64, 192] += dS k                 4 HGMMA of 128 columns, 4 of 64
                         for each step of dkv, [64, 32]: 64 keys of the tile, the block's queries
                           scores = k q                          12 HGMMA 64 x 32 x 16
                           P = 2^(scores - lse)
                           d_probs = v d_out                     8 HGMMA 64 x 32 x 16
                           d_v [64, 128] += P d_out              2 x 2 HGMMA of 64 columns
                           dS = P (d_probs - delta)              under that
                           d_k [64, 192] += dS q                 3 x 2 HGMMA of 64 columns

The two warpgroups keep the forward's order, one multiplies while the other takes exponentials, but
wait for each other at the end of a tile. P and dS are rounded to BF16 and stay in registers, as
wgmma's left operand; sums stay in the accumulators. Every sum has one owner and one order, so
gradients are the same bit by bit in each run: no atomics. The price is that scores and d_probs are
computed twice, 18/13 of the products of a kernel that would add d_q up in memory. The rotary key's
gradient leaves in FP32 for each head, and is summed over heads outside.

The sums of dkv are 160 registers of a thread. With blocks of 64 queries ptxas spills, and puts its
wgmma one after the other.

Bound: the tensor core for dq, shared memory for dkv. For a step of one warpgroup, in cycles:

              tensor core                             shared memory              exp2
    dq        640 + 4 x 64 + 4 x 32 = 1,024           832 + 160 of TMA = 992     256
    dkv       12 x 16 + 8 x 16 + 10 x 32 = 640        640 + 81 of TMA = 721      128

Source: FlashAttention-2 (arXiv 2307.08691) §3.1.2 and algorithm 2.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_kernels.mla_prefill import tiles as sizes
from dsv3_kernels.mla_prefill.mosaic_sm90 import Plan, unsupported
from dsv3_kernels.mla_prefill.mosaic_sm90_dkv import d_kv_kernel
from dsv3_kernels.mla_prefill.mosaic_sm90_dq import d_q_kernel
from dsv3_kernels.mla_prefill.reference import LOG2_E
from dsv3_kernels.mla_prefill.tiles import Tiles


def gradients(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
) -> tuple[
    Float[Array, "batch seq heads qk_dim"],
    Float[Array, "batch seq heads kv_dim"],
    Float[Array, "batch seq rope_dim"],
]:
    """As `reference.gradients`. NotImplementedError: see `unsupported`."""
    if reason := unsupported(q, kv, k_rope):
        raise NotImplementedError(f"mla_prefill on Hopper: {reason}")
    operands = q, kv, k_rope, first_keys, lse, d_out, delta, scale
    return gradient_of_queries(*operands), *gradients_of_keys(*operands)


def gradient_of_queries(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
    *,
    tiles: Tiles = sizes.D_Q,
) -> Float[Array, "batch seq heads qk_dim"]:
    """That of q, by the first kernel."""
    plan = Plan.of(q, first_keys, scale, tiles)
    of_rows = plan.filled_up(lse * LOG2_E, delta, first_keys)
    return d_q_kernel(plan)(q, kv, k_rope, d_out, *of_rows)


def gradients_of_keys(
    q: Float[Array, "batch seq heads qk_dim"],
    kv: Float[Array, "batch seq heads kv_dim"],
    k_rope: Float[Array, "batch seq rope_dim"],
    first_keys: Int[Array, "batch seq"] | None,
    lse: Float[Array, "batch heads seq"],
    d_out: Float[Array, "batch seq heads v_dim"],
    delta: Float[Array, "batch heads seq"],
    scale: float,
    *,
    tiles: Tiles = sizes.D_KV,
) -> tuple[Float[Array, "batch seq heads kv_dim"], Float[Array, "batch seq rope_dim"]]:
    """Those of kv and k_rope, by the second kernel."""
    plan = Plan.of(q, first_keys, scale, tiles)
    end_queries = None if first_keys is None else _end_queries(first_keys)
    of_rows = plan.filled_up(lse * LOG2_E, delta, end_queries)
    d_kv, d_k_rope = d_kv_kernel(plan)(q, kv, k_rope, d_out, *of_rows)
    return d_kv, jnp.sum(d_k_rope[:, :, : plan.seq], axis=1).astype(k_rope.dtype)


def _end_queries(first_keys: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """The end of each token's document: the first key of the next."""
    seq = first_keys.shape[1]
    following = jnp.pad(first_keys[:, 1:], [(0, 0), (0, 1)], constant_values=seq)
    ends = jnp.where(following != first_keys, following, seq)
    return lax.cummin(ends, axis=1, reverse=True)
