"""Rows into slots and back against loops in float64, gradients against dense matrices."""

import inspect

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dsv3_kernels.permute import tiles
from dsv3_kernels.permute.op import dot_rows, permute, plan, sum_rows, take_rows, unpermute
from dsv3_kernels.permute.plan import slots_of
from tests.kernels.test_target import mesh_of

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = ["bfloat16", "float32", "float8_e4m3fn", "uint8"]


def taken_by_hand(x: np.ndarray, row_of_slot: np.ndarray, weights=None) -> np.ndarray:
    """In float64."""
    out = np.zeros((*row_of_slot.shape, x.shape[1]))
    for slot, row in np.ndenumerate(row_of_slot):
        if 0 <= row < len(x):
            out[slot] = np.float64(x[row]) * (1 if weights is None else np.float64(weights[slot]))
    return out


def summed_by_hand(
    slots: np.ndarray, slot_of_row: np.ndarray, weights=None, dtype: type = np.float64
) -> np.ndarray:
    """In `dtype`, in the order of k."""
    flat = slots.reshape(-1, slots.shape[-1])
    out = np.zeros((len(slot_of_row), flat.shape[1]), dtype)
    for (row, k), slot in np.ndenumerate(slot_of_row):
        if 0 <= slot < len(flat):
            out[row] += flat[slot].astype(dtype) * dtype(1 if weights is None else weights[row, k])
    return out


def dots_by_hand(y: np.ndarray, slots: np.ndarray, slot_of_row: np.ndarray) -> np.ndarray:
    flat = slots.reshape(-1, slots.shape[-1]).astype(np.float64)
    out = np.zeros(slot_of_row.shape)
    for (row, k), slot in np.ndenumerate(slot_of_row):
        if 0 <= slot < len(flat):
            out[row, k] = y[row].astype(np.float64) @ flat[slot]
    return out


