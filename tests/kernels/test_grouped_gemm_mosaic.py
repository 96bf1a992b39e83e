"""The Hopper kernel of grouped_gemm: raced on CPU, compiled for sm_90a, against the reference."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.grouped_gemm import mosaic_sm90, reference, shapes
from dsv3_kernels.grouped_gemm.bench import chosen_tiles, group_rows
from dsv3_kernels.grouped_gemm.tiles import (
    MIDDLE_BF16,
    SQUARE_FP8,
    WIDE_BF16,
    WIDE_FP8,
    Tiles,
)
from dsv3_kernels.quantize.reference import quantize
from tests.kernels.compiled import compiled_cases
from tests.kernels.test_fp8_gemm_mosaic import assert_close

BLOCKS, IN_ROWS = (128, 128), (1, 128)
ALONE = Tiles(n=128, stages=2, store_slots=2, cluster=1, programs=3, band=2)
PAIRS = Tiles(n=128, stages=2, store_slots=2, programs=2, band=2)
WIDE_PAIRS = Tiles(n=192, stages=2, store_slots=3, programs=2, band=2)


def values(shape: tuple[int, ...], seed: int) -> jax.Array:
    """Whose rows differ by orders of magnitude."""
    keys = jax.random.split(jax.random.key(seed))
    sizes = jax.random.randint(keys[0], (*shape[:-1], 1), -3, 4)
    return jax.random.normal(keys[1], shape) * jnp.exp2(sizes.astype(jnp.float32))


def operands(a: tuple[int, ...], b: tuple[int, ...], b_tile: tuple[int, int] | None):
    """BF16 values, or E4M3 where a tile is given, and scales."""
    if b_tile is None:
        return values(a, 0).astype(jnp.bfloat16), values(b, 1).astype(jnp.bfloat16), None
    (a_values, a_scale), (b_values, b_scale) = (
        quantize(values(a, 0)),
        quantize(values(b, 1), b_tile),
    )
    return a_values, b_values, (a_scale, b_scale)


def raced(form: str, a, b, sizes, scales, out_dtype, **options) -> jax.Array:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        kernel = getattr(mosaic_sm90, form)
        return kernel(a, b, jnp.asarray(sizes), scales, out_dtype, **options)


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "sizes", "n", "k", "b_tile", "out_dtype", "options"),
    [
        # Three groups meet in one tile, one of them empty; the last rows are nobody's. Two pairs of
        # tiles of columns, of which the last is past the edge.
        slow(200, [130, 0, 1, 60], 328, 200, None, "bfloat16", dict(tiles=PAIRS)),
        slow(200, [0, 0, 200], 192, 320, BLOCKS, "bfloat16", dict(tiles=WIDE_PAIRS)),
        slow(200, [3, 61, 64, 0, 7], 320, 384, BLOCKS, "float32", dict(tiles=WIDE_PAIRS)),
        slow(136, [5, 131], 128, 136, None, "float32", dict(tiles=ALONE, transpose_b=True)),
        # Padded groups, stored whole.
        (320, [128, 0, 128], 128, 256, BLOCKS, "float32", dict(tiles=ALONE, alignment=128)),
        slow(320, [64, 192], 256, 128, None, "bfloat16", dict(tiles=WIDE_PAIRS, alignment=64)),
        slow(12, [5, 4], 20, 100, BLOCKS, "float32", dict(tiles=ALONE)),
        slow(64, [0, 0], 128, 128, None, "float32", dict(tiles=ALONE)),
    ],
)
def test_ragged_rows_are_the_references(rows, sizes, n, k, b_tile, out_dtype, options):
    a, b, scales = operands((rows, k), (len(sizes), n, k), b_tile)
    given = jnp.swapaxes(b, 1, 2) if options.get("transpose_b") else b
    got = raced("ragged_rows", a, given, sizes, scales, out_dtype, **options)
    want = reference.ragged_rows(a, b, jnp.asarray(sizes), scales, out_dtype)
    assert_close(got, want)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("max_rows", "sizes", "b_tile", "out_dtype", "small"),
    [
        slow(72, [72, 0, 65], BLOCKS, "bfloat16", ALONE),  # groups meet in tiles
        slow(64, [64, 0, 1], None, "float32", PAIRS),  # and where warpgroups do
        slow(128, [100, 128, 0], BLOCKS, "bfloat16", PAIRS),
    ],
)
def test_masked_rows_are_the_references(max_rows, sizes, b_tile, out_dtype, small):
    a, b, scales = operands((3, max_rows, 256), (3, 192, 256), b_tile)
    got = raced("masked_rows", a, b, sizes, scales, out_dtype, tiles=small)
    want = reference.masked_rows(a, b, jnp.asarray(sizes), scales, out_dtype)
    assert got.shape == want.shape
    for group, size in enumerate(sizes):
        assert_close(got[group, :size], want[group, :size])


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("rows", "sizes", "b_tile", "out_dtype", "alignment", "small"),
    [
        (320, [128, 0, 64], None, "float32", 64, PAIRS),
        slow(192, [64, 128], None, "bfloat16", 64, WIDE_PAIRS),
        slow(640, [256, 0, 128], IN_ROWS, "float32", 128, ALONE),
        slow(300, [0, 256], IN_ROWS, "bfloat16", 128, WIDE_PAIRS),
    ],
)
def test_ragged_k_is_the_references(rows, sizes, b_tile, out_dtype, alignment, small):
    a, b, scales = operands((136, rows), (200, rows), b_tile)
    given = (a.T, b.T) if scales is None else (a, b)
    options = dict(alignment=alignment, tiles=small)
    got = raced("ragged_k", *given, sizes, scales, out_dtype, **options)
    want = reference.ragged_k(a, b, jnp.asarray(sizes), scales, out_dtype)
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.interpret
@pytest.mark.parametrize("which", ["a row", "a_scale", "b_scale"])
def test_what_is_swapped_is_seen(which):
    a, b, scales = operands((136, 256), (2, 256, 256), BLOCKS)
    assert scales is not None
    sizes = jnp.asarray([70, 66])
    right = reference.ragged_rows(a, b, sizes, scales, "float32")
    if which == "a row":
        sizes = jnp.asarray([71, 65])
    elif which == "a_scale":
        scales = scales[0].at[:2, 0].set(scales[0][1::-1, 0]), scales[1]
    else:
        scales = scales[0], scales[1].at[0, :2].set(scales[1][0, 1::-1])
    got = raced("ragged_rows", a, b, sizes, scales, "float32", tiles=PAIRS)
    assert_close(got, reference.ragged_rows(a, b, sizes, scales, "float32"))
    with pytest.raises(AssertionError):
        assert_close(got, right)


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    model = (*shapes.FP8, *shapes.BF16)
    for shape, report in zip(model, compiled_cases("grouped_gemm"), strict=True):
        mma, other = ("QGMMA", "HGMMA") if shape.is_fp8 else ("HGMMA", "QGMMA")
        used = chosen_tiles(shape)
        [kernel] = report["compiled"]
        counts, loop = kernel["instructions"], kernel["main_loop"]
        steps = loop["instructions"][mma] // 4
        assert kernel["registers"] == 168  # of which set_max_registers' numbers are made
        assert counts["UTMALDG"] >= (4 if shape.is_fp8 else 2)
        assert counts["UTMASTG"] > 0
        assert loop["instructions"][mma] == 4 * steps > 0
        assert not {other, "HMMA"} & set(counts)
        assert loop["tensor_cycles"] == steps * 4 * used.n / 2
        assert loop["operand_bytes"] == steps * (64 + used.n) * 128
        # Sums are added under the other warpgroup's wgmma.
        assert report["shares"]["loop: issue"] == 1
        assert report["shares"]["loop: shared memory"] >= 0.7, shape


# Masked rows are a few, and bound by the memory that weights are read from.
COMPUTING = [shape for shape in (*shapes.FP8, *shapes.BF16) if shape.form != "masked_rows"]


@pytest.mark.parametrize("shape", COMPUTING, ids=lambda shape: shape.name)
def test_the_predicted_share_of_peak(shape):
    """Edges, rounds and L2 counted; of groups of the same size."""
    b_in_rows = shape.form == "ragged_k" and shape.is_fp8
    share = chosen_tiles(shape).share_of_peak(group_rows(shape), shape.groups, shape.n, b_in_rows)
    # 2,048 columns are 5 1/3 pairs of tiles of 192: L2 bounds single ones, which fit better.
    assert share >= (0.69 if b_in_rows and shape.n == 2048 else 0.7)


def test_the_share_of_peak_has_closed_forms():
    # All of a round's tiles needed, no value past an edge. L2: 32 KB, 5,120 bytes a cycle for 132.
    l2_cycles = 32 * 1024 * 132 / 5120
    assert WIDE_FP8.share_of_peak(128, 66, 384, b_in_rows=False) == pytest.approx(768 / l2_cycles)
    alone = replace(WIDE_FP8, cluster=1)  # 40 KB
    assert alone.share_of_peak(128, 132, 192, False) == pytest.approx(768 / (l2_cycles * 40 / 32))
    # 40 KB too, but of 1,024 cycles of tensor core
    wide = WIDE_BF16.share_of_peak(128, 66, 512, b_in_rows=False)
    assert wide == pytest.approx(1024 / (l2_cycles * 40 / 32))
    # Shared memory is: 384 + 256 cycles, or with the scales of columns 128 more.
    assert SQUARE_FP8.share_of_peak(128, 66, 256, b_in_rows=False) == pytest.approx(512 / 640)
    assert SQUARE_FP8.share_of_peak(128, 66, 256, b_in_rows=True) == pytest.approx(512 / 768)
    # A group of one row takes a tile of 128.
    one_row = MIDDLE_BF16.share_of_peak(1, 66, 384, b_in_rows=False)
    assert one_row == pytest.approx(MIDDLE_BF16.share_of_peak(128, 66, 384, False) / 128)


def test_tiles_that_cannot_be():
    with pytest.raises(ValueError, match="n is 64, expected 128, 192 or 256"):
        Tiles(n=64, stages=4, store_slots=2)
    with pytest.raises(ValueError, match="store_slots is 1, expected at least 2"):
        Tiles(n=128, stages=4, store_slots=1)
    with pytest.raises(ValueError, match="cluster is 2, expected 1 or 2 and a divisor of 3"):
        Tiles(n=128, stages=4, store_slots=2, programs=3)
    with pytest.raises(ValueError, match="bytes of shared memory, expected at most 232448"):
        Tiles(n=256, stages=5, store_slots=2)


def test_what_the_kernel_will_not_take():
    a, b, scales = operands((8, 128), (1, 8, 128), BLOCKS)
    sizes = jnp.asarray([8])
    wide = a.astype(jnp.float32)
    with pytest.raises(NotImplementedError, match="a is float32, expected bfloat16"):
        mosaic_sm90.ragged_rows(wide, b, sizes, None, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="a is float32, expected float8_e4m3fn"):
        mosaic_sm90.ragged_rows(wide, b, sizes, scales, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="out_dtype is float16, expected bfloat16 or"):
        mosaic_sm90.masked_rows(a[None], b, sizes, scales, jnp.float16)
    narrow = wide.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="alignment is 1, expected a multiple of 64"):
        mosaic_sm90.ragged_k(narrow, narrow, sizes, None, jnp.float32)
    with pytest.raises(NotImplementedError, match=r"a is \[0, 128\], expected at least one value"):
        mosaic_sm90.ragged_rows(a[:0], b, sizes, scales, jnp.float32)


def test_the_kernels_cost_is_that_of_all_rows():
    a, b, _ = operands((256, 128), (2, 128, 128), None)
    jaxpr = str(
        jax.make_jaxpr(lambda a, b, s: mosaic_sm90.ragged_rows(a, b, s, None, jnp.bfloat16))(
            a, b, jnp.asarray([1, 2])
        )
    )
    bytes_accessed = 2 * (256 * 128 + 2 * 128 * 128 + 256 * 128)
    assert f"flops={2 * 256 * 128 * 128}" in jaxpr
    assert f"bytes_accessed={bytes_accessed}" in jaxpr
