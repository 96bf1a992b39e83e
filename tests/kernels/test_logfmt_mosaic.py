"""The Hopper kernels of LogFMT: raced on the CPU, compiled for sm_90a, byte by byte the
reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.logfmt import mosaic_sm90, op, tiles
from tests.kernels.compiled import compiled_cases

FMA_ERROR = 1e-5
"""Relative, in FP32: the reference, compiled, may fuse a product of up to 127 with its sum."""


def rows_of(shape: tuple[int, int], dtype: str) -> jax.Array:
    """Normal numbers over many orders of magnitude, and what may go wrong.

    Not in it, for codes tip: large constants in FP32 that are none in BF16. A code is then finer
    than the logarithm's last place, which on a CPU is another in a vector than by itself.
    """
    random = np.random.default_rng(sum(shape))
    x = random.normal(size=shape) * np.exp(3 * random.normal(size=shape))
    x[0], x[1], x[2] = 0, 0.3, 1.75 * 2.0**127
    x[3, :4] = [np.nan, np.inf, 0, -0.0]
    x[4, :3] = [np.inf, -np.inf, 1e-40]
    x[5] *= 1e-37
    x[6] *= np.exp2(random.uniform(-60, 0, size=shape[1]))
    return jnp.asarray(x, jnp.float32).astype(dtype)


def raced(function, *arguments):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return function(*arguments)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = [
    # One program, whose last threads have no tile.
    ((10, 512), "bfloat16", 10),
    slow((10, 512), "bfloat16", 8),
    slow((130, 128), "float32", 10),
    slow((32, 1024), "bfloat16", 10),
    slow((65, 256), "float32", 8),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "dtype", "bits"), CASES)
def test_bytes_are_the_references(shape, dtype, bits):
    x = rows_of(shape, dtype)
    got = raced(mosaic_sm90.encode, x, bits)
    want = op.encode(x, bits, implementation="reference")
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    np.testing.assert_array_equal(got, want)
    with pytest.raises(AssertionError):
        swapped = x.at[8:10].set(x[9:7:-1])
        np.testing.assert_array_equal(got, op.encode(swapped, bits, implementation="reference"))


@pytest.mark.interpret
@pytest.mark.parametrize(("shape", "dtype", "bits"), CASES)
def test_values_are_the_references(shape, dtype, bits):
    plain = functools.partial(op.decode, columns=shape[1], bits=bits, implementation="reference")
    packed = op.encode(rows_of(shape, dtype), bits, implementation="reference")
    # What a foreign sender may write: limits of zero, in the wrong order, all codes.
    packed = packed.at[7].set(
        np.random.default_rng(0).integers(256, size=packed.shape[1], dtype=np.uint8)
    )
    packed = packed.at[6, -2:].set(0)
    got = np.asarray(raced(mosaic_sm90.decode, packed, shape[1], bits, dtype))
    want = np.asarray(plain(packed, dtype=jnp.dtype(dtype)))
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if dtype == "bfloat16":
        is_nan = np.isnan(want)
        np.testing.assert_array_equal(np.isnan(got), is_nan)
        np.testing.assert_array_equal(got[~is_nan].view(np.uint16), want[~is_nan].view(np.uint16))
    else:
        np.testing.assert_allclose(got, want, rtol=FMA_ERROR)
    with pytest.raises(AssertionError):
        swapped = plain(packed.at[8:10].set(packed[9:7:-1]), dtype=jnp.dtype(dtype))
        np.testing.assert_allclose(got, swapped, rtol=0.1)


def test_the_middle_between_codes_is_the_closed_forms_last_place():
    """For all steps that 8 and 10 bits have, up to 32 / 126."""
    step = np.concatenate([np.geomspace(1e-7, 32 / 126, 10_000), 32 / np.array([510, 126])])
    exponent = step * np.log(2)
    want = np.log1p(np.expm1(exponent) / 2) / exponent
    got = jax.jit(mosaic_sm90.middle)(jnp.asarray(step, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=2**-23)


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    reports = compiled_cases("logfmt")
    assert len(reports) == 4
    for report in reports:
        [kernel] = report["compiled"]
        counts, is_encode = kernel["instructions"], report["case"].startswith("encode")
        bits = 10 if report["case"].endswith("in 10 bits") else 8
        assert (counts.get("UTMALDG", 0), counts.get("UTMASTG", 0)) == (is_encode, not is_encode)
        # A logarithm or exponential for each of a thread's values, and of its tile's limits.
        assert 0 <= counts["MUFU"] - 128 <= 4
        # Its words: to shared memory or from there, and past the other threads' to memory.
        words, vectors = tiles.words(bits), 2 * 128 // 16
        if is_encode:
            assert (counts["STS"], counts["STG"]) == (words, words)
            assert counts["LDS"] == words + 2 * vectors  # twice x
        else:
            assert (counts["LDG"], counts["LDS"]) == (words, words)
            assert counts["STS"] == words + vectors
        buffers = tiles.value_bytes(2) + tiles.coded_bytes(bits)
        assert buffers <= kernel["shared_memory_bytes"] <= buffers + 4096
        programs = tiles.programs_per_sm(kernel["shared_memory_bytes"], kernel["registers"])
        assert programs >= 3
        assert report["shares"]["issue"] == report["shares"]["latency"] == 1


def test_what_the_kernels_will_not_take():
    x = jnp.ones((2, 128))
    assert mosaic_sm90.unsupported(x.dtype, x.size, 10) == ""
    with pytest.raises(NotImplementedError, match="values are float16, expected bfloat16 or flo"):
        op.encode(x.astype(jnp.float16), 10, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="bits are 9, expected 8 or 10"):
        mosaic_sm90.encode(x, 9)
    with pytest.raises(NotImplementedError, match="there are no values, expected at least one"):
        mosaic_sm90.encode(x[:0], 8)
    packed = op.encode(x, 10, implementation="reference")
    with pytest.raises(NotImplementedError, match="LogFMT on Hopper: values are float16"):
        op.decode(packed, 128, 10, "float16", implementation="mosaic")
