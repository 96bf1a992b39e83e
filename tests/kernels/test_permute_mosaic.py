"""The Hopper kernels of permute: raced on the CPU, compiled for sm_90a, bit by bit as defined."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.permute import mosaic_sm90, reference, shapes, tiles
from dsv3_kernels.permute.op import permute, plan, unpermute
from dsv3_kernels.permute.shapes import Shape
from tests.kernels.compiled import compiled_cases, results

ROW_OF_SLOT = np.array([2, -1, 0, 4, 2, 5, -7, 1], np.int32)
"""A row twice, one not at all; nothing, on both sides of the 5 rows that there are."""
SLOT_OF_ROW = np.array([[0, 6, 4], [-1, -1, 99], [7, -3, 2]], np.int32)
"""Of 7 slots: a row in all it may be in, one in none, one in one."""


def values(shape: tuple[int, ...], dtype: str, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    if dtype == "uint8":
        return jnp.asarray(random.integers(0, 256, shape, np.uint8))
    x = random.normal(size=shape) * np.exp(2 * random.normal(size=shape))
    return jnp.asarray(x, jnp.float32).astype(dtype)


def raced(function: Callable[..., Any], *arguments: Any) -> Any:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return function(*arguments)


def equal_bits(found: jax.Array, expected: jax.Array) -> bool:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    return np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("width", "dtype", "has_weights"),
    [
        (328, "uint8", False),  # 8 bytes at a time, and a span that reaches back
        (256, "bfloat16", True),
        slow(1408, "bfloat16", False),
        slow(1161, "bfloat16", False),  # rows aligned to 2 bytes
        slow(384, "float32", True),
        slow(2304, "float8_e4m3fn", False),
    ],
)
def test_rows_are_taken(width, dtype, has_weights):
    x = values((5, width), dtype)
    weights = values(ROW_OF_SLOT.shape, "float32", seed=1) if has_weights else None
    table = jnp.asarray(ROW_OF_SLOT)
    found = raced(mosaic_sm90.take_rows, x, table, weights)
    assert equal_bits(found, reference.take_rows(x, table, weights))
    assert not np.asarray(found, np.float32)[[1, 5, 6]].any()
    swapped = x[jnp.array([1, 0, 2, 3, 4])]
    assert not equal_bits(found, reference.take_rows(swapped, table, weights))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("width", "dtype", "has_weights"),
    [
        (264, "bfloat16", True),  # a span that reaches back
        slow(384, "bfloat16", False),
        slow(1032, "float32", False),
        slow(256, "float32", True),
    ],
)
def test_sums_are_the_references(width, dtype, has_weights):
    """Weights of 8 bits and values of 8, or sums without weights: products are exact."""
    slots = values((7, width), "bfloat16" if has_weights else dtype).astype(dtype)
    weights = values(SLOT_OF_ROW.shape, "bfloat16", seed=1) if has_weights else None
    table = jnp.asarray(SLOT_OF_ROW)
    found = raced(mosaic_sm90.sum_rows, slots, table, weights)
    assert equal_bits(found, reference.sum_rows(slots, table, weights))
    assert not np.asarray(found, np.float32)[1].any()
    swapped = slots[jnp.array([0, 1, 2, 3, 5, 4, 6])]
    other = reference.sum_rows(swapped, table, weights)
    assert equal_bits(found[1:], other[1:]) and not equal_bits(found[:1], other[:1])


@pytest.mark.interpret
def test_what_is_of_nothing_is_not_read():
    slots = values((7, 128), "float32").at[jnp.array([1, 3, 5])].set(jnp.nan)
    weights = values(SLOT_OF_ROW.shape, "float32", seed=1).at[1].set(jnp.nan)
    found = raced(mosaic_sm90.sum_rows, slots, jnp.asarray(SLOT_OF_ROW), weights)
    assert np.all(np.isfinite(found))


@pytest.mark.interpret
@pytest.mark.parametrize(("width", "dtype"), [(384, "bfloat16"), slow(640, "float32")])
def test_products_are_the_references(width, dtype):
    slots, y = values((7, width), dtype), values((3, width), dtype, seed=1)
    found = raced(mosaic_sm90.dot_rows, y, slots, jnp.asarray(SLOT_OF_ROW))
    expected = reference.dot_rows(y, slots, jnp.asarray(SLOT_OF_ROW))
    norms = [np.linalg.norm(np.asarray(x, np.float32), axis=1).max() for x in (y, slots)]
    largest = 1e-6 * norms[0] * norms[1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=largest)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[:, ::-1], expected, rtol=0, atol=largest)


@pytest.mark.slow
@pytest.mark.interpret
def test_gradients_of_the_kernels_are_those_of_the_reference():
    routing = plan(jnp.asarray([[0, 2], [2, -1], [0, 1]], jnp.int32), 3, alignment=2)
    tables = routing.row_of_slot, routing.slot_of_row
    x, weights = values((3, 128), "float32"), values((3, 2), "float32", seed=1)

    def gradients(implementation: str) -> list[jax.Array]:
        choice = dict(implementation=implementation)

        def loss(x, weights):
            slots = permute(x, *tables, **choice)
            return jnp.sum(unpermute(slots * slots, weights, *tables, **choice) ** 2)

        return jax.grad(loss, (0, 1))(x, weights)

    for found, expected in zip(raced(gradients, "mosaic"), gradients("reference"), strict=True):
        np.testing.assert_allclose(found, expected, 1e-5)


PROGRAM = """
import json, sys
import jax
from dsv3_kernels import sass
from dsv3_kernels.permute import mosaic_sm90

