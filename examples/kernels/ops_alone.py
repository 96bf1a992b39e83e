"""The kernels without dsv3_jax: FP8 experts of ragged groups, attention over packed documents.

    python examples/kernels/ops_alone.py

On a Hopper GPU the Mosaic kernels run, elsewhere plain XLA: the logger `dsv3_kernels` says which.
"""

import logging

import jax
import jax.numpy as jnp

from dsv3_kernels.grouped_gemm.op import ragged_rows
from dsv3_kernels.mla_prefill.op import mla_prefill
from dsv3_kernels.quantize.op import BLOCK, quantize

EXPERTS, ROWS, HIDDEN, WIDTH = 4, 512, 512, 256
SEQ, HEADS = 256, 4


def fp8_experts(key: jax.Array) -> float:
    """Relative error of FP8 products of rows that are sorted by expert, one expert without any."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (ROWS, HIDDEN), jnp.bfloat16)
    weights = jax.random.normal(keys[1], (EXPERTS, WIDTH, HIDDEN), jnp.bfloat16)
    group_sizes = jnp.asarray([200, 0, 1, 311])
    (x8, x_scale), (w8, w_scale) = quantize(x), quantize(weights, (BLOCK, BLOCK))
    y = ragged_rows(x8, w8, group_sizes, jnp.float32, scales=(x_scale, w_scale))
    expert = jnp.repeat(jnp.arange(EXPERTS), group_sizes, total_repeat_length=ROWS)
    x, weights = x.astype(jnp.float32), weights.astype(jnp.float32)
    exact = jnp.einsum("rk,rnk->rn", x, weights[expert], precision="highest")
    return float(jnp.linalg.norm(y - exact) / jnp.linalg.norm(exact))


def packed_attention(key: jax.Array) -> float:
    """How much a query of the second document changes with a key of the first: not at all."""
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (1, SEQ, HEADS, 192), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (1, SEQ, HEADS, 256), jnp.bfloat16)
    k_rope = jax.random.normal(keys[2], (1, SEQ, 64), jnp.bfloat16)
    documents = jnp.where(jnp.arange(SEQ) < 100, 0, 1)[None]

    def second(kv):
        out, _ = mla_prefill(q, kv, k_rope, 192**-0.5, documents)
        return jnp.sum(out[:, 100:].astype(jnp.float32) ** 2)

    gradient = jax.grad(second)(kv)
    assert jnp.abs(gradient[:, 100:]).max() > 0
    return float(jnp.abs(gradient[:, :100]).max())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dsv3_kernels").setLevel(logging.INFO)
    print(f"FP8 experts, relative error: {fp8_experts(jax.random.key(0)):.4f}")
    print(f"gradient across documents: {packed_attention(jax.random.key(1))}")
