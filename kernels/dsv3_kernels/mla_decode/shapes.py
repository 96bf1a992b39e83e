"""The attention of DeepSeek-V3 671B's decoding on one GPU.

Each GPU has requests of its own and all 128 heads, as DeepSeek serves; or, with tensor parallelism
of 2 or 8, 64 or 16 heads of all requests.
"""

from dataclasses import dataclass, replace

QK_DIM, V_DIM = 576, 512
SCALE = 1.873854 / 192**0.5
"""With YaRN's factor, (0.1 ln 40 + 1)^2; 192 values of a head's query before absorption."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    name: str
    batch: int
    tokens: int
    """Cached for each request, or a few less."""
    queries: int = 1
    heads: int = 128
    is_packed: bool = False


BF16 = [
    Shape(name="128 requests", batch=128, tokens=4096),
    Shape(name="32 requests", batch=32, tokens=4096),
    Shape(name="32 requests, a token guessed ahead", batch=32, tokens=4096, queries=2),
    Shape(name="a long request", batch=1, tokens=131072),
    Shape(name="128 requests, 64 heads", batch=128, tokens=4096, heads=64),
    Shape(name="32 requests, 64 heads", batch=32, tokens=4096, heads=64),
    Shape(name="128 requests, 16 heads", batch=128, tokens=4096, heads=16),
    Shape(name="32 requests, 16 heads", batch=32, tokens=4096, heads=16),
]
FP8 = [replace(shape, name=f"{shape.name}, FP8 cache", is_packed=True) for shape in BF16]