def values(shape: tuple[int, ...], dtype="float32", seed: int = 0) -> np.ndarray:
    """Of very different size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, shape))
    return (np.abs(x) if dtype == "uint8" else x).astype(jnp.dtype(dtype))


def of_16_bits(x: np.ndarray) -> np.ndarray:
    """`x` in FP32 cut to as many bits as leave a product with BF16 exact."""
    return (x.view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)


def routed(tokens: int, top_k: int, num_experts: int, seed: int = 0) -> np.ndarray:
    """Distinct experts of each token, a fifth of them of nobody here."""
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(num_experts)[:top_k] for _ in range(tokens)])
    return np.where(rng.random((tokens, top_k)) < 0.2, -1, experts).astype(np.int32)


def equal_bits(found: jax.Array, expected: np.ndarray) -> bool:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return np.asarray(found).tobytes() == expected.tobytes()


ROW_OF_SLOT = np.array([[4, -1, 0, 0], [2, 5, -7, 4], [3, 6, 1, 100]], np.int32)
"""Rows that are in several slots, in one and in none, and what is of nothing: -1, -7, 6, 100."""


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", [ROW_OF_SLOT, ROW_OF_SLOT[0], ROW_OF_SLOT[:, :0]])
def test_rows_are_taken_bit_by_bit(dtype, table, implementation):
    x = values((6, 40), dtype)
    found = take_rows(x, table, implementation=implementation)
    assert equal_bits(found, taken_by_hand(x, table).astype(x.dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_taken_rows_are_weighted_and_rounded_once(dtype):
    x, weights = values((6, 40), dtype), values(ROW_OF_SLOT.shape, "bfloat16", seed=1)
    weights[0, 1] = np.nan  # of an empty slot
    found = take_rows(x, ROW_OF_SLOT, weights)
    expected = taken_by_hand(x.astype(np.float32), ROW_OF_SLOT, weights).astype(np.float32)
    assert equal_bits(found, expected.astype(x.dtype))


SLOT_OF_ROW = np.array([[0, 5, 3], [-1, 11, -1], [7, -3, 2], [12, -1, 99], [4, 10, 6]], np.int32)
"""Of 12 slots, of which one has no row; a row that is in none."""


@pytest.mark.parametrize("implementation", [None, "reference"])
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_bit_by_bit_in_the_order_of_k(dtype, has_weights, implementation):
    """Products are exact in FP32, be they rounded before they are added or not."""
    slots = values((3, 4, 40))
    slots = (of_16_bits(slots) if has_weights else slots).astype(jnp.dtype(dtype))
    weights = values((5, 3), "bfloat16", seed=1) if has_weights else None
    found = sum_rows(slots, SLOT_OF_ROW, weights, implementation=implementation)
    by_hand = [
        summed_by_hand(slots, table, of_table, np.float32).astype(slots.dtype)
        for table, of_table in (
            (SLOT_OF_ROW, weights),
            (SLOT_OF_ROW[:, ::-1], None if weights is None else weights[:, ::-1]),
        )
    ]
    assert equal_bits(found, by_hand[0])
    if dtype == "float32":
        assert not equal_bits(found, by_hand[1])


def test_a_sum_is_rounded_once():
    """1 + 2^-8 + 2^-8 is 1 + 2^-7, but 1 if each sum were rounded to BF16."""
    slots = np.repeat(np.array([[1], [2**-8], [2**-8]], BFLOAT16), 3, axis=1)
    found = sum_rows(slots, np.array([[0, 1, 2]], np.int32))
    assert equal_bits(found, np.full((1, 3), 1 + 2**-7, BFLOAT16))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sums_and_products_of_float32_weights(dtype):
    slots, weights = values((12, 300), dtype), values((5, 3), seed=1)
    y = values((5, 300), dtype, seed=2)
    found = np.asarray(sum_rows(slots, SLOT_OF_ROW, weights), np.float64)
    error = 2**-8 if dtype == "bfloat16" else 1e-6
    expected = summed_by_hand(slots, SLOT_OF_ROW, weights)
    np.testing.assert_allclose(found, expected, error, 1e-6)
    products = np.asarray(dot_rows(y, slots, SLOT_OF_ROW))
    expected = dots_by_hand(y, slots, SLOT_OF_ROW)
    assert products.dtype == np.float32
    assert np.all(products[(SLOT_OF_ROW < 0) | (SLOT_OF_ROW > 11)] == 0)
    np.testing.assert_allclose(products, expected, 1e-5, 1e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(products[[0, 2, 1, 3, 4]], expected, 1e-5, 1e-4)


def test_what_is_of_nothing_is_not_even_multiplied():
    slots, weights = values((12, 40)), values((5, 3), seed=1)
    expected = sum_rows(slots, SLOT_OF_ROW, weights)
    slots[[0, 1, 8, 9, 11]] = np.nan
    weights[[1, 3], [0, 2]] = np.nan
    for table in (SLOT_OF_ROW, np.where(SLOT_OF_ROW < 0, 2**31 - 1, SLOT_OF_ROW)):
        found = np.asarray(sum_rows(slots, table.astype(np.int32), weights))
        assert np.all(np.isnan(found[[0, 1]]))
        np.testing.assert_array_equal(found[2:], expected[2:])
    assert np.all(found[3] == 0)


def test_two_rows_swapped_are_seen():
    x = values((6, 40))
    for y in (x, x[[0, 1, 3, 2, 4, 5]]):
        taken, summed = take_rows(y, ROW_OF_SLOT), sum_rows(y, SLOT_OF_ROW)
        is_same = y is x
        assert equal_bits(taken, taken_by_hand(x, ROW_OF_SLOT).astype(x.dtype)) == is_same
        assert equal_bits(summed, summed_by_hand(x, SLOT_OF_ROW, None, np.float32)) == is_same


@pytest.mark.parametrize(("rows", "slots", "width"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_no_rows_no_slots_no_columns(rows, slots, width):
    x, table = jnp.ones((rows, width)), jnp.full((slots,), -1)
    assert equal_bits(take_rows(x, table), np.zeros((slots, width), np.float32))
    back = jnp.full((rows, 2), -1)
    assert equal_bits(sum_rows(take_rows(x, table), back), np.zeros((rows, width), np.float32))
    assert equal_bits(dot_rows(x, take_rows(x, table), back), np.zeros((rows, 2), np.float32))


# Gradients, against the matrices that take and sum multiply with


made = jax.jit(plan, static_argnums=(1, 2, 3))


def of_plan(alignment: int, capacity: int | None):
    experts = routed(tokens=11, top_k=3, num_experts=5)
    return made(jnp.asarray(experts), 5, alignment, capacity)


PLANS = [(1, None), (4, None), (4, 8)]


@pytest.mark.parametrize(("alignment", "capacity"), PLANS)
def test_gradient_of_permute(alignment, capacity):
    """It is linear: the gradient is the transpose's product, of whatever comes back."""
    routing = of_plan(alignment, capacity)
    x, d_slots = values((11, 40)), values((*routing.row_of_slot.shape, 40), seed=1)
    found, pull = jax.vjp(lambda x: permute(x, routing.row_of_slot, routing.slot_of_row), x)
    matrix = np.asarray(routing.row_of_slot)[:, None] == np.arange(11)
    np.testing.assert_array_equal(found, matrix.astype(np.float64) @ x)
    expected = matrix.T.astype(np.float64) @ d_slots.astype(np.float64)
    np.testing.assert_allclose(pull(d_slots)[0], expected, 1e-6, 1e-6)


