"""The attention of DeepSeek-V3 671B on one GPU: a micro-batch of the pipeline, and prefill."""

from dataclasses import dataclass

HEADS, NOPE_DIM, ROPE_DIM, V_DIM = 128, 128, 64, 128
SCALE = 1.873854 / (NOPE_DIM + ROPE_DIM) ** 0.5
"""With YaRN's factor, (0.1 ln 40 + 1)^2."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    batch: int
    seq: int
    documents: bool
    heads: int = HEADS


TRAINING = [
    Shape(name="training", batch=1, seq=4096, documents=False),
    Shape(name="training, packed documents", batch=1, seq=4096, documents=True),
]
PREFILL = [
    Shape(name="prefill", batch=1, seq=4096, documents=False),
    Shape(name="prefill of short prompts", batch=8, seq=512, documents=False),
    Shape(name="prefill, long", batch=1, seq=32768, documents=False),
]
