"""The Hopper kernels of mla_decode: raced on the CPU, compiled for sm_90a, as the reference is.

Both in processes of their own. Mosaic's interpreter runs a warpgroup a thread, and XLA computes
exponentials on the threads that are left: with as few as there are cores all would wait for ever.
"""

from collections import Counter
from dataclasses import replace

import jax.numpy as jnp
import pytest

from dsv3_kernels.mla_decode import bench, mosaic_sm90, shapes, tiles
from dsv3_kernels.mla_decode.op import mla_decode
from tests.kernels.compiled import compiled_cases, results

LARGEST_ERROR, LARGEST_ERROR_OF_LSE = 1e-3, 1e-5
"""Relative, in the Frobenius norm, in the worst row four times that; and absolute."""

RACED = """
import json, sys
from dataclasses import replace
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from dsv3_kernels.mla_decode import mosaic_sm90, reference, tiles

SCALE = 0.06
pack_fp8 = jax.jit(reference.pack_fp8)
attend = jax.jit(partial(reference.attend, scale=SCALE))

for line in sys.stdin:
    lengths, queries, heads, is_packed, parts, wrong = json.loads(line)
    rng = np.random.default_rng(sum(lengths))
    pages_of = [-(-length // 64) for length in lengths]
    order = rng.permutation(sum(pages_of) + 1)
    latents = rng.standard_normal((order.size, 64, 576))
    table = np.full((len(lengths), max(pages_of) + 1), 10**6, np.int32)
    for b, (length, count) in enumerate(zip(lengths, pages_of)):
        table[b, :count], order = order[:count], order[count:]
        if length % 64:
            latents[table[b, count - 1], length % 64 :] = np.nan
    latents[order] = np.nan
    pages = jnp.asarray(latents, jnp.bfloat16)
    if is_packed:  # 255 is NaN in all its parts
        pages = jnp.asarray(np.where(np.isnan(latents[..., :1]), np.uint8(255), pack_fp8(pages)))
    q = jnp.asarray(rng.standard_normal((len(lengths), queries, heads, 576)), jnp.bfloat16)
    operands = q, pages, jnp.asarray(table), jnp.asarray(lengths, jnp.int32)
    chosen = replace(tiles.FP8 if is_packed else tiles.BF16, in_place=False)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = jax.jit(
            partial(mosaic_sm90.attend, scale=SCALE, splits=parts, tiles=chosen)
        )(*operands)
    if wrong == "length":
        operands = *operands[:3], jnp.asarray(lengths, jnp.int32).at[0].add(-1)
    elif wrong == "scale":  # those of a token's first two tiles are swapped
        swapped = jnp.concatenate([pages[..., 516:520], pages[..., 512:516]], axis=-1)
        operands = q, pages.at[:, 0, 512:520].set(swapped[:, 0]), *operands[2:]
    want = attend(*operands)
    (out, lse), (want_out, want_lse) = ([np.asarray(x, np.float64) for x in y] for y in (got, want))
    of_rows, norms = (np.linalg.norm(x, axis=-1) for x in (out - want_out, want_out))
    seen = np.isfinite(want_lse)
    print(json.dumps(dict(
        dtypes=[x.dtype.name for x in got],
        whole=np.linalg.norm(of_rows) / np.linalg.norm(norms),
        worst_row=(of_rows[seen] / norms[seen]).max(),
        lse=np.abs(lse[seen] - want_lse[seen]).max(),
        nothing=bool(np.all(np.isneginf(lse[~seen])) and not np.any(out[~seen])),
    )))
"""


def are_small(errors: dict) -> bool:
    return (
        errors["whole"] <= LARGEST_ERROR
        and errors["worst_row"] <= 4 * LARGEST_ERROR
        and errors["lse"] <= LARGEST_ERROR_OF_LSE
        and errors["nothing"]
    )


