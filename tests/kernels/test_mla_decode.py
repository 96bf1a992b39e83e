"""Attention over a paged latent cache against float64 NumPy, and its layout in 8 bits."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dsv3_kernels.mla_decode import op, schedule, xla
from dsv3_kernels.mla_decode.op import mla_decode, mla_decode_rows, packed_bytes
from dsv3_kernels.quantize import reference as quantization

pack_fp8 = jax.jit(op.pack_fp8, static_argnames="v_dim")
unpack_fp8 = jax.jit(op.unpack_fp8, static_argnames=("dtype", "v_dim"))
SCALE = 0.3
LARGEST_ERROR = {"float32": 2e-6, "bfloat16": 1e-2}
"""Relative, in the Frobenius norm: 3e-7 and 4e-3 were measured."""
LENGTHS = [9, 0, 1, 12, 5]
"""An idle slot, fewer tokens than queries, whole pages and parts of them; pages are of 4."""
PAGE_SIZE, V_DIM = 4, 6


def cache(lengths: list[int], qk_dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pages in a random order and the tables; what no token is in is NaN or out of range."""
    rng = np.random.default_rng(seed)
    pages_of = [-(-length // PAGE_SIZE) for length in lengths]
    order = rng.permutation(sum(pages_of) + 2)
    pages = np.full((order.size, PAGE_SIZE, qk_dim), np.nan)
    table = np.resize([10**6, -7, -(2**31)], (len(lengths), max(pages_of) + 1))
    for b, length in enumerate(lengths):
        mine, order = order[: pages_of[b]], order[pages_of[b] :]
        table[b, : mine.size] = mine
        for t in range(length):
            pages[mine[t // PAGE_SIZE], t % PAGE_SIZE] = rng.standard_normal(qk_dim)
    return pages, table.astype(np.int32)


def attention(q, pages, table, lengths, v_dim=V_DIM) -> tuple[np.ndarray, np.ndarray]:
    """Query by query, in float64."""
    batch, queries, heads, _ = q.shape
    out, lse = np.zeros((batch, queries, heads, v_dim)), np.full((batch, queries, heads), -np.inf)
    for b, i, h in np.ndindex(batch, queries, heads):
        seen = range(max(0, lengths[b] - queries + i + 1))
        if seen:
            rows = [(table[b, t // PAGE_SIZE], t % PAGE_SIZE) for t in seen]
            keys = np.stack([pages[row] for row in rows])
            weights = np.exp(SCALE * keys @ q[b, i, h])
            out[b, i, h] = weights @ keys[:, :v_dim] / weights.sum()
            lse[b, i, h] = np.log(weights.sum())
    return out, lse


def queries_of(batch: int, queries: int, qk_dim: int) -> np.ndarray:
    return np.random.default_rng(queries).standard_normal((batch, queries, 3, qk_dim))


def relative_error(found, expected: np.ndarray) -> float:
    """-inf is where it should be, or NaN is the error."""
    assert found.shape == expected.shape
    found = np.asarray(found).astype(np.float64)
    same = (found == expected) & np.isinf(expected)
    difference = np.where(same, 0, found - np.where(same, 0, expected))
    return float(np.linalg.norm(difference) / np.linalg.norm(expected[np.isfinite(expected)]))


@pytest.mark.parametrize("queries", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_equals_float64(implementation, dtype, queries):
    pages, table = cache(LENGTHS, 9)
    q, pages = (jnp.asarray(x, dtype) for x in (queries_of(len(LENGTHS), queries, 9), pages))
    lengths, options = jnp.asarray(LENGTHS), dict(v_dim=V_DIM, implementation=implementation)
    out, lse = mla_decode(q, pages, jnp.asarray(table), lengths, SCALE, **options)
    q, pages = (np.asarray(x, np.float64) for x in (q, pages))
    expected = attention(q, pages, table, LENGTHS)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_error(out, expected[0]) <= LARGEST_ERROR[dtype]
    assert relative_error(lse, expected[1]) <= LARGEST_ERROR["float32"]
    idle = LENGTHS.index(0)
    assert not np.any(np.asarray(out[idle], np.float32)) and np.all(np.isneginf(lse[idle]))


def test_blocks_are_joined_and_do_not_touch_each_other():
    """In the form for CPU, which gathers 32 tokens at a time of 64 requests."""
    assert xla.GATHERED // 64 == 32
    lengths = np.random.default_rng(1).integers(0, 101, 64)
    pages, table = cache(lengths.tolist(), 9)
    q = queries_of(64, 2, 9)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, pages))
    attend = partial(mla_decode, *arrays, jnp.asarray(table), scale=SCALE, v_dim=V_DIM)
    found = attend(lengths=jnp.asarray(lengths), implementation="xla")
    for array, expected in zip(found, attention(q, pages, table, lengths), strict=True):
        assert relative_error(array, expected) <= LARGEST_ERROR["float32"]
    short = lengths <= 32
    assert 0 < short.sum() < 64
    alone = attend(lengths=jnp.asarray(np.where(short, lengths, 0)), implementation="xla")
    for array, same in zip(found, alone, strict=True):
        np.testing.assert_array_equal(array[short], same[short])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_pages_may_be_narrower_than_queries(implementation):
    """As exact as the same values in the queries' dtype."""
    pages, table = cache(LENGTHS, 9)
    narrow = jnp.asarray(pages, jnp.bfloat16)
    q = jnp.asarray(queries_of(len(LENGTHS), 2, 9), jnp.float32)
    arrays = jnp.asarray(table), jnp.asarray(LENGTHS)
    options = dict(v_dim=V_DIM, implementation=implementation)
    out, lse = mla_decode(q, narrow, *arrays, SCALE, **options)
    expected = attention(np.asarray(q, np.float64), np.asarray(narrow, np.float64), table, LENGTHS)
    assert out.dtype == jnp.float32
    assert relative_error(out, expected[0]) <= LARGEST_ERROR["float32"]
    assert relative_error(lse, expected[1]) <= LARGEST_ERROR["float32"]


def test_rows_side_by_side_are_pages_in_their_order():
    lengths = [64, 5, 100]
    cache = np.random.default_rng(0).standard_normal((3, 128, 9))
    q = queries_of(3, 2, 9)
    pages, table = cache.reshape(-1, PAGE_SIZE, 9), np.arange(96).reshape(3, -1)
    expected = attention(q, pages, table, lengths)
    arrays = jnp.asarray(q, jnp.float32), jnp.asarray(cache, jnp.float32), jnp.asarray(lengths)
    for found, want in zip(mla_decode_rows(*arrays, SCALE, v_dim=V_DIM), expected, strict=True):
        assert relative_error(found, want) <= LARGEST_ERROR["float32"]
    message = "cache has 100 tokens, expected a multiple of 64"
    with pytest.raises(NotImplementedError, match=message):
        mla_decode_rows(q, cache[:, :100], arrays[2], SCALE, v_dim=V_DIM, implementation="mosaic")


@pytest.mark.parametrize("changed", ["a page of another request", "a query's own key"])
def test_what_is_not_the_same_is_seen(changed):
    pages, table = cache(LENGTHS, 9)
    q = queries_of(len(LENGTHS), 2, 9)
    expected, _ = attention(q, pages, table, LENGTHS)
    lengths = list(LENGTHS)
    if changed == "a query's own key":
        lengths[0] -= 1
    else:
        table[0, 0], table[3, 0] = table[3, 0], table[0, 0]
    arrays = jnp.asarray(q, jnp.float32), jnp.asarray(pages, jnp.float32), jnp.asarray(table)
    out, _ = mla_decode(*arrays, jnp.asarray(lengths), SCALE, v_dim=V_DIM)
    assert relative_error(out, expected) > LARGEST_ERROR["bfloat16"]
    np.testing.assert_array_less(relative_error(out[4:], expected[4:]), LARGEST_ERROR["float32"])


def test_large_scores_do_not_overflow():
    pages, table = cache(LENGTHS, 9)
    q = jnp.asarray(300 * queries_of(len(LENGTHS), 1, 9), jnp.float32)
    pages, lengths = jnp.asarray(300 * pages, jnp.float32), jnp.asarray(LENGTHS)
    out, lse = mla_decode(q, pages, jnp.asarray(table), lengths, SCALE, v_dim=V_DIM)
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(np.isfinite(lse[:, 0, 0]), np.asarray(LENGTHS) > 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_in_8_bits_equals_float64_of_what_is_in_it(dtype):
    v_dim, qk_dim = 130, 134
    pages, table = cache(LENGTHS, qk_dim)
    packed = pack_fp8(jnp.asarray(pages, jnp.float32), v_dim=v_dim)
    q = jnp.asarray(queries_of(len(LENGTHS), 2, qk_dim), dtype)
    arrays = q, packed, jnp.asarray(table), jnp.asarray(LENGTHS)
    out, lse = mla_decode(*arrays, SCALE, v_dim=v_dim)
    cached = np.asarray(unpack_fp8(packed, dtype, v_dim=v_dim), np.float64)
    expected = attention(np.asarray(q, np.float64), cached, table, LENGTHS, v_dim)
    assert out.dtype == dtype
    assert relative_error(out, expected[0]) <= LARGEST_ERROR[dtype]
    assert relative_error(lse, expected[1]) <= 2 * LARGEST_ERROR["float32"]


def test_a_row_in_8_bits_is_laid_out_as_flash_mla_reads_it():
    """Bytes read with NumPy."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 3, 576)) * np.exp(3 * rng.standard_normal((2, 3, 1)))
    latents = jnp.asarray(latents, jnp.bfloat16)
    in_jax = pack_fp8(latents)
    packed = np.asarray(in_jax)
    assert packed.shape == (2, 3, 656) and packed_bytes(576) == 656
    values = packed[..., :512].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.ascontiguousarray(packed[..., 512:528]).view(np.float32)
    rope = np.ascontiguousarray(packed[..., 528:]).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(rope, np.asarray(latents[..., 512:]))
    largest = np.abs(np.asarray(latents[..., :512], np.float32)).reshape(2, 3, 4, 128).max(-1)
    np.testing.assert_allclose(scale, largest / 448, rtol=2e-7)
    read = values * np.repeat(scale, 128, axis=-1)
    np.testing.assert_array_equal(read, np.asarray(unpack_fp8(in_jax, jnp.float32))[..., :512])
    in_bf16 = np.asarray(unpack_fp8(in_jax, jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(in_bf16[..., :512], read.astype(ml_dtypes.bfloat16))
    quantised = quantization.quantize(latents[..., :512])
    np.testing.assert_array_equal(read, np.asarray(quantization.dequantize(*quantised)))


@pytest.mark.parametrize("parts", [1, 3, 40])
@pytest.mark.parametrize("lengths", [[700], [0, 0], [64, 0, 65, 1, 0, 900], [1] * 30])
def test_every_block_is_in_one_part_and_parts_are_alike(lengths, parts):
    """By what the schedule's docstring says of a block; `requests` has all that a part touches."""
    origins, ends, requests, [size] = (
        np.asarray(x) for x in schedule.make(jnp.asarray(lengths, jnp.int32), parts)
    )
    blocks = [-(-length // 64) for length in lengths]
    work = np.zeros(parts, int)
    slots = set()
    for b, count in enumerate(blocks):
        assert ends[b] - origins[b] == count
        for k in range(count):
            p = (origins[b] + k) // size
            work[p] += 1
            slots.add((p + b, p, b))
            assert requests[p, 0] <= b < requests[p, 1]
    assert len({slot for slot, _, _ in slots}) == len(slots)
    assert all(slot < parts + len(lengths) - 1 for slot, _, _ in slots)
    begun = sum(blocks) + np.count_nonzero(blocks) * schedule.ITEM_BLOCKS
    assert work.max() <= max(1, -(-begun // parts))


def mesh_of(kind: str) -> AbstractMesh:
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    return AbstractMesh((1,), ("gpu",), (AxisType.Auto,), abstract_device=device)


@pytest.mark.parametrize(
    ("kind", "page_size", "is_kernel"),
    [("NVIDIA H800", 64, True), ("NVIDIA H800", 32, False), ("NVIDIA A100-SXM4-80GB", 64, False)],
)
def test_the_kernel_is_chosen_where_it_has_the_case(kind, page_size, is_kernel):
    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    of_requests = spec(2, 4, dtype=jnp.int32), spec(2, dtype=jnp.int32)
    operands = spec(2, 1, 16, 576), spec(8, page_size, 576), *of_requests
    with jax.sharding.use_abstract_mesh(mesh_of(kind)):
        program = jax.make_jaxpr(lambda *x: mla_decode(*x, SCALE))(*operands)
    assert ("mla_decode_combine" in str(program)) == is_kernel


def test_errors():
    q, pages = jnp.zeros((2, 1, 3, 9)), jnp.zeros((5, 4, 9))
    table, lengths = jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32)

    unwrapped = inspect.unwrap(mla_decode)  # jaxtyping would be the first to reject

    def rejects(message, q=q, pages=pages, table=table, lengths=lengths, scale=SCALE, **options):
        with pytest.raises(ValueError, match=message):
            unwrapped(q, pages, table, lengths, scale, **({"v_dim": V_DIM} | options))

    rejects(
        "implementation is 'triton', expected one of reference, xla, mosaic",
        implementation="triton",
    )
    rejects("v_dim is 10, expected 1 to 9", v_dim=10)
    rejects("pages is int32, expected floating point, or uint8", pages=pages.astype("int32"))
    rejects(r"pages is \[5, 4, 8\], expected \[pages, page_size, 9\]", pages=pages[..., :8])
    packed = jnp.zeros((5, 4, 9), jnp.uint8)
    rejects(r"pages is \[5, 4, 9\], expected \[pages, page_size, 16\]", pages=packed)
    rejects(r"page_table is \[1, 3\] and lengths \[2\], expected \[2, max_pages\]", table=table[:1])
    rejects("scale is 0.0, expected over 0", scale=0.0)
    rejects("splits is 0, expected at least 1", splits=0)
    with pytest.raises(NotImplementedError, match="q is float32, expected bfloat16"):
        mla_decode(q, pages, table, lengths, SCALE, v_dim=V_DIM, implementation="mosaic")
