"""Kernels that others measured on an H800, beside what our method says of ours for the same work.

The method: from SASS, cycles of the tensor core against issue slots and shared memory in the main
loop (`sass.Loop`); from closed forms, edges, rounds and L2 (each op's `tiles.py`); and for a GEMM's
tile the cycles before its first product and for its result's way to memory (`tile_cycles`), in
which one number, `FILL_CYCLES`, was fitted to the dense speeds below. What it cannot see: clocks
that sink under load, and how well a scheduler of a GPU's warps does.

DeepGEMM's GEMMs are built as ours (tiles of 128 rows, two consumer warpgroups, pairs that share
loads). DeepSeek's profile is of FlashAttention-3 and of a fused SwiGLU, while 20 of 132 SMs did the
communication. Every kernel that memory bounds is predicted at FlashMLA's 3,000 of 3,350 GB/s.

Source: DeepGEMM, README at commit 327ec92 (H800, 4,096 rows, 4 groups of 8,192 and 8 of 4,096);
FlashMLA, README at commit 9241ae3 (dense decode); DeepSeek, profile-data, train.json (durations and
grids: attention's medians of 4, SwiGLU's call with the most rows).
"""

from dataclasses import dataclass

from dsv3_kernels.bench import BEST_OF_MEMORY, PEAK
from dsv3_kernels.fp8_gemm import tiles as dense_tiles
from dsv3_kernels.grouped_gemm import tiles as grouped_tiles
from dsv3_kernels.mla_decode.tiles import QK_DIM, Cycles
from dsv3_kernels.mla_prefill import tiles as attention_tiles

ROWS = 4096
DENSE = {
    (2112, 7168): 1127e12,
    (24576, 1536): 1212e12,
    (32768, 512): 775e12,
    (7168, 16384): 1520e12,
    (4096, 7168): 1410e12,
    (7168, 2048): 1168e12,
}
"""FLOPs a second of 4,096 rows by n and k."""
GROUPED = {(4, 4096, 7168): 1346e12, (4, 7168, 2048): 1214e12, (8, 4096, 7168): 1346e12}
"""By groups, n and k."""
GROUP_ROWS = {4: 8192, 8: 4096}
COMPUTING_SMS = 112
"""Of 132, in DeepSeek's profile."""
ATTENTION = {"forward": (1248e-6, 320), "backward": (3860e-6 + 267e-6 + 223e-6, 832)}
"""Seconds of 4,096 tokens, 128 heads, causal, and products a score."""
DECODE = 660e12
"""FLOPs a second, where the tensor cores are the bound."""
SWIGLU = (162e-6, 36864 * 2048 * (2 * 2 + 1 + 4 / 128))
"""Seconds of 36,864 rows of 2,048 values, weighted and quantised, and their bytes."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Shares of a peak: measured of somebody's kernel, predicted of ours."""

    what: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, had it been for the measured kernel."""
        return self.predicted / self.measured - 1


def comparisons() -> list[Comparison]:
    """All that is published."""
    found = []
    for (n, k), speed in DENSE.items():
        chosen = dense_tiles.choose(1, ROWS, n, b_in_rows=False)
        predicted = chosen.share_with_tile_costs(1, ROWS, n, k, b_in_rows=False, out_bytes=2)
        what = f"FP8 GEMM {ROWS} x {n} x {k}"
        found.append(Comparison(what=what, measured=speed / PEAK["fp8"], predicted=predicted))
    for (groups, n, k), speed in GROUPED.items():
        rows = GROUP_ROWS[groups]
        tiles = grouped_tiles.choose(rows, groups, n, is_fp8=True, b_in_rows=False)
        predicted = tiles.share_with_tile_costs(rows, groups, n, k, b_in_rows=False, out_bytes=2)
        what = f"FP8 grouped GEMM, {groups} groups of {rows} x {n} x {k}"
        found.append(Comparison(what=what, measured=speed / PEAK["fp8"], predicted=predicted))
    kernels = {
        "forward": [attention_tiles.FORWARD],
        "backward": [attention_tiles.D_Q, attention_tiles.D_KV],
    }
    for direction, (seconds, products) in ATTENTION.items():
        flops = 2 * 128 * ROWS * (ROWS + 1) // 2 * products
        measured = flops / seconds / PEAK["bf16"] * 132 / COMPUTING_SMS
        predicted = attention_tiles.share_of_peak(
            kernels[direction], 1, 128, ROWS, products=products
        )
        what = f"attention {direction}, {ROWS} tokens, 128 heads"
        found.append(Comparison(what=what, measured=measured, predicted=predicted))
    decode = Cycles(batch=128, rows=2 * 128, tokens=ROWS, row_bytes=2 * QK_DIM)
    seconds, moved = SWIGLU
    return [
        *found,
        Comparison(
            what="decode, 128 requests of 4096 tokens, 2 x 128 heads",
            measured=DECODE / PEAK["bf16"],
            predicted=decode.shares["bf16"],
        ),
        Comparison(
            what="SwiGLU, weighted and quantised, of HBM",
            measured=moved / seconds / PEAK["memory"],
            predicted=BEST_OF_MEMORY,
        ),
    ]
