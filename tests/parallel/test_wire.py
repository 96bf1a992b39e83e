"""Rows as bytes: by hand, by count, over two hops, and what passes back."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.parallel.wire import (
    AS_IS,
    PACKINGS,
    UNCHANGED,
    Packing,
    from_bytes,
    pass_through,
    to_bytes,
)
from dsv3_kernels.logfmt.reference import decode, encode
from tests.kernels.test_quantize import (
    E4M3,
    ROW,
    assert_same,
    dequantised_by_hand,
    quantised_by_hand,
)

HIDDEN, TOP_K = 7168, 8
FP8 = PACKINGS["fp8"]
PACKED = {"fp8": 0, "logfmt10": 10, "logfmt8": 8}
"""Bits of LogFMT."""


def rows_of(shape: tuple[int, ...], dtype=jnp.bfloat16, seed: int = 0) -> jax.Array:
    """Rows of different size."""
    rng = np.random.default_rng(seed)
    sizes = np.exp2(rng.integers(-8, 8, (*shape[:-1], 1)))
    return jnp.asarray(rng.standard_normal(shape) * sizes, dtype)


def with_weights(shape: tuple[int, ...], extra: int, dtype=jnp.bfloat16) -> jax.Array:
    """Rows and, in their last columns, bits that no arithmetic leaves alone."""
    size = jnp.dtype(dtype).itemsize
    bits = np.random.default_rng(1).integers(256, size=(*shape[:-1], extra * size), dtype=np.uint8)
    if bits.size:
        bits[..., -size:] = 0xFF  # a NaN
    weights = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(*shape[:-1], extra))
    return jnp.concatenate([rows_of(shape, dtype), weights], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 2))
def packed(packing: Packing, rows: jax.Array, extra: int) -> jax.Array:
    return packing.pack(rows, extra)


@functools.partial(jax.jit, static_argnums=(0, 2))
def passed(packing: Packing, rows: jax.Array, extra: int) -> jax.Array:
    return packing.unpack(packing.pack(rows, extra), extra, rows.dtype)


def rounded_by_hand(name: str, rows: jax.Array) -> np.ndarray:
    """What arrives of rows without weights. LogFMT has tests of its own."""
    if bits := PACKED[name]:
        return np.asarray(decode(encode(rows, bits), bits, rows.dtype)).astype(np.float64)
    values = quantised_by_hand(np.asarray(rows), ROW, E4M3, power_of_two=True)
    return dequantised_by_hand(*values, ROW).astype(rows.dtype).astype(np.float64)


def as_bits(x: jax.Array) -> bytes:
    return np.asarray(x).tobytes()


@pytest.mark.parametrize(
    ("name", "bytes_of_row"),
    [
        ("fp8", 7168 + 56 + 16),
        ("logfmt10", 56 * (128 * 10 // 8 + 4) + 16),
        ("logfmt8", 56 * (128 * 8 // 8 + 4) + 16),
    ],
)
def test_bytes_of_a_row_of_the_671b_model(name, bytes_of_row):
    rows = jax.ShapeDtypeStruct((3, HIDDEN + TOP_K), jnp.bfloat16)
    found = jax.eval_shape(lambda rows: PACKINGS[name].pack(rows, TOP_K), rows)
    assert found.dtype == jnp.uint8 and found.shape == (3, bytes_of_row)
    back = jax.eval_shape(lambda row: PACKINGS[name].unpack(row, TOP_K, jnp.bfloat16), found)
    assert (back.shape, back.dtype) == (rows.shape, rows.dtype)


def test_dispatch_takes_half_the_bytes():
    rows = jnp.zeros((1, HIDDEN + TOP_K), jnp.bfloat16)
    assert packed(FP8, rows, TOP_K).nbytes == 7240 and rows.nbytes == 14352
    assert 7240 <= 0.52 * 14352


@pytest.mark.parametrize(
    ("name", "shape", "extra", "dtype"),
    [
        ("fp8", (5, 256), 8, "bfloat16"),
        ("fp8", (2, 3, 129), 3, "float32"),
        ("fp8", (4, 1), 0, "bfloat16"),
        ("logfmt10", (5, 256), 8, "bfloat16"),
        ("logfmt8", (2, 3, 128), 3, "float32"),
        ("logfmt8", (4, 128), 0, "bfloat16"),
    ],
)
def test_rows_arrive_rounded_and_weights_to_the_bit(name, shape, extra, dtype):
    rows = with_weights(shape, extra, dtype)
    found = passed(PACKINGS[name], rows, extra)
    assert (found.shape, found.dtype) == (rows.shape, rows.dtype)
    hidden = shape[-1]
    assert as_bits(found[..., hidden:]) == as_bits(rows[..., hidden:])
    assert_same(found[..., :hidden], rounded_by_hand(name, rows[..., :hidden]))
    assert np.any(np.asarray(found != rows)[..., :hidden])


def test_bytes_of_a_row_of_columns_that_fill_no_tile():
    for hidden in (1, 127, 128, 129, 200):
        rows = jax.ShapeDtypeStruct((3, hidden + 2), jnp.bfloat16)
        found = jax.eval_shape(lambda rows: FP8.pack(rows, 2), rows)
        assert found.shape == (3, hidden + -(-hidden // 128) + 4)
        back = jax.eval_shape(lambda packed: FP8.unpack(packed, 2, jnp.bfloat16), found)
        assert back.shape == rows.shape


@pytest.mark.parametrize("name", PACKED)
def test_no_rows(name):
    rows = jnp.zeros((0, 2, 128 + 8), jnp.bfloat16)
    assert passed(PACKINGS[name], rows, 8).shape == rows.shape


def test_a_row_in_e4m3_byte_by_byte():
    """Values with scales 2 and 2^-9, their exponents, and two weights in BF16."""
    rows = np.zeros((1, 258), np.float32)
    rows[0, [0, 1, 128, 256, 257]] = 896, -2, 0.875, 1.0, -0.5
    found = packed(FP8, jnp.asarray(rows, jnp.bfloat16), 2)
    expected = bytearray(128 + 128)
    expected[0], expected[1], expected[128] = 0x7E, 0xB8, 0x7E
    expected += bytes([127 + 1, 127 - 9]) + bytes.fromhex("803f 00bf")
    assert np.asarray(found).tobytes() == bytes(expected)


def test_e4m3_over_two_hops():
    """Values arrive the same. So do bytes but where 225 to 232 became 224, which takes half the
    scale; they are the same from then on."""
    rows = with_weights((200, 512), 8)
    first = packed(FP8, rows, 8)
    arrived = FP8.unpack(first, 8, jnp.bfloat16)
    second = packed(FP8, arrived, 8)
    assert as_bits(FP8.unpack(second, 8, jnp.bfloat16)) == as_bits(arrived)
    third = packed(FP8, FP8.unpack(second, 8, jnp.bfloat16), 8)
    assert as_bits(third) == as_bits(second)
    first, second = (np.asarray(array)[:, :512].reshape(-1, 128) for array in (first, second))
    is_same = np.all(first == second, axis=1)
    largest = np.max(np.abs(first.view(ml_dtypes.float8_e4m3fn).astype(np.float32)), axis=1)
    np.testing.assert_array_equal(is_same, largest != 224)
    assert 0.9 < np.mean(is_same) < 1


def test_one_scale_of_another_row_would_be_detected():
    rows = rows_of((2, 128))
    wrong = np.array(packed(FP8, rows, 0))
    wrong[:, -1] = wrong[::-1, -1]
    with pytest.raises(AssertionError):
        assert_same(FP8.unpack(jnp.asarray(wrong), 0, jnp.bfloat16), rounded_by_hand("fp8", rows))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "uint8", "float8_e4m3fn"])
def test_bytes_and_back(dtype):
    bits = np.random.default_rng(0).integers(256, size=(2, 3, 16), dtype=np.uint8)
    x = jnp.asarray(bits.view(jnp.dtype(dtype)))
    found = to_bytes(x)
    assert found.dtype == jnp.uint8
    np.testing.assert_array_equal(found, bits)
    again = from_bytes(found, dtype)
    assert again.dtype == dtype and as_bits(again) == as_bits(x)


WAYS = [("fp8", "fp8"), ("fp8", "bf16"), ("bf16", "fp8"), ("logfmt8", "fp8")]


@pytest.mark.parametrize(("there", "back"), WAYS)
def test_gradients_pass_by_the_way_back(there, back):
    extra = 2
    rows, gradient = rows_of((3, 128 + extra)), rows_of((3, 128 + extra), seed=1)

    @jax.jit
    def run(rows, gradient):
        send = functools.partial(pass_through, PACKINGS[there], PACKINGS[back], extra)
        value, pull_back = jax.vjp(send, rows)
        return value, pull_back(gradient)[0]

    for name, sent, found in zip((there, back), (rows, gradient), run(rows, gradient), strict=True):
        expected = np.asarray(sent).astype(np.float64)
        if name != "bf16":
            expected[:, :128] = rounded_by_hand(name, sent[:, :128])
        assert found.dtype == jnp.bfloat16
        assert_same(found, expected)


def test_as_it_is_nothing_is_touched():
    rows = with_weights((3, 100), 2)
    assert AS_IS.pack(rows, 2) is rows and AS_IS.unpack(rows, 2, jnp.bfloat16) is rows
    assert pass_through(AS_IS, AS_IS, 2, rows) is rows
    assert PACKINGS["bf16"] is AS_IS is UNCHANGED.dispatch is UNCHANGED.combine
    assert PACKINGS.keys() == {"bf16", *PACKED}


def test_logfmt_of_columns_that_fill_no_tile_is_named():
    with pytest.raises(ValueError, match="columns: 100, the last dimension, is not a multiple of"):
        PACKINGS["logfmt8"].pack(jnp.zeros((2, 108)), 8)
