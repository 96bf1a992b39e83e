"""The products of groups against float64 products, group by group, of what the operands are."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_kernels.grouped_gemm import bench, op, schedule, shapes, xla
from tests.kernels.test_fp8_gemm import matrix, operand, relative_error
from tests.kernels.test_quantize import BLOCK, ROW

ON_CPU = ["reference", "xla"]
LARGEST_ERROR = {"float32": 1e-6, "bfloat16": 3e-3}
"""Relative, in the Frobenius norm: 2e-7 and 1.7e-3 were measured."""
ROWS = 300
SIZES = {
    "even": [100, 100, 100],
    "skewed": [1, 295, 4],
    "all in one": [0, 300, 0],
    "rows left over": [70, 0, 33],
    "none": [0, 0, 0],
}
by_sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
by_implementation = pytest.mark.parametrize("implementation", ON_CPU)


def spans(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def ragged_rows_by_hand(a: np.ndarray, b: np.ndarray, sizes: list[int]) -> np.ndarray:
    """a b^T in float64."""
    out = np.zeros((a.shape[0], b.shape[1]))
    for group, span in enumerate(spans(sizes)):
        out[span] = a[span].astype(np.float64) @ b[group].T.astype(np.float64)
    return out


def ragged_k_by_hand(a: np.ndarray, b: np.ndarray, sizes: list[int]) -> np.ndarray:
    """a^T b in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.stack([a[span].T @ b[span] for span in spans(sizes)])


