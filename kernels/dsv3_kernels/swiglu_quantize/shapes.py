"""What DeepSeek-V3 671B's SwiGLU takes on one GPU: gate and up, side by side."""

from dataclasses import dataclass

from dsv3_kernels.grouped_gemm.shapes import EXPERTS, WIDTH

TOKENS = 4096
FILLED_ROWS = TOKENS * 8 // EXPERTS
"""Of an expert on the average: 8,192, if 64 GPUs have 4,096 tokens each."""
CAPACITY = FILLED_ROWS * 9 // 8
"""Rows that it has room for: 9,216."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    h: tuple[int, ...]
    routed: bool = False
    """With routing weights, and with rows that are not filled."""

    @property
    def width(self) -> int:
        return self.h[-1] // 2


SHAPES = [
    Shape(name="routed experts", h=(EXPERTS, CAPACITY, 2 * WIDTH), routed=True),
    Shape(name="shared expert", h=(TOKENS, 2 * WIDTH)),
    Shape(name="dense MLP", h=(TOKENS, 2 * 18432)),
]