DEFAULT = [
    # A request in two parts, of which one begins another; stages used again, ragged ends.
    ([200, 3], 1, 2, False, 2, ""),
    ([130, 3], 1, 1, True, 1, ""),
]
OTHERS = [
    # Idle slots, fewer tokens than queries, a part in which the first query sees no key.
    ([0, 1, 65, 0, 130], 2, 8, False, 3, ""),
    ([0, 1, 65, 0, 130], 3, 8, True, 4, ""),
    # Two tiles of rows, the second of them ragged; more parts than blocks.
    ([100], 2, 48, False, 5, ""),
    ([64, 128], 1, 80, True, 1, ""),
]
"""Lengths, queries, heads, whether the cache is in FP8, parts; and what is wrong."""


@pytest.mark.interpret
@pytest.mark.parametrize("cases", [DEFAULT, pytest.param(OTHERS, marks=pytest.mark.slow)])
def test_gives_the_references(cases):
    for case, errors in zip(cases, results(RACED, cases, NPROC="16"), strict=True):
        assert errors["dtypes"] == ["bfloat16", "float32"]
        assert are_small(errors), case


@pytest.mark.slow
@pytest.mark.interpret
def test_a_key_less_and_two_scales_swapped_are_seen():
    wrong = ([70, 3], 1, 2, False, 2, "length"), ([70, 3], 1, 2, True, 2, "scale")
    for case, errors in zip(wrong, results(RACED, [*wrong], NPROC="16"), strict=True):
        assert not are_small(errors), case


@pytest.mark.slow
@pytest.mark.compile
def test_the_models_shapes_compile():
    model = shapes.BF16 + shapes.FP8
    for shape, report in zip(model, compiled_cases("mla_decode"), strict=True):
        attention, combination = report["compiled"]
        counts = Counter(attention["instructions"])
        for kernel in (attention, combination):
            assert not {"QGMMA", "HMMA"} & set(kernel["instructions"])
        assert attention["registers"] == 168  # of which set_max_registers' numbers are made
        # q k^T of one warpgroup, p v of two.
        assert counts["HGMMA"] == 576 // 16 + 2 * 64 // 16
        # One at most before and after each product: ptxas did not put MMAs one after the other.
        assert counts["WARPGROUP"] <= 3 * 3
        # q, and pages where they are as wgmma reads them.
        assert counts["UTMALDG"] == (1 if shape.is_packed else 2)
        if shape.is_packed:
            values = 64 * 512 // 128
            assert counts["HADD2"] == values  # from FP16, as which two values in 8 bits are read
            # 64 bits a load of latents, twice in the code, and 128 a load of rotary values.
            assert counts["LD"] == 2 * values // 8 + 64 * 64 // 128 // 8 + 4 * 4
            assert counts["STS"] >= 64 * 576 // 128 // 8  # 128 bits each


LEAST_SHARE = {("memory", 128): 0.85, ("memory", 32): 0.75, ("memory", 1): 0.8}
"""By what bounds it and requests; fewer have less to do for as long a launch and last stores."""


@pytest.mark.parametrize("shape", shapes.BF16 + shapes.FP8, ids=lambda shape: shape.name)
def test_predicted_shares_of_peak(shape):
    shares = bench.cycles_of(shape).shares
    unit = max(shares, key=lambda name: shares[name])
    assert shares[unit] >= LEAST_SHARE.get((unit, shape.batch), 0.65)


def test_what_the_kernels_will_not_take():
    q, pages = jnp.zeros((1, 1, 4, 576), jnp.bfloat16), jnp.zeros((2, 64, 576), jnp.bfloat16)
    table, lengths = jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
    assert mosaic_sm90.unsupported(q, pages, table, 512) == ""
    with pytest.raises(NotImplementedError, match="page_size is 32, expected 64"):
        mla_decode(q, pages[:, :32], table, lengths, 0.1, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"are \(576, 448\), expected \(576, 512\)"):
        mla_decode(q, pages, table, lengths, 0.1, v_dim=448, implementation="mosaic")
    with pytest.raises(NotImplementedError, match=r"page_table is \[1, 0\], expected at least"):
        mla_decode(q, pages, table[:, :0], lengths, 0.1, implementation="mosaic")
    with pytest.raises(ValueError, match="registers of three threads are 528, expected at most"):
        replace(tiles.BF16, producer_registers=48)
    with pytest.raises(ValueError, match="programs is 0, expected at least 1"):
        replace(tiles.BF16, programs=0)
