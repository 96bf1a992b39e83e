"""Causal attention against float64 NumPy, and its gradients against float64 differences."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_kernels.mla_prefill import reference
from dsv3_kernels.mla_prefill.op import MAX_QUERY_CHUNKS, QUERY_CHUNK, mla_prefill, with_gradients
from tests.programs import dot_flops

ON_CPU = ["reference", "xla"]
SCALE = 0.3
LARGEST_ERROR = {"float32": 2e-6, "bfloat16": 1e-2}
"""Relative, in the Frobenius norm: 3e-7 and 4e-3 were measured."""
PACKED = [[5, 5, 5, 2, 2, 7, 7, 7, 7, 7, 7, 1, 1], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4]]


def inputs(batch: int, seq: int, heads: int, dims: tuple[int, int, int]) -> list[np.ndarray]:
    """q, kv and k_rope for `dims` of k_nope, k_rope and v, and something to project out on."""
    rng = np.random.default_rng(seq)
    nope, rope, v = dims
    features = (heads, nope + rope), (heads, nope + v), (rope,), (heads, v)
    return [rng.standard_normal((batch, seq, *shape)) for shape in features]


def attention(q, kv, k_rope, documents=None) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, in float64."""
    batch, seq, heads, qk_dim = q.shape
    nope = qk_dim - k_rope.shape[-1]
    out = np.zeros((batch, seq, heads, kv.shape[-1] - nope))
    lse = np.zeros((batch, heads, seq))
    for b, i, h in np.ndindex(batch, seq, heads):
        seen = [j for j in range(i + 1) if documents is None or documents[b][j] == documents[b][i]]
        keys = np.concatenate([kv[b, seen, h, :nope], k_rope[b, seen]], axis=-1)
        weights = np.exp(SCALE * keys @ q[b, i, h])
        out[b, i, h] = weights @ kv[b, seen, h, nope:] / weights.sum()
        lse[b, h, i] = np.log(weights.sum())
    return out, lse


def relative_error(found, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    difference = np.asarray(found).astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def cast(arrays: list[np.ndarray], dtype: str) -> list[jax.Array]:
    return [jnp.asarray(x, dtype) for x in arrays]


@pytest.mark.parametrize("implementation", [None, *ON_CPU])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("documents", [None, PACKED], ids=["whole", "packed"])
def test_equals_float64(documents, dtype, implementation):
    arrays = cast(inputs(2, 13, 3, (6, 4, 5))[:3], dtype)
    ids = None if documents is None else jnp.asarray(documents)
    out, lse = mla_prefill(*arrays, SCALE, ids, implementation=implementation)
    expected = attention(*(np.asarray(x, np.float64) for x in arrays), documents)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative_error(out, expected[0]) <= LARGEST_ERROR[dtype]
    assert relative_error(lse, expected[1]) <= LARGEST_ERROR["float32"]


def test_chunks_of_queries():
    """Of 65 each, the last of 64: with packed documents that begin inside chunks."""
    arrays = inputs(1, 519, 1, (4, 2, 3))[:3]
    documents = np.searchsorted([70, 129, 130, 500], np.arange(519), side="right")[None]
    out, lse = mla_prefill(
        *cast(arrays, "float32"), SCALE, jnp.asarray(documents), implementation="xla"
    )
    expected = attention(*arrays, documents)
    assert relative_error(out, expected[0]) <= LARGEST_ERROR["float32"]
    assert relative_error(lse, expected[1]) <= LARGEST_ERROR["float32"]


def test_a_key_of_the_future_and_of_another_document_is_not_seen():
    arrays = cast(inputs(1, 13, 2, (6, 4, 5))[:3], "float32")
    documents = jnp.asarray(PACKED[:1])
    out, _ = mla_prefill(*arrays, SCALE, documents)
    q, kv, k_rope = arrays
    changed, _ = mla_prefill(q, kv.at[:, 5:].add(1), k_rope.at[:, :3].add(1), SCALE, documents)
    np.testing.assert_array_equal(out[:, 3:5], changed[:, 3:5])
    wrong, _ = mla_prefill(*arrays, SCALE)
    assert relative_error(wrong, np.asarray(out, np.float64)) > LARGEST_ERROR["bfloat16"]


def test_large_scores_do_not_overflow():
    q, kv, k_rope, _ = (jnp.asarray(100 * x, jnp.float32) for x in inputs(1, 9, 1, (6, 4, 5)))
    out, lse = mla_prefill(q, kv, k_rope, SCALE)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("documents", [None, PACKED], ids=["whole", "packed"])
def test_gradients_are_float64_differences(documents, implementation):
    """Of a projection of both results, along random directions in each input."""
    *arrays, d_out = inputs(2, 13, 3, (6, 4, 5))
    rng = np.random.default_rng(1)
    d_lse = rng.standard_normal((2, 3, 13))
    ids = None if documents is None else jnp.asarray(documents)
    op = functools.partial(mla_prefill, scale=SCALE, documents=ids, implementation=implementation)
    _, pull_back = jax.vjp(op, *cast(arrays, "float32"))
    gradients = pull_back(tuple(cast([d_out, d_lse], "float32")))

    def projected(*arrays):
        out, lse = attention(*arrays, documents)
        return np.sum(out * d_out) + np.sum(lse * d_lse)

    for which, gradient in enumerate(gradients):
        for _ in range(3):
            step = rng.standard_normal(gradient.shape) * 1e-5
            ends = [
                [*arrays[:which], arrays[which] + s, *arrays[which + 1 :]] for s in (step, -step)
            ]
            difference = (projected(*ends[0]) - projected(*ends[1])) / 2
            size = np.linalg.norm(gradient) * np.linalg.norm(step)
            found = np.sum(np.asarray(gradient, np.float64) * step)
            assert abs(found - difference) <= 1e-5 * size


def test_gradients_in_bfloat16_are_those_of_the_rounded_inputs():
    *arrays, d_out = cast(inputs(2, 40, 3, (6, 4, 5)), "bfloat16")

    def gradients(arrays, d_out):
        results, pull_back = jax.vjp(lambda *x: mla_prefill(*x, SCALE), *arrays)
        return pull_back((d_out, jnp.zeros_like(results[1])))

    in_float32 = gradients([x.astype(jnp.float32) for x in arrays], d_out.astype(jnp.float32))
    for found, expected in zip(gradients(arrays, d_out), in_float32, strict=True):
        assert found.dtype == jnp.bfloat16
        assert relative_error(found, np.asarray(expected, np.float64)) <= 1.5e-2


@pytest.mark.parametrize("documents", [None, PACKED], ids=["whole", "packed"])
def test_gradients_from_what_was_kept(documents):
    """The output passes; gradients are the ones above, of a kept output that was rounded too."""
    *arrays, d_out = cast(inputs(2, 13, 3, (6, 4, 5)), "float32")
    ids = None if documents is None else jnp.asarray(documents)
    (out, lse), pull_back = jax.vjp(lambda *x: mla_prefill(*x, SCALE, ids), *arrays)
    expected = pull_back((d_out, jnp.zeros_like(lse)))

    def kept(rounded, *x):
        return with_gradients(out + 1, *x, rounded, lse, SCALE, ids)

    passed, pull_back = jax.vjp(kept, out, *arrays)
    of_kept, *gradients = pull_back(d_out)
    np.testing.assert_array_equal(passed, out + 1)
    np.testing.assert_array_equal(of_kept, jnp.zeros_like(out))
    for found, exact in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6)
    rounded = out.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    d_q = jax.vjp(functools.partial(kept, rounded), *arrays)[1](d_out)[0]
    assert 1e-4 < relative_error(d_q, np.asarray(expected[0], np.float64)) < 0.1