for line in sys.stdin:
    name, arguments = json.loads(line)
    specs = [jax.ShapeDtypeStruct(*argument) for argument in arguments]
    [kernel] = sass.compile_for_hopper(getattr(mosaic_sm90, name), *specs)
    print(json.dumps([kernel.spilled_bytes, sorted(kernel.instructions)]))
"""


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    weighted = [shape for shape in shapes.SUMMED if shape.has_weights]
    every = [("take_rows", shape) for shape in shapes.TAKEN]
    every += [("sum_rows", shape) for shape in shapes.SUMMED]
    every += [("dot_rows", shape) for shape in weighted]
    for (op, shape), report in zip(every, compiled_cases("permute"), strict=True):
        assert report["case"] == f"{op}, {shape.name}"
        assert_compiled(op, shape, report)


@pytest.mark.slow
@pytest.mark.compile
def test_the_widest_rows_and_other_dtypes_compile():
    back, rows = ((64, tiles.MOST_TOP_K), "int32"), ((64,), "int32")
    weights, of_slots = ((64, tiles.MOST_TOP_K), "float32"), ((64,), "float32")
    cases = [
        ("take_rows", [((64, 32768), "uint8"), rows]),
        ("take_rows", [((64, 8191), "uint8"), rows]),
        ("take_rows", [((64, 7168), "float8_e4m3fn"), rows]),
    ]
    for width, dtype in ((8192, "float32"), (8192, "bfloat16"), (8191, "bfloat16")):
        x = ((64, width), dtype)
        cases += [("take_rows", [x, rows, of_slots]), ("sum_rows", [x, back, weights])]
        cases += [("dot_rows", [x, x, back])] if width % 128 == 0 else []
    for (name, arguments), (spilled, names) in zip(cases, results(PROGRAM, cases), strict=True):
        assert spilled == 0, (name, arguments)
        assert not {"STL", "LDL"} & set(names), (name, arguments)


def assert_compiled(op: str, shape: Shape, report: dict) -> None:
    [kernel] = report["compiled"]
    counts = Counter(kernel["instructions"])
    spans = len(tiles.spans(shape.width, jnp.dtype(shape.dtype).itemsize))
    # What a reduction to one number goes through, and nothing else.
    assert kernel["shared_memory_bytes"] == (2048 if op == "dot_rows" else 0)
    # A thread's instructions for a row: 7 of 16 or 8 bytes, and where columns are left over one.
    assert shape.width // 1024 == 7
    of_row = 7 + spans - 1
    # Indices and weights come one by one, or as many at once as the compiler likes.
    tables = 1 + (op == "sum_rows" and shape.has_weights)
    most_scalars = 1 if op == "take_rows" else tables * shape.top_k
    rows = {"take_rows": 1, "sum_rows": shape.top_k, "dot_rows": shape.top_k + 1}[op]
    assert tables <= counts["LDG"] - rows * of_row <= most_scalars
    # Rows that are taken have an empty slot's zeros besides.
    stores = {"take_rows": 2 * of_row, "sum_rows": of_row, "dot_rows": shape.top_k}[op]
    assert counts["STG"] == stores
    # All programs that have room, a row each, are under way at once.
    row_bytes = shape.width * jnp.dtype(shape.dtype).itemsize
    assert tiles.programs_per_sm(kernel["registers"]) * row_bytes >= 50_000
    shares = report["shares"]
    assert shares["issue"] == shares["latency"] == 1 and shares["ends"] >= 0.95
    assert min(shares.values()) >= 0.85