def plain(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    """Values of `dtype`, of different sizes."""
    return matrix(shape, seed).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def assert_equal(found: jax.Array, expected: np.ndarray) -> None:
    if not expected.any():
        np.testing.assert_array_equal(np.asarray(found, np.float64), expected)
    else:
        assert relative_error(found, expected) <= LARGEST_ERROR[found.dtype.name]


@by_implementation
@by_sizes
@pytest.mark.parametrize(("dtype", "transpose_b"), [("float32", False), ("bfloat16", True)])
def test_ragged_rows(sizes, dtype, transpose_b, implementation):
    a, b = plain((ROWS, 40), 0, dtype), plain((3, 24, 40), 1, dtype)
    given = jnp.asarray(np.swapaxes(b, 1, 2) if transpose_b else b)
    options = dict(transpose_b=transpose_b, implementation=implementation)
    found = op.ragged_rows(jnp.asarray(a), given, jnp.asarray(sizes), dtype, **options)
    assert found.dtype == dtype
    assert_equal(found, ragged_rows_by_hand(a, b, sizes))


@by_implementation
@by_sizes
def test_ragged_rows_in_fp8(sizes, implementation):
    a, a_scale, a_stands_for = operand((ROWS, 300), ROW)
    b, b_scale, b_stands_for = operand((3, 150, 300), BLOCK, seed=1)
    options = dict(scales=(a_scale, b_scale), implementation=implementation)
    found = op.ragged_rows(a, b, jnp.asarray(sizes), "float32", **options)
    assert_equal(found, ragged_rows_by_hand(a_stands_for, b_stands_for, sizes))


@by_implementation
@pytest.mark.parametrize("precision", ["bfloat16", "fp8"])
@pytest.mark.parametrize("sizes", [[0, 50, 1], [50, 50, 50], [0, 0, 0], [7, 32, 33]])
def test_masked_rows(sizes, precision, implementation):
    if precision == "fp8":
        a, a_scale, a_stands_for = operand((3, 50, 140), ROW)
        b, b_scale, b_stands_for = operand((3, 24, 140), BLOCK, seed=1)
        scales = a_scale, b_scale
    else:
        a_stands_for, b_stands_for = (
            plain((3, 50, 40), 0, precision),
            plain((3, 24, 40), 1, precision),
        )
        a, b, scales = jnp.asarray(a_stands_for), jnp.asarray(b_stands_for), None
    options = dict(scales=scales, implementation=implementation)
    found = op.masked_rows(a, b, jnp.asarray(sizes), "float32", **options)
    assert found.shape == (3, 50, 24)
    for group, size in enumerate(sizes):
        left, right = (x[group].astype(np.float64) for x in (a_stands_for, b_stands_for))
        assert_equal(found[group, :size], left[:size] @ right.T)


@by_implementation
@by_sizes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_k(sizes, dtype, implementation):
    a, b = plain((ROWS, 40), 0, dtype), plain((ROWS, 24), 1, dtype)
    operands = jnp.asarray(a), jnp.asarray(b), jnp.asarray(sizes)
    found = op.ragged_k(*operands, "float32", implementation=implementation)
    assert_equal(found, ragged_k_by_hand(a, b, sizes))


@by_implementation
@pytest.mark.parametrize("sizes", [[128, 256, 128], [0, 640, 0], [0, 128, 0]])
def test_ragged_k_in_fp8(sizes, implementation):
    a, a_scale, a_stands_for = operand((20, 640), ROW)
    b, b_scale, b_stands_for = operand((30, 640), ROW, seed=1)
    options = dict(scales=(a_scale, b_scale), alignment=128, implementation=implementation)
    found = op.ragged_k(a, b, jnp.asarray(sizes), "float32", **options)
    assert_equal(found, ragged_k_by_hand(a_stands_for.T, b_stands_for.T, sizes))


@pytest.mark.parametrize(
    ("implementation", "transpose_b"), [(None, False), ("reference", False), ("xla", True)]
)
def test_gradients_of_ragged_rows(implementation, transpose_b):
    """Of a sum weighted by dy: dy b, and dy^T a, by group; rows past all groups count nothing."""
    sizes = SIZES["rows left over"]
    a, b, dy = (matrix(shape, i) for i, shape in enumerate([(ROWS, 40), (3, 24, 40), (ROWS, 24)]))

    def weighted(a, b):
        b = jnp.swapaxes(b, 1, 2) if transpose_b else b
        options = dict(transpose_b=transpose_b, implementation=implementation)
        return jnp.sum(op.ragged_rows(a, b, jnp.asarray(sizes), "float32", **options) * dy)

    da, db = jax.jit(jax.grad(weighted, argnums=(0, 1)))(jnp.asarray(a), jnp.asarray(b))
    assert_equal(da, ragged_rows_by_hand(dy, np.swapaxes(b, 1, 2), sizes))
    assert_equal(db, ragged_k_by_hand(dy, a, sizes))


def test_gradients_are_in_the_operands_dtype():
    a, b = jnp.ones((4, 8), jnp.bfloat16), jnp.ones((2, 8, 8), jnp.float32)
    gradients = jax.grad(
        lambda a, b: op.ragged_rows(a, b, jnp.asarray([3, 1]), "float32").sum(), argnums=(0, 1)
    )(a, b)
    assert [x.dtype.name for x in gradients] == ["bfloat16", "float32"]


def test_the_default():
    """In BF16, which the kernel has, so that the platform chooses."""
    a, b = plain((128, 64), 0, "bfloat16"), plain((2, 32, 64), 1, "bfloat16")
    operands, sizes = (jnp.asarray(a), jnp.asarray(b)), [64, 0]
    expected = ragged_rows_by_hand(a, b, sizes)
    found = op.ragged_rows(*operands, jnp.asarray(sizes), "float32", alignment=64)
    assert_equal(found, expected)
    found = op.masked_rows(operands[0][None], operands[1][:1], jnp.asarray([64]), "float32")
    assert_equal(found[0, :64], expected[:64])
    found = op.ragged_k(operands[0], operands[0], jnp.asarray(sizes), "float32", alignment=64)
    assert_equal(found, ragged_k_by_hand(a, a, sizes))


@by_implementation
def test_rows_of_others_are_seen(implementation):
    """The assertion of the tests above fails where one row too many goes to a group."""
    a, b = matrix((ROWS, 40), 0), matrix((3, 24, 40), 1)
    operands = jnp.asarray(a), jnp.asarray(b), jnp.asarray([100, 100, 100])
    found = op.ragged_rows(*operands, "float32", implementation=implementation)
    with pytest.raises(AssertionError):
        assert_equal(found, ragged_rows_by_hand(a, b, [101, 99, 100]))


@by_implementation
@pytest.mark.parametrize("which", [0, 1])
def test_two_scales_swapped_are_seen(which, implementation):
    a, a_scale, a_stands_for = operand((ROWS, 300), ROW)
    b, b_scale, b_stands_for = operand((3, 150, 300), BLOCK, seed=1)
    scales = [np.array(a_scale), np.array(b_scale)]
    scales[which][:2] = scales[which][1::-1]
    options = dict(scales=tuple(map(jnp.asarray, scales)), implementation=implementation)
    found = op.ragged_rows(a, b, jnp.asarray([100, 100, 100]), "float32", **options)
    with pytest.raises(AssertionError):
        assert_equal(found, ragged_rows_by_hand(a_stands_for, b_stands_for, [100, 100, 100]))


def test_nan_past_the_groups_goes_nowhere():
    a, b = matrix((ROWS, 40), 0), matrix((3, 24, 40), 1)
    sizes = SIZES["rows left over"]
    a[sum(sizes) :] = np.nan
    for implementation in ON_CPU:
        operands = jnp.asarray(a), jnp.asarray(b), jnp.asarray(sizes)
        found = op.ragged_rows(*operands, "float32", implementation=implementation)
        assert_equal(found, ragged_rows_by_hand(a, b, sizes))
        dw = op.ragged_k(
            operands[0], operands[0], operands[2], "float32", implementation=implementation
        )
        assert_equal(dw, ragged_k_by_hand(a, a, sizes))


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_nothing_at_all(implementation):
    none, options = jnp.zeros((0,), jnp.int32), dict(implementation=implementation)
    found = op.ragged_rows(jnp.ones((2, 8)), jnp.ones((0, 4, 8)), none, "float32", **options)
    np.testing.assert_array_equal(found, np.zeros((2, 4)))
    sizes = jnp.zeros((3,), jnp.int32)
    found = op.ragged_rows(jnp.ones((0, 8)), jnp.ones((3, 4, 8)), sizes, "float32", **options)
    assert found.shape == (0, 4)
    found = op.masked_rows(jnp.ones((3, 0, 8)), jnp.ones((3, 4, 8)), sizes, "float32", **options)
    assert found.shape == (3, 0, 4)
    found = op.ragged_k(jnp.ones((0, 8)), jnp.ones((0, 4)), sizes, "float32", **options)
    np.testing.assert_array_equal(found, np.zeros((3, 8, 4)))


@pytest.mark.parametrize(
    "sizes", [[0, 2011, 37], [700, 640, 708], [400, 1300, 1], [0, 0, 0]], ids=str
)
def test_blocks_of_all_heights(sizes):
    """Of 64 to 2,048 rows, whole ones and not; with and without rows in common; to the last row."""
    rows, dtype = 2048, "float32"
    a, b, dy = (plain(s, i, dtype) for i, s in enumerate([(rows, 40), (3, 24, 40), (rows, 24)]))
    found = op.ragged_rows(jnp.asarray(a), jnp.asarray(b), jnp.asarray(sizes), dtype)
    assert_equal(found, ragged_rows_by_hand(a, b, sizes))
    found = op.ragged_k(jnp.asarray(dy), jnp.asarray(a), jnp.asarray(sizes), dtype)
    assert_equal(found, ragged_k_by_hand(dy, a, sizes))


@pytest.mark.parametrize(
    ("heights", "size", "expected"),
    [
        ([512, 256, 128, 64], 1600, [512, 512, 512, 64]),
        ([512, 256, 128, 64], 500, [256, 256]),
        ([512, 256, 128, 64], 130, [256]),
        ([512, 256, 128, 64], 1, [64]),
        ([512, 256, 128, 64], 0, []),
        ([40], 90, [40, 40, 40]),
    ],
)
def test_the_blocks_of_a_group(heights, size, expected):
    """One that is not whole rather than two of half the rows."""

    def do_block(height, start, end, is_whole, found):
        count, heights, starts = found
        return count + 1, heights.at[count].set(height), starts.at[count].set(start)

    none = jnp.zeros((), int), jnp.zeros((8,), int), jnp.zeros((8,), int)
    over = partial(xla._over_blocks, heights, do_block=do_block, carry=none)
    count, found, starts = jax.jit(over)(jnp.asarray(100), jnp.asarray(100 + size))
    assert found[:count].tolist() == expected
    ends = np.cumsum([100, *expected])
    assert starts[:count].tolist() == ends[:-1].tolist()


def test_the_rows_of_a_block_that_are_its_own():
    """Of 32 rows from 290 on of 300: it begins at 268, and has those from 290 to 295."""
    start, is_own = xla._clamped(32, jnp.int32(290), jnp.int32(295), 300)
    assert int(start) == 268
    assert np.flatnonzero(is_own[:, 0]).tolist() == [22, 23, 24, 25, 26]


# Jitted: op by op they take seconds.
ragged_rows_schedule = jax.jit(schedule.ragged_rows, static_argnums=(1, 2, 3, 4))
masked_rows_schedule = jax.jit(schedule.masked_rows, static_argnums=(1, 2, 3, 4))
ragged_k_schedule = jax.jit(schedule.ragged_k, static_argnums=(1, 2))


def by_hand(sizes: list[int], firsts: list[int], tile: int, steps: int) -> list[list[int]]:
    entries = []
    for group, (first, size) in enumerate(zip(firsts, sizes, strict=True)):
        rows = {row // tile * tile for row in range(first, first + size)}
        entries += [[group, row, first, first + size, steps] for row in sorted(rows)]
    return entries


@by_sizes
@pytest.mark.parametrize("tile", [128, 64])
def test_the_schedule_of_ragged_rows(sizes, tile):
    found = ragged_rows_schedule(jnp.asarray(sizes), ROWS, tile, 1, 7).tolist()
    rest = ROWS - sum(sizes)
    with_rest = by_hand([*sizes, rest], [span.start for span in spans([*sizes, rest])], tile, 7)
    expected = [[*entry[:4], 0] if entry[0] == 3 else entry for entry in with_rest]
    expected = [[min(entry[0], 2), *entry[1:]] for entry in expected]
    assert found[-1][0] == len(expected) < len(found)
    assert found[: len(expected)] == expected


def test_the_schedule_of_padded_groups_has_no_room_to_spare():
    found = ragged_rows_schedule(jnp.asarray([128, 0, 256]), 500, 128, 128, 7).tolist()
    assert found == [
        [0, 0, 0, 128, 7],
        [2, 128, 128, 384, 7],
        [2, 256, 128, 384, 7],
        [2, 384, 384, 500, 0],
        [4] * 5,
    ]


def test_the_schedule_of_more_rows_than_there_are_is_cut():
    found = np.asarray(ragged_rows_schedule(jnp.asarray([100, 900]), 256, 128, 1, 2))
    assert found[: found[-1, 0], schedule.END].max() == 256


@pytest.mark.parametrize(
    ("max_rows", "ends"), [(128, [0, 64, 64]), (200, [0, 50, 1]), (50, [0, 50, 1])]
)
def test_the_schedule_of_masked_rows(max_rows, ends):
    """Stores of 64 rows are whole where groups begin at multiples of 64."""
    found = masked_rows_schedule(jnp.asarray([0, 50, 1]), max_rows, 128, 64, 7).tolist()
    expected = by_hand(ends, [0, max_rows, 2 * max_rows], 128, 7)
    assert found[-1][0] == len(expected) <= len(found) - 1
    assert found[: len(expected)] == expected


def test_the_schedule_of_ragged_k():
    found = ragged_k_schedule(jnp.asarray([128, 0, 256]), 512, 64).tolist()
    assert found == [[0, 0, 0, 128, 2], [1, 0, 128, 128, 0], [2, 0, 128, 384, 4], [3] * 5]


def test_an_unknown_implementation_is_named():
    a, b, sizes = jnp.ones((2, 8)), jnp.ones((1, 4, 8)), jnp.asarray([2])
    with pytest.raises(ValueError, match="implementation is 'triton', expected one of reference"):
        op.ragged_rows(a, b, sizes, "float32", implementation="triton")


@pytest.mark.parametrize(
    ("form", "a", "b", "groups", "options", "message"),
    [
        ("ragged_rows", (9, 8), (3, 4, 7), 3, {}, r"a is \[9, 8\] and b \[3, 4, 7\], expected the"),
        (
            "ragged_rows",
            (9, 8),
            (3, 4, 8),
            2,
            {},
            r"and group_sizes \[2\], expected as many groups",
        ),
        (
            "ragged_rows",
            (9, 8),
            (3, 4, 8),
            3,
            dict(alignment=0),
            "alignment is 0, expected at least",
        ),
        ("masked_rows", (2, 9, 8), (3, 4, 8), 3, {}, r"a is \[2, 9, 8\], b \[3, 4, 8\] and"),
        ("ragged_k", (9, 8), (8, 4), 3, {}, r"a is \[9, 8\] and b \[8, 4\], expected as many rows"),
    ],
)
def test_shapes_that_do_not_fit_are_named(form, a, b, groups, options, message):
    """Without the checks of annotations, which tests alone have."""
    arrays = jnp.ones(a), jnp.ones(b), jnp.ones((groups,), jnp.int32)
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(getattr(op, form))(*arrays, "float32", **options)


@pytest.mark.parametrize(
    ("form", "a_scale", "b_scale", "options", "message"),
    [
        (
            "ragged_rows",
            (4, 2),
            (3, 2, 3),
            {},
            r"scale of a \[4, 300\] is \[4, 2\], expected \[4, 3\]",
        ),
        (
            "ragged_rows",
            (4, 3),
            (3, 1, 3),
            {},
            r"scale of b .* is \[3, 1, 3\], expected \[3, 2, 3\]",
        ),
        ("ragged_rows", (4, 3), (3, 2, 3), dict(transpose_b=True), "transpose_b is True, expected"),
        ("ragged_k", (4, 3), (4, 2), dict(alignment=128), r"scale of b .* expected \[4, 3\]"),
        ("ragged_k", (4, 3), (4, 3), dict(alignment=64), "alignment is 64, expected a multiple of"),
    ],
)
def test_scales_that_do_not_fit_are_named(form, a_scale, b_scale, options, message):
    a = jnp.zeros((4, 300), jnp.float8_e4m3fn)
    of_groups = (3, 300, 200) if "transpose_b" in options else (3, 200, 300)
    b = a if form == "ragged_k" else jnp.zeros(of_groups, jnp.float8_e4m3fn)
    scales = jnp.ones(a_scale), jnp.ones(b_scale)
    arrays = a, b, jnp.asarray([2, 0, 2])
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(getattr(op, form))(*arrays, "float32", scales=scales, **options)


@pytest.mark.slow
def test_the_bench_on_cpu(monkeypatch, capsys):
    shape = shapes.Shape(name="of 3", rows=96, groups=3, n=8, k=16)
    monkeypatch.setattr(shapes, "ON_CPU", [shape])
    bench.main(["--repeats", "1"])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header == "| product | dense, GFLOP/s | even | mild | skewed | two | one |"
    cells = [line.strip("| ").split(" | ") for line in lines]
    assert [row[0] for row in cells] == ["of 3 forward", "of 3 dx", "of 3 dw"]
    assert all(len(row) == 7 and min(map(float, row[1:])) >= 0 for row in cells)


def test_the_spreads_of_the_bench_are_of_all_rows():
    found = bench.spreads(8192, 16)
    assert [sizes.sum() for sizes in found.values()] == [8192] * 5
    assert [np.count_nonzero(found[name]) for name in ("even", "two", "one")] == [16, 2, 1]
    largest = [sizes.max() for sizes in found.values()]
    assert largest == sorted(largest)


def test_a_bench_of_no_runs_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--repeats", "0"])
    assert "--repeats is 0, expected at least 1" in capsys.readouterr().err
