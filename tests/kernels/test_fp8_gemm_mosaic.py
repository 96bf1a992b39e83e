"""The Hopper kernel of fp8_gemm: raced on the CPU, compiled for sm_90a, against the reference."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.fp8_gemm import mosaic_sm90, reference, shapes, tiles
from dsv3_kernels.fp8_gemm.tiles import SQUARE, WIDE, Tiles
from dsv3_kernels.quantize.reference import quantize
from tests.kernels.compiled import compiled_cases

LARGEST_ERROR = {"bfloat16": 1e-3, "float32": 1e-5}
"""Relative, in the Frobenius norm; in the worst row four times that."""
BLOCKS, ROWS = (128, 128), (1, 128)
SMALL_WIDE = Tiles(n=192, stages=2, store_slots=1, programs=2, band=2)
SMALL_SQUARE = Tiles(n=128, stages=2, store_slots=2, cluster=1, programs=3, band=2)


def operands(batch: tuple[int, ...], m: int, n: int, k: int, b_tile: tuple[int, int]):
    """Quantised matrices whose scales differ by orders of magnitude."""
    keys = jax.random.split(jax.random.key(m + n + k), 4)
    a, b = (jax.random.normal(keys[i], (*batch, size, k)) for i, size in enumerate((m, n)))
    a *= jnp.exp2(jax.random.randint(keys[2], (*batch, m, 1), -3, 4).astype(jnp.float32))
    b *= jnp.exp2(jax.random.randint(keys[3], (*batch, 1, k), -3, 4).astype(jnp.float32))
    return *quantize(a), *quantize(b, b_tile)


def raced(*arguments, tiles: Tiles) -> jax.Array:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return mosaic_sm90.gemm(*arguments, tiles=tiles)


def assert_close(got: jax.Array, want: jax.Array) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    largest = LARGEST_ERROR[got.dtype.name]
    error = np.asarray(got, np.float64) - np.asarray(want, np.float64)
    norms = np.linalg.norm(np.asarray(want, np.float64), axis=-1)
    of_rows = np.linalg.norm(error, axis=-1)
    assert np.linalg.norm(of_rows) <= largest * np.linalg.norm(norms)
    assert (of_rows <= 4 * largest * norms).all()


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("batch", "m", "n", "k", "b_tile", "out_dtype", "small"),
    [
        # Two pairs of tiles for one cluster, the last columns of which are past the edge; stages
        # and slots of shared memory are used again; a tile begins in the midst of a block.
        ((), 256, 320, 384, BLOCKS, "bfloat16", SMALL_WIDE),
        # Edges in every dim: rows, columns, half a tile of k. Four tiles for three programs.
        slow((), 136, 192, 320, BLOCKS, "float32", SMALL_SQUARE),
        slow((2, 1), 136, 192, 320, ROWS, "float32", SMALL_WIDE),
        # Sizes that TMA cannot tile, filled up outside.
        slow((), 12, 20, 100, ROWS, "float32", SMALL_SQUARE),
    ],
)
def test_the_product_is_the_references(batch, m, n, k, b_tile, out_dtype, small):
    arguments = operands(batch, m, n, k, b_tile)
    got = raced(*arguments, out_dtype, tiles=small)
    assert_close(got, reference.gemm(*arguments, out_dtype))


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("which", "out_dtype"), [("a_scale", "bfloat16"), slow("b_scale", "float32")]
)
def test_two_scales_swapped_are_seen(which, out_dtype):
    a, a_scale, b, b_scale = operands((), 128, 128, 256, ROWS)
    right = reference.gemm(a, a_scale, b, b_scale, out_dtype)
    if which == "a_scale":
        a_scale = a_scale.at[:2, 0].set(a_scale[1::-1, 0])
    else:
        b_scale = b_scale.at[:2, 0].set(b_scale[1::-1, 0])
    got = raced(a, a_scale, b, b_scale, out_dtype, tiles=SMALL_SQUARE)
    assert_close(got, reference.gemm(a, a_scale, b, b_scale, out_dtype))
    with pytest.raises(AssertionError):
        assert_close(got, right)


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    model = shapes.FORWARD + shapes.INPUT_GRADIENT + shapes.WEIGHT_GRADIENT
    for shape, report in zip(model, compiled_cases("fp8_gemm"), strict=True):
        chosen = tiles.choose(1, shape.m, shape.n, shape.b_in_rows)
        [kernel] = report["compiled"]
        counts, loop = kernel["instructions"], kernel["main_loop"]
        assert kernel["registers"] == 168  # of which set_max_registers' numbers are made
        assert kernel["shared_memory_bytes"] - chosen.shared_memory_bytes <= 1024
        steps = loop["instructions"]["QGMMA"] // 4
        if shape.k > 5 * 128:  # a loop of fewer steps may be unrolled
            assert steps == 1
        assert counts["UTMALDG"] >= 4  # a, b and their scales
        assert counts["UTMASTG"] > 0
        assert loop["instructions"]["QGMMA"] == 4 * steps > 0
        assert not {"HGMMA", "HMMA"} & set(counts)
        assert loop["tensor_cycles"] == steps * 4 * chosen.n / 2
        assert loop["operand_bytes"] == steps * (64 + chosen.n) * 128
        # Sums are added under the other warpgroup's wgmma.
        assert report["shares"]["loop: issue"] == 1
        assert report["shares"]["loop: shared memory"] >= 0.7, shape


def test_tiles_are_chosen_by_rounds():
    assert tiles.choose(1, 4096, 2048, b_in_rows=False) == WIDE
    assert WIDE.rounds(1, 4096, 2048) == 3  # 16 x 11 pairs of tiles for 66 clusters
    assert tiles.choose(1, 4096, 512, b_in_rows=False) == SQUARE  # 64 pairs, all at once
    assert tiles.choose(1, 64, 24576, b_in_rows=False).cluster == 1  # no tiles to pair


def test_the_share_of_peak_has_closed_forms():
    # All of a round's tiles needed, no value past an edge: shared memory alone is the bound.
    assert WIDE.share_of_peak(1, 128 * 132, 192, b_in_rows=False) == pytest.approx(768 / 832)
    assert SQUARE.share_of_peak(66, 256, 128, b_in_rows=True) == pytest.approx(512 / 768)
    assert WIDE.share_of_peak(1, 128, 192, b_in_rows=False) == pytest.approx(768 / 832 / 132)
    # Without a pair to share b, L2 is: 40 KB at 5,120 bytes a cycle for 132.
    alone = replace(WIDE, cluster=1).share_of_peak(132, 128, 192, b_in_rows=False)
    assert alone == pytest.approx(768 / (40 * 1024 * 132 / 5120))


def test_tiles_that_cannot_be():
    with pytest.raises(ValueError, match="n is 256, expected 128 or 192"):
        Tiles(n=256, stages=4, store_slots=1)
    with pytest.raises(ValueError, match="stages is 0, expected at least 1"):
        Tiles(n=128, stages=0, store_slots=1)
    with pytest.raises(ValueError, match="store_slots is 3, expected a divisor of n / 64 = 2"):
        Tiles(n=128, stages=4, store_slots=3)
    with pytest.raises(ValueError, match="cluster is 2, expected 1 or 2 and a divisor of 3"):
        Tiles(n=128, stages=4, store_slots=1, programs=3)
    with pytest.raises(
        ValueError, match=r"take 2\d+ bytes of shared memory, expected at most 2324"
    ):
        Tiles(n=192, stages=6, store_slots=1)


def test_what_the_kernel_will_not_take():
    a, a_scale, b, b_scale = operands((), 8, 8, 128, ROWS)
    assert mosaic_sm90.unsupported(a, a_scale, b, b_scale, jnp.bfloat16) == ""
    wide = a.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="a is bfloat16, expected float8_e4m3fn"):
        mosaic_sm90.gemm(wide, a_scale, b, b_scale, jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="out_dtype is float16, expected bfloat16 or"):
        mosaic_sm90.gemm(a, a_scale, b, b_scale, jnp.float16)
    reason = mosaic_sm90.unsupported(a[:0], a_scale[:0], b, b_scale, jnp.float32)
    assert reason == "a is [0, 128], expected at least one value"
