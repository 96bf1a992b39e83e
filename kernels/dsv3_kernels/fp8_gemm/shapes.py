"""The products of DeepSeek-V3 671B that run in FP8, of 4,096 tokens on one GPU.

Of the dense layers and of the shared expert gate_proj stands for up_proj too. The routed experts'
are `grouped_gemm`'s.
"""

from dataclasses import dataclass

TOKENS = 4096
LINEARS = {
    "q_a_proj": (7168, 1536),
    "q_b_proj": (1536, 24576),
    "kv_a_proj": (7168, 576),
    "kv_b_proj": (512, 32768),
    "o_proj": (16384, 7168),
    "gate_proj": (7168, 18432),
    "down_proj": (18432, 7168),
    "shared_gate_proj": (7168, 2048),
    "shared_down_proj": (2048, 7168),
}
"""In and out features of each."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A product [m, k] x [n, k]."""

    name: str
    m: int
    n: int
    k: int
    b_in_rows: bool = False
    out_dtype: str = "bfloat16"


FORWARD = [
    Shape(name=f"{name} forward", m=TOKENS, n=outputs, k=inputs)
    for name, (inputs, outputs) in LINEARS.items()
]
INPUT_GRADIENT = [
    Shape(name=f"{name} dx", m=TOKENS, n=inputs, k=outputs)
    for name, (inputs, outputs) in LINEARS.items()
]
WEIGHT_GRADIENT = [
    Shape(name=f"{name} dw", m=outputs, n=inputs, k=TOKENS, b_in_rows=True, out_dtype="float32")
    for name, (inputs, outputs) in LINEARS.items()
]
