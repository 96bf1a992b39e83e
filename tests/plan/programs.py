"""The text of a compiled program as XLA prints it, shortened by hand, and its figures.

layers.hlo.txt is for 16 devices (two nodes) of a mesh data=1, node=2, gpu=8. Three rounds of: a
gathered weight, a dispatch under a product, a choice between nothing and a product in FP8, a
combine that nothing covers.
"""

from pathlib import Path

LAYERS = Path(__file__).with_name("layers.hlo.txt").read_text(encoding="utf-8")
DOT = 2 * 1024 * 512 * 256
"""FLOPs of the product in BF16, and of that in FP8."""
ROWS = 1024 * 512 * 2
"""Bytes of the rows that are sent."""
HALF = 1024 * 256 * 2
"""Bytes of the product's result."""
WEIGHT = 512 * 256 * 2