@pytest.mark.parametrize(("alignment", "capacity"), PLANS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_unpermute(alignment, capacity, dtype):
    routing = of_plan(alignment, capacity)
    rows, back = np.asarray(routing.row_of_slot), np.asarray(routing.slot_of_row)
    shape = (5, -1) if capacity else (-1,)
    slots = values((len(rows), 40), dtype).reshape(*shape, 40)
    weights, d_y = values((11, 3), dtype, seed=1), values((11, 40), dtype, seed=2)

    def mixed(slots, weights):
        return unpermute(slots, weights, routing.row_of_slot.reshape(shape), routing.slot_of_row)

    found, pull = jax.vjp(mixed, *map(jnp.asarray, (slots, weights)))
    d_slots, d_weights = pull(d_y)
    matrix = np.zeros((11, len(rows)))
    for (row, k), slot in np.ndenumerate(back):
        if slot >= 0:
            matrix[row, slot] = weights[row, k]
    d_y = d_y.astype(np.float64)
    error = 2**-8 if dtype == "bfloat16" else 1e-5
    flat = slots.reshape(-1, 40).astype(np.float64)
    np.testing.assert_allclose(np.float64(found), matrix @ flat, error, 1e-5)
    assert (d_slots.shape, d_slots.dtype) == (slots.shape, dtype)
    np.testing.assert_allclose(np.float64(d_slots).reshape(-1, 40), matrix.T @ d_y, error, 1e-5)
    assert (d_weights.shape, d_weights.dtype) == (weights.shape, dtype)
    expected = dots_by_hand(d_y, slots, back)
    np.testing.assert_allclose(np.float64(d_weights), expected, error, 1e-4)


def test_there_and_back_with_weights_that_are_differences():
    """Central differences of a function of all of it, in float64."""
    routing = of_plan(4, None)
    x, weights, of_y = values((11, 6)), values((11, 3), seed=1), values((11, 6), seed=2)
    tables = routing.row_of_slot, routing.slot_of_row

    def loss(x, weights):
        slots = permute(x, *tables)
        return jnp.sum(of_y * unpermute(slots * slots, weights, *tables))

    def by_hand(x, weights):
        slots = taken_by_hand(x, np.asarray(tables[0]))
        total = 0.0
        for (row, k), slot in np.ndenumerate(np.asarray(tables[1])):
            if slot >= 0:
                total += weights[row, k] * np.float64(of_y[row]) @ slots[slot] ** 2
        return total

    gradients = jax.grad(loss, (0, 1))(*map(jnp.asarray, (x, weights)))
    operands = [x.astype(np.float64), weights.astype(np.float64)]
    for which, gradient in enumerate(gradients):
        for index in [(0, 0), (3, 1), (10, 2)]:
            ends = []
            for step in (1e-4, -1e-4):
                moved = [array.copy() for array in operands]
                moved[which][index] += step
                ends.append(by_hand(*moved))
            np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-4, 1e-4, 1e-5)


