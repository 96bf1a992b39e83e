"""The Hopper kernels of swiglu_quantize: raced on the CPU, compiled for sm_90a, as the reference
is.

In the interpreter the exponential is the CPU's own, so that bytes are the same; on a GPU its last
place, and a quotient's, may tip a rounding to BF16: see the test with other last places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsv3_kernels.quantize.op import quantize
from dsv3_kernels.swiglu_quantize import mosaic_sm90, op, reference, tiles
from tests.kernels.compiled import compiled_cases

FORMS = ("swiglu_quantize", "swiglu_quantize_transposed", "swiglu_backward")


def operands_of(shape: tuple[int, ...], dtype: str, filled: list[int] | None) -> list:
    """h, weights, d_a, filled; no weights where all rows are there."""
    random = np.random.default_rng(sum(shape))
    h = 4 * random.normal(size=shape) * np.exp(random.normal(size=shape))
    h[..., 1, :] = 0
    h[..., 2, : shape[-1] // 2] = -1000  # exp(-gate) overflows
    d_a = jnp.asarray(random.normal(size=(*shape[:-1], shape[-1] // 2)), dtype)
    if filled is None:
        return [jnp.asarray(h, dtype), None, d_a, None]
    weights = random.uniform(-0.1, 1, size=shape[:-1])
    for e, count in enumerate(filled):
        h[e, count:], weights[e, count:] = np.nan, np.inf
    weights = jnp.asarray(weights, jnp.float32)
    return [jnp.asarray(h, dtype), weights, d_a, jnp.asarray(filled, jnp.int32)]


def called(module, form: str, operands: list, **options):
    h, weights, d_a, filled = operands
    if form == "swiglu_backward":
        return getattr(module, form)(h, weights, d_a, filled, **options)
    return getattr(module, form)(h, weights, filled, **options)


def raced(form: str, operands: list, **options):
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        return called(mosaic_sm90, form, operands, **options)


def defined(form: str, operands: list, **options):
    return called(op, form, operands, implementation="reference", **options)


def assert_same_bits(got: jax.Array, want: jax.Array) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32}[got.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(got).view(unsigned), np.asarray(want).view(unsigned))


def assert_same(form: str, got: tuple, want: tuple) -> None:
    """But for the order in which a row's weight gradient is summed, and in FP32 last places."""
    if form != "swiglu_backward":
        assert_same_bits(got[0], want[0])
        assert_same_bits(got[1], want[1])
        return
    if got[0].dtype == jnp.bfloat16:
        assert_same_bits(got[0], want[0])
    else:
        np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)
    if want[1] is None:
        assert got[1] is None
    else:
        np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-3)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shape", "dtype", "filled", "power_of_two"),
    [
        # A tile that is whole, one with some rows, one with none; rows past the end.
        ((2, 150, 256), "bfloat16", [70, 150], False),
        slow((2, 150, 512), "float32", [0, 128], True),
        slow((200, 256), "bfloat16", None, True),
        # An F that is not whole tiles, filled up outside.
        slow((2, 1, 70, 200), "bfloat16", None, False),
        slow((70, 120), "float32", None, False),
    ],
)
def test_results_are_the_references(form, shape, dtype, filled, power_of_two):
    options = {} if form == "swiglu_backward" else {"power_of_two": power_of_two}
    operands = operands_of(shape, dtype, filled)
    assert_same(form, raced(form, operands, **options), defined(form, operands, **options))


@pytest.mark.interpret
@pytest.mark.parametrize("form", [FORMS[0], *(slow(form) for form in FORMS[1:])])
def test_swapped_weights_and_rows_are_seen(form):
    operands = operands_of((1, 64, 256), "bfloat16", [64])
    got = raced(form, operands)
    assert_same(form, got, defined(form, operands))
    for swapped in (0, 1):
        other = list(operands)
        other[swapped] = other[swapped].at[:, 4:6].set(other[swapped][:, 5:3:-1])
        with pytest.raises(AssertionError):
            assert_same(form, got, defined(form, other))


def test_other_last_places_tip_few_roundings():
    """What the GPU's exponential and quotient may do, up to 4 units of the last place off in all:
    of 10,000 values 5 go to a neighbour, and of 100 scales one."""
    h, *_ = operands_of((256, 1024), "bfloat16", None)
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    a = np.array(reference.silu(gate) * up)
    values, scale = (np.asarray(part) for part in rounded_and_quantised(a))
    for off in (-4, 4):
        moved = np.where(a == 0, a, (a.view(np.int32) + off).view(np.float32))
        other_values, other_scale = (np.asarray(part) for part in rounded_and_quantised(moved))
        steps = values.view(np.uint8).astype(int) - other_values.view(np.uint8)
        assert np.max(np.abs(steps)) <= 1
        assert np.mean(steps != 0) < 0.001
        np.testing.assert_allclose(other_scale, scale, rtol=2**-7)
        assert np.mean(other_scale != scale) < 0.02


@jax.jit
def rounded_and_quantised(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    return quantize(a.astype(jnp.bfloat16), implementation="reference")


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    reports = compiled_cases("swiglu_quantize")
    assert len(reports) == 9
    for report in reports:
        [kernel] = report["compiled"]
        counts, is_backward = kernel["instructions"], report["case"].startswith("backward")
        assert counts["UTMALDG"] == 2 + is_backward  # gate, up, d_a
        assert counts["UTMASTG"] == 1 + is_backward  # values; d_gate, d_up
        # An exponential and a reciprocal for each value of a thread, and of its two rows' scales.
        assert 0 <= counts["MUFU"] - 2 * tiles.M * tiles.K // 128 <= 2
        buffers = tiles.asked_bytes(2, is_backward) + (not is_backward) * tiles.M * tiles.K
        assert buffers <= kernel["shared_memory_bytes"] <= buffers + 4096
        assert kernel["registers"] <= (192 if is_backward else 136)
        # More registers than 168 leave two programs on an SM, more than 128 three.
        programs = tiles.programs_per_sm(kernel["shared_memory_bytes"], kernel["registers"])
        assert programs >= (2 if is_backward else 3)
        assert report["shares"]["issue"] == report["shares"]["latency"] == 1


def test_what_the_kernels_will_not_take():
    h, weights, d_a, filled = operands_of((1, 8, 128), "bfloat16", [8])
    assert mosaic_sm90.unsupported(h, weights, d_a) == ""
    with pytest.raises(NotImplementedError, match="h is float16, expected bfloat16 or float32"):
        mosaic_sm90.swiglu_quantize(h.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match="weights is float16, expected bfloat16 or fl"):
        mosaic_sm90.swiglu_quantize_transposed(h, weights.astype(jnp.float16), filled)
    with pytest.raises(NotImplementedError, match="swiglu_backward on Hopper: d_a is float8_e4m3"):
        op.swiglu_backward(h, weights, d_a.astype(jnp.float8_e4m3fn), implementation="mosaic")
    assert mosaic_sm90.unsupported(h[:0]).startswith("h is [0, 8, 128], expected at least one")
