"""New tokens over the paged cache against the whole forward, which knows no cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import chunked_attention
from dsv3_jax.model.cache import (
    NewTokens,
    copy_pages,
    empty_pool,
    read_pages,
    row_bytes,
    write_pages,
)
from dsv3_jax.model.transformer import Transformer
from tests.programs import quick_jit

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=12,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
)
PAGES, PAGE_SIZE, LENGTH = 18, 8, 40
CHUNKS = (3, 28, 1, 2, 10)
"""Tokens at a time; of the last only six are there. Up to 26 the absorbed form costs less."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def read_in_chunks(model, tokens, table, layers, chunks=CHUNKS):
    """Hidden states and loads of `chunks`, and the pool."""

    @quick_jit
    def extend(model, layers, tokens, pool, new):
        return model.extend(tokens, pool, new, layers)

    pool = empty_pool(CONFIG, "fp32", model.cached_layers, PAGES, PAGE_SIZE)
    start, hidden, load = 0, [], 0
    for count in chunks:
        positions = start + np.arange(count)[None].repeat(2, 0)
        valid = positions < LENGTH
        part = tokens[np.arange(2)[:, None], np.minimum(positions, LENGTH - 1)]
        new = NewTokens(jnp.asarray(positions, jnp.int32), jnp.asarray(valid), jnp.asarray(table))
        of_chunk, pool, loads = extend(model, layers, jnp.asarray(part), pool, new)
        hidden.append(of_chunk)
        load += loads
        start += count
    return np.concatenate(hidden, axis=1)[:, :LENGTH], np.asarray(load), pool


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 64, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(model, tokens):
    return quick_jit(lambda model, rows: model.main_hidden(rows))(model, jnp.asarray(tokens))


@pytest.mark.parametrize("is_unrolled", [False, True])
def test_chunks_of_any_length_equal_the_whole_forward(model, tokens, whole, is_unrolled):
    """Pages in a random order."""
    table = np.random.default_rng(1).permutation(PAGES)[:10].reshape(2, 5).astype(np.int32)
    layers = model.unstacked_layers() if is_unrolled else None
    hidden, load, pool = read_in_chunks(model, tokens, table, layers)
    np.testing.assert_allclose(hidden, whole[0], atol=2e-6)
    expected = np.concatenate([np.asarray(part.load) for part in whole[2]])
    np.testing.assert_array_equal(load, expected)
    for layer in range(3):
        rows = np.asarray(pool)[layer * PAGES + table].reshape(2, LENGTH, -1)
        np.testing.assert_allclose(rows, whole[1][layer], atol=2e-6)
    unused = np.setdiff1d(np.arange(PAGES), table)
    assert not np.any(np.asarray(pool)[unused])  # padding was written nowhere


def test_what_is_cached_before_a_chunk_comes_in_blocks(model, tokens, whole, monkeypatch):
    """Twelve tokens, of which the second block of eight has four."""
    monkeypatch.setattr(chunked_attention, "BLOCK", 8)
    table = np.random.default_rng(1).permutation(PAGES)[:10].reshape(2, 5).astype(np.int32)
    hidden, _, _ = read_in_chunks(model, tokens, table, None, chunks=(12, 28))
    np.testing.assert_allclose(hidden, whole[0], atol=2e-6)


def test_another_table_is_seen(model, tokens, whole):
    """The negative control: one page of the other request."""
    table = np.arange(10).reshape(2, 5).astype(np.int32)
    table[0, 1] = table[1, 1]
    hidden, _, _ = read_in_chunks(model, tokens, table, None)
    assert np.max(np.abs(hidden[0] - whole[0][0])) > 1e-3


def test_pages_move_in_all_layers():
    pool = jnp.arange(3 * 4 * 2 * 5, dtype=jnp.float32).reshape(12, 2, 5)
    by_layer = np.asarray(pool).reshape(3, 4, 2, 5)
    content = np.asarray(read_pages(pool, jnp.asarray([2, 0]), 3))
    np.testing.assert_array_equal(content, by_layer[:, [2, 0]])
    # 4 is beyond a layer's pages: left out.
    written = write_pages(pool, jnp.asarray([1, 4]), jnp.asarray(content))
    expected = by_layer.copy()
    expected[:, 1] = by_layer[:, 2]
    np.testing.assert_array_equal(np.asarray(written).reshape(3, 4, 2, 5), expected)
    copied = jax.jit(copy_pages, static_argnums=3)(
        pool, jnp.asarray([2, 0]), jnp.asarray([1, 4]), 3
    )
    np.testing.assert_array_equal(copied, written)


def test_bytes_of_a_token_are_the_closed_form():
    """DeepSeek-V3: 512 + 64 values in BF16; in FP8 512 + 4 scales of 4 bytes + 64 of 2."""
    assert row_bytes(ModelConfig(), "bf16") == 2 * (512 + 64) == 1152
    assert row_bytes(ModelConfig(), "fp8") == 512 + 4 * 4 + 2 * 64 == 656
    assert 61 * row_bytes(ModelConfig(), "bf16") == 70_272  # Insights, Table 1