def test_unpermute_without_weights():
    routing = of_plan(4, None)
    tables = routing.row_of_slot, routing.slot_of_row
    slots, d_y = values((len(tables[0]), 40)), values((11, 40), seed=2)
    found, pull = jax.vjp(lambda slots: unpermute(slots, None, *tables), slots)
    np.testing.assert_array_equal(found, sum_rows(slots, tables[1]))
    np.testing.assert_array_equal(pull(d_y)[0], taken_by_hand(d_y, np.asarray(tables[0])))


# The plan


@settings(max_examples=40)
@given(arrays(np.int32, (9, 3), elements=st.integers(-2, 4)), st.sampled_from(PLANS))
@example(np.zeros((9, 3), np.int32), (4, 8))
@example(np.zeros((0, 3), np.int32), (4, None))
@example(np.zeros((4, 0), np.int32), (4, 8))
def test_every_pair_has_the_next_slot_of_its_expert(experts, sizes):
    num_experts, (alignment, capacity) = 4, sizes
    found = made(jnp.asarray(experts), num_experts, alignment, capacity)
    pairs = {e: [] for e in range(num_experts)}
    for index, expert in np.ndenumerate(experts):
        if 0 <= expert < num_experts:
            pairs[int(expert)].append(index)
    rows, back = np.full(found.row_of_slot.shape, -1), np.full(experts.shape, -1)
    start = 0
    for expert, mine in pairs.items():
        mine = mine[:capacity]
        assert found.group_starts[expert] == start
        assert found.group_sizes[expert] == len(mine)
        padded = -(-len(mine) // alignment) * alignment
        assert found.padded_sizes[expert] == padded
        for slot, (token, k) in enumerate(mine, start):
            rows[slot], back[token, k] = token, slot
        start += padded if capacity is None else capacity
    np.testing.assert_array_equal(found.row_of_slot, rows)
    np.testing.assert_array_equal(found.slot_of_row, back)
    assert start <= len(rows) and len(rows) % alignment == 0


def test_what_a_plan_must_have():
    experts = jnp.zeros((4, 2), jnp.int32)
    assert slots_of(8, 3, 4, None) == 20  # 8 + 3 * 3, up to a multiple
    assert slots_of(8, 3, 4, 8) == 24
    with pytest.raises(ValueError, match="alignment is 0, expected at least 1"):
        plan(experts, 3, 0)
    with pytest.raises(ValueError, match="capacity is 6, expected a multiple of alignment 4"):
        plan(experts, 3, 4, 6)
    with pytest.raises(ValueError, match="expected fewer than 2\\^31 keys"):
        plan(experts, 2**28)


# Errors and choices


def test_what_does_not_fit():
    x, table, back = jnp.ones((6, 40)), jnp.asarray(ROW_OF_SLOT), jnp.asarray(SLOT_OF_ROW)
    slots = jnp.ones((3, 4, 40))
    for call in (
        lambda **choice: take_rows(x, table, **choice),
        lambda **choice: sum_rows(slots, back, **choice),
        lambda **choice: dot_rows(x[:5], slots, back, **choice),
        lambda **choice: permute(x[:5], table, back, **choice),
        lambda **choice: unpermute(slots, None, table, back, **choice),
    ):
        with pytest.raises(ValueError, match="implementation is 'triton', expected one of ref"):
            call(implementation="triton")
    with pytest.raises(ValueError, match="row_of_slot is int16, expected int32"):
        take_rows(x, table.astype(jnp.int16))
    with pytest.raises(ValueError, match="slot_of_row is int16, expected int32"):
        sum_rows(slots, back.astype(jnp.int16))
    with pytest.raises(ValueError, match="y is bfloat16 and slots float32, expected one dtype"):
        dot_rows(x[:5].astype(jnp.bfloat16), slots, back)
    with pytest.raises(ValueError, match=r"slot_of_row is \[5, 3\] and x \[6, 40\], expected as"):
        inspect.unwrap(permute)(x, table, back)
    with pytest.raises(ValueError, match=r"weights is \[3, 5\], expected \[5, 3\]"):
        inspect.unwrap(sum_rows)(slots, back, jnp.ones((3, 5)))
    with pytest.raises(ValueError, match=r"row_of_slot is \[3, 4\], expected \[12\]"):
        inspect.unwrap(unpermute)(slots.reshape(12, 40), None, table, back)


def test_what_the_kernels_will_not_take():
    table, back = jnp.asarray(ROW_OF_SLOT), jnp.asarray(SLOT_OF_ROW)
    mosaic = dict(implementation="mosaic")
    with pytest.raises(NotImplementedError, match="take_rows on Hopper: width is 40, expected 128"):
        take_rows(jnp.ones((6, 40)), table, **mosaic)
    with pytest.raises(NotImplementedError, match="rows are float16, expected one of bfloat16, fl"):
        take_rows(jnp.ones((6, 128), jnp.float16), table, **mosaic)
    with pytest.raises(NotImplementedError, match="a row takes 79 registers a thread, expected 64"):
        take_rows(jnp.ones((6, 10001), jnp.uint8), table, **mosaic)
    with pytest.raises(NotImplementedError, match="width is 8200, expected 128 to 8192"):
        sum_rows(jnp.ones((12, 8200)), back, **mosaic)
    with pytest.raises(NotImplementedError, match="top_k is 64, expected at most 16"):
        sum_rows(jnp.ones((12, 128)), jnp.zeros((5, 64), jnp.int32), **mosaic)
    with pytest.raises(NotImplementedError, match="width is 200, expected a multiple of 128"):
        dot_rows(jnp.ones((5, 200)), jnp.ones((12, 200)), back, **mosaic)


def test_only_for_hopper_is_there_a_kernel_to_choose():
    back = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    of_rows = jax.ShapeDtypeStruct((8, 256), jnp.bfloat16)
    slots, rows = (
        jax.ShapeDtypeStruct((32, 256), jnp.bfloat16),
        jax.ShapeDtypeStruct((32,), "int32"),
    )
    calls = [(take_rows, of_rows, rows), (sum_rows, slots, back), (dot_rows, of_rows, slots, back)]

    def has_kernel(kind: str, function, *operands) -> bool:
        with jax.sharding.use_abstract_mesh(mesh_of(kind)):
            return "platform_index" in str(jax.make_jaxpr(function)(*operands))

    for call in calls:
        assert has_kernel("NVIDIA H800", *call)
        assert not has_kernel("NVIDIA B200", *call)
    narrow = jax.ShapeDtypeStruct((8, 96), jnp.bfloat16)
    assert not has_kernel("NVIDIA H800", take_rows, narrow, rows)


@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("width", [128, 200, 384, 576, 7168, 7176, 7240, 7241])
def test_spans_have_every_column_and_are_aligned(width, itemsize):
    cut = tiles.spans(width, itemsize)
    columns = [c for span in cut for c in range(span.start, span.start + span.size)]
    assert sorted(set(columns)) == list(range(width))
    assert width % 128 or len(columns) == width
    for span in cut:
        assert span.size % (tiles.THREADS * span.vector) == 0
        vector_bytes = span.vector * itemsize
        assert vector_bytes <= tiles.VECTOR_BYTES
        # Of every row: the next one begins right behind.
        assert (span.start * itemsize) % vector_bytes == width * itemsize % vector_bytes == 0
