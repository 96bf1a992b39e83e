"""The Hopper kernels of mla_prefill: raced on the CPU, compiled for sm_90a, as the reference is.

Both in processes of their own. Mosaic's interpreter runs a warpgroup a thread, and XLA computes
exponentials on the threads that are left: with as few as there are cores all would wait for ever.
"""

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import pytest

from dsv3_kernels.mla_prefill import mosaic_sm90, tiles
from dsv3_kernels.mla_prefill.op import mla_prefill
from dsv3_kernels.mla_prefill.tiles import Turns
from tests.kernels.compiled import compiled_cases, results

KERNELS = ("forward", "d_q", "d_kv")
LARGEST_ERROR = {"bfloat16": 1e-3, "float32": 1e-5}
"""Relative, in the Frobenius norm; in the worst row four times that."""

RACED = """
import json, sys
from dataclasses import replace
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from dsv3_kernels.mla_prefill import mosaic_sm90, mosaic_sm90_backward, reference, tiles

SCALE = 0.1

def errors(got, want):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    of_rows, norms = np.linalg.norm(got - want, axis=-1), np.linalg.norm(want, axis=-1)
    whole = np.linalg.norm(of_rows) / np.linalg.norm(norms)
    # A query that sees one key has no gradient but what rounding makes.
    usual = np.sqrt(np.mean(norms**2))
    return whole, (of_rows / np.maximum(norms, usual / 100)).max()

def small(chosen, programs):
    return replace(chosen, programs=programs, left_in_registers=False)

for line in sys.stdin:
    kernel, batch, seq, heads, starts, programs, wrong = json.loads(line)
    keys = jax.random.split(jax.random.key(seq), 4)
    def normal(key, *shape):
        return jax.random.normal(key, shape).astype(jnp.bfloat16)
    q, d_out = normal(keys[0], batch, seq, heads, 192), normal(keys[1], batch, seq, heads, 128)
    kv, k_rope = normal(keys[2], batch, seq, heads, 256), normal(keys[3], batch, seq, 64)
    def first_keys(starts):
        ids = np.searchsorted(starts, np.arange(seq), side="right")
        return reference.first_keys_of(jnp.asarray(np.broadcast_to(ids, (batch, seq)).copy()))
    firsts = None if starts is None else first_keys(starts)
    out, lse = reference.attend(q, kv, k_rope, firsts, SCALE)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    operands = q, kv, k_rope, firsts, lse, d_out, delta, SCALE
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        if kernel == "forward":
            chosen = small(tiles.FORWARD, programs)
            got = mosaic_sm90.attend(*operands[:4], SCALE, tiles=chosen)
        elif kernel == "d_q":
            chosen = small(tiles.D_Q, programs)
            got = [mosaic_sm90_backward.gradient_of_queries(*operands, tiles=chosen)]
        else:
            chosen = small(tiles.D_KV, programs)
            got = mosaic_sm90_backward.gradients_of_keys(*operands, tiles=chosen)
    if wrong:
        firsts = first_keys([start + 1 for start in starts])
        out, lse = reference.attend(q, kv, k_rope, firsts, SCALE)
        operands = q, kv, k_rope, firsts, lse, d_out, delta, SCALE
    d_q, *d_keys = reference.gradients(*operands)
    want = {"forward": (out, lse), "d_q": [d_q], "d_kv": d_keys}[kernel]
    print(json.dumps([(x.dtype.name, *errors(x, y)) for x, y in zip(got, want, strict=True)]))
"""


def raced(kernels, batch: int, seq: int, heads: int, starts, programs: int, wrong=False) -> dict:
    """Of each kernel, the errors of its results."""
    cases = [(name, batch, seq, heads, starts, programs, wrong) for name in kernels]
    return dict(zip(kernels, results(RACED, cases, NPROC="16"), strict=True))