def test_a_bfloat16_softmax_is_taken_in_float32():
    """Over 2,000 equal keys a bfloat16 sum of weights would stop growing at 256."""
    ones = functools.partial(jnp.ones, dtype=jnp.bfloat16)
    out, lse = mla_prefill(ones((1, 2000, 1, 4)), ones((1, 2000, 1, 4)), ones((1, 2000, 2)), 1.0)
    np.testing.assert_allclose(np.asarray(out, np.float64), 1, rtol=LARGEST_ERROR["bfloat16"])
    np.testing.assert_allclose(lse[0, 0], 4 + np.log(np.arange(1, 2001)), rtol=1e-6)


def test_at_most_nine_sixteenths_of_a_long_square_are_computed():
    """n chunks of queries: (n + 1) / 2n of the square, and n stops at 8."""
    for chunks, share in ((1, 1.0), (2, 3 / 4), (4, 5 / 8), (8, 9 / 16), (32, 9 / 16)):
        seq = chunks * QUERY_CHUNK
        shapes = (1, seq, 3, 8), (1, seq, 3, 6 + 4), (1, seq, 2)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        attend = functools.partial(mla_prefill, scale=1.0, implementation="xla")
        square = 2 * 3 * seq**2 * (8 + 4)
        assert dot_flops(jax.make_jaxpr(attend)(*arrays), while_trips=0) == share * square
    assert MAX_QUERY_CHUNKS == 8


def test_where_documents_begin():
    found = reference.first_keys_of(jnp.asarray([[4, 4, 9, 9, 4], [0, 1, 2, 2, 2]]))
    np.testing.assert_array_equal(found, [[0, 0, 2, 2, 4], [0, 1, 2, 2, 2]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "triton"}, "implementation is 'triton', expected one of reference"),
        ({"scale": 0.0}, r"scale is 0\.0, expected over 0"),
        ({"kv": (1, 4, 2, 6)}, "kv_dim is 6, expected over 6, those of k_nope"),
        ({"kv": (1, 5, 2, 9)}, r"kv is \[1, 5, 2, 9\], expected \[1, 4, 2, kv_dim\]"),
        ({"k_rope": (1, 3, 4)}, r"k_rope is \[1, 3, 4\], expected \[1, 4, at most 10\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    """Without the checks of annotations, which tests alone have."""
    shapes = {"q": (1, 4, 2, 10), "kv": (1, 4, 2, 9), "k_rope": (1, 4, 4)}
    arguments = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    options = {"scale": SCALE} | {k: v for k, v in change.items() if k not in shapes}
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(mla_prefill)(**arguments, **options)
    with pytest.raises(ValueError, match="q, kv and k_rope are float32, bfloat16 and float32"):
        arguments["kv"] = jnp.zeros((1, 4, 2, 9), jnp.bfloat16)
        inspect.unwrap(mla_prefill)(**arguments, scale=SCALE)
