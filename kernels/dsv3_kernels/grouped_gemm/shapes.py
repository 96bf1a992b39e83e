"""The products of DeepSeek-V3 671B's routed experts on one GPU.

With 64 GPUs a device has 4 of the 256 experts. In training, 4,096 tokens a GPU choose 8 experts
each: 32,768 rows; fewer are in a micro-batch of a pipeline. In decode each group has room for 512.
On CPU small models are trained.
"""

from dataclasses import dataclass, replace

EXPERTS, HIDDEN, WIDTH = 4, 7168, 2048
LINEARS = {"gate_up_proj": (HIDDEN, 2 * WIDTH), "down_proj": (WIDTH, HIDDEN)}
"""In and out features of each."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Products of groups. `rows` are all groups' rows, or in `masked_rows` those of each."""

    name: str
    rows: int
    n: int
    k: int
    """In `ragged_k`, whose k are the rows, the rows of the result."""
    form: str = "ragged_rows"
    groups: int = EXPERTS
    is_fp8: bool = True
    transpose_b: bool = False
    alignment: int = 128
    out_dtype: str = "bfloat16"


def _of_precision(is_fp8: bool) -> list[Shape]:
    shapes = []
    for name, (inputs, outputs) in LINEARS.items():
        forward = Shape(name=f"{name} forward", rows=32768, n=outputs, k=inputs, is_fp8=is_fp8)
        # The weights' transpose is quantised already in FP8, and read by wgmma in BF16.
        dx = replace(forward, name=f"{name} dx", n=inputs, k=outputs, transpose_b=not is_fp8)
        dw = Shape(
            name=f"{name} dw",
            rows=32768,
            n=inputs,
            k=outputs,
            form="ragged_k",
            is_fp8=is_fp8,
            out_dtype="float32",
        )
        few = replace(forward, name=f"{name} of 4,096 rows", rows=4096)
        anywhere = replace(few, name=f"{few.name}, not padded", alignment=1)
        decode = replace(forward, name=f"{name} decode", rows=512, form="masked_rows")
        shapes += [forward, dx, dw, few, anywhere, decode]
    return shapes


FP8 = _of_precision(is_fp8=True)
BF16 = _of_precision(is_fp8=False)

ON_CPU = [
    Shape(name=name, rows=8192, groups=groups, n=n, k=k, is_fp8=False, alignment=1)
    for name, groups, n, k in (
        ("16 x [256, 256]", 16, 256, 256),
        ("16 x [256, 128]", 16, 256, 128),
        ("32 x [512, 512]", 32, 512, 512),
        ("32 x [512, 256]", 32, 512, 256),
        ("8 x [1024, 1024]", 8, 1024, 1024),
    )
]
"""The experts of configs/bench_tiny.py and configs/bench_small.py, 8,192 pairs, and larger ones."""