def are_small(errors) -> bool:
    return all(
        whole <= LARGEST_ERROR[dtype] and worst_row <= 4 * LARGEST_ERROR[dtype]
        for dtype, whole, worst_row in errors
    )


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.interpret
@pytest.mark.parametrize(
    ("kernels", "batch", "seq", "heads", "starts", "programs"),
    [
        # Two tiles of one program, the second of them ragged, and stages used again.
        (KERNELS[:1], 1, 150, 1, None, 1),
        slow(KERNELS[1:], 1, 150, 1, None, 1),
        # Documents that begin in the midst of blocks; a block that a tile need not look at.
        slow(KERNELS, 1, 300, 1, [3, 140, 270], 1),
        # An odd number of tiles, so that pairs reach over heads; less than a block.
        slow(KERNELS, 2, 260, 3, None, 2),
        slow(KERNELS, 1, 20, 1, [1, 7], 2),
    ],
)
def test_each_kernel_gives_the_references(kernels, batch, seq, heads, starts, programs):
    for kernel, errors in raced(kernels, batch, seq, heads, starts, programs).items():
        assert are_small(errors), kernel


@pytest.mark.slow
@pytest.mark.interpret
def test_documents_that_begin_one_key_later_are_seen():
    for kernel, errors in raced(KERNELS, 1, 150, 1, [70], 1, wrong=True).items():
        assert not are_small(errors), kernel


PRODUCTS = {"forward": [20], "backward": [2 * 28, 2 * 30]}
"""HGMMA in a step, in as many copies of the code as there are warpgroups that have one."""


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    for report in compiled_cases("mla_prefill"):
        kernels = report["compiled"]
        direction = report["case"].rpartition(", ")[2]
        found = [kernel["instructions"]["HGMMA"] for kernel in kernels]
        assert found == PRODUCTS[direction]
        for kernel in kernels:
            counts = Counter(kernel["instructions"])
            assert not {"QGMMA", "HMMA"} & set(counts)
            assert kernel["registers"] == 168  # of which set_max_registers' numbers are made
            # One at most before and after each product: ptxas did not put them in a row.
            assert counts["WARPGROUP"] < counts["HGMMA"]
            assert counts["UTMALDG"] >= 5
            assert counts["UTMASTG"] >= 2
        if direction == "forward":
            assert report["share"] >= (0.65 if "short" in report["case"] else 0.8)


def test_predicted_shares_of_peak():
    assert tiles.share_of_peak([tiles.FORWARD], 1, 128, 4096, products=320) >= 0.65
    backward = tiles.share_of_peak([tiles.D_Q, tiles.D_KV], 1, 128, 4096, products=832)
    assert backward >= 0.5


@pytest.mark.parametrize(
    ("batch", "heads", "count", "programs"),
    [(1, 3, 4, 5), (2, 3, 3, 4), (1, 1, 1, 1), (1, 1, 7, 2)],
)
def test_every_tile_has_one_turn(batch, heads, count, programs):
    turns = Turns(batch=batch, heads=heads, tiles=count, programs=programs)
    work, places = [], []
    for program in range(programs):
        mine = [turns.place(program, jnp.int32(t)) for t in range(int(turns.count(program)))]
        places += [tuple(map(int, place)) for place in mine]
        work.append(sum(int(tile) + 1 for *_, tile in mine))
    every = [(b, h, t) for b in range(batch) for h in range(heads) for t in range(count)]
    assert sorted(places) == every
    if turns.pairs % programs == 0 and count % 2 == 0:
        assert len(set(work)) == 1


def test_what_the_kernel_will_not_take():
    q, kv, k_rope = (
        jnp.zeros(shape, jnp.bfloat16) for shape in ((1, 4, 2, 192), (1, 4, 2, 256), (1, 4, 64))
    )
    assert mosaic_sm90.unsupported(q, kv, k_rope) == ""
    in_float32 = [x.astype(jnp.float32) for x in (q, kv, k_rope)]
    with pytest.raises(NotImplementedError, match="q is float32, expected bfloat16"):
        mla_prefill(*in_float32, 0.1, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"are \(192, 255, 64\), expected \(192, 256, 64"):
        mla_prefill(q, kv[..., 1:], k_rope, 0.1, implementation="mosaic")
    with pytest.raises(ValueError, match="stages is 0, expected at least 1"):
        replace(tiles.FORWARD, stages=0)
