"""The rows that DeepSeek-V3 671B moves in a layer, on one of 64 GPUs, of 4,096 tokens on each.

A token's 8 experts are on 3.6 of the 8 nodes, and on 2.05 of the 8 GPUs of each, if choices are
even; peers' buffers have 1.25 times that many slots, and experts' 1.125 times. On the wire a row is
bytes: 7,168 in E4M3, 56 exponents, 8 routing weights in BF16.
"""

from dataclasses import dataclass

TOKENS, HIDDEN, TOP_K, PEERS = 4096, 7168, 8, 8
WIRE_BYTES = HIDDEN + HIDDEN // 128 + 2 * TOP_K
AT_NODE = 14744
"""Rows that come over the first hop, one for a token and node."""
AT_GPU = 30288
"""Over the second, one for a token and GPU."""
NODE_SLOTS = PEERS * 2304
GPU_SLOTS = PEERS * 4736
EXPERT_SLOTS = 4 * 9224
"""Of the 4 experts that are here, for 32,768 rows."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Rows and slots, `filled` of which have a row; a row is in at most `top_k` slots."""

    name: str
    rows: int
    slots: int
    filled: int
    top_k: int = TOP_K
    width: int = HIDDEN
    dtype: str = "bfloat16"
    has_weights: bool = False
    """The model's own sums have none: its weights go into the experts' last product."""


TAKEN = [
    Shape(
        name="dispatch to nodes",
        rows=TOKENS,
        slots=NODE_SLOTS,
        filled=AT_NODE,
        width=WIRE_BYTES,
        dtype="uint8",
    ),
    Shape(
        name="dispatch inside the node",
        rows=NODE_SLOTS,
        slots=GPU_SLOTS,
        filled=AT_GPU,
        width=WIRE_BYTES,
        dtype="uint8",
    ),
    Shape(name="experts' slots", rows=GPU_SLOTS, slots=EXPERT_SLOTS, filled=TOKENS * TOP_K),
    Shape(name="combine's backward", rows=TOKENS, slots=NODE_SLOTS, filled=AT_NODE),
]
SUMMED = [
    Shape(name="experts' sums", rows=GPU_SLOTS, slots=EXPERT_SLOTS, filled=TOKENS * TOP_K),
    Shape(name="combine inside the node", rows=NODE_SLOTS, slots=GPU_SLOTS, filled=AT_GPU),
    Shape(name="combine of nodes", rows=TOKENS, slots=NODE_SLOTS, filled=AT_NODE),
    Shape(
        name="dispatch's backward",
        rows=TOKENS,
        slots=NODE_SLOTS,
        filled=AT_NODE,
        width=HIDDEN + TOP_K,  # with the gradients of the routing weights
    ),
    *(
        Shape(
            name=f"{top_k} of {top_k}, weighted",
            rows=TOKENS,
            slots=TOKENS * top_k,
            filled=TOKENS * top_k,
            top_k=top_k,
            has_weights=True,
        )
        for top_k in (8, 4)
    ),
]
