"""The tile sizes of the Hopper kernels, and what bounds their speed."""

M = 64
"""Rows of a tile: those of a wgmma's register layout. 64 x 128 values are 64 a thread."""
K = 128
"""Columns of it: one scale."""
MULTIPLE = 64
"""Of both sizes, for which nothing is copied: half a tile of k, 64 bytes of 8-bit values."""
MEMORY_BYTES_PER_CYCLE = 3.35e12 / 132 / 1.755e9
"""Of an H100 or H800 SXM: what an SM gets of the bandwidth, 14.5."""


def shared_memory_bytes(itemsize: int, rows: int) -> int:
    """What a program's buffers take for a tile of `rows` rows, its values and its scales."""
    return rows * K * (itemsize + 1) + 4 * rows


def programs_per_sm(itemsize: int, rows: int, registers: int) -> int:
    """How many programs of 128 threads an SM has room for."""
    memory = 227 * 1024 // (shared_memory_bytes(itemsize, rows) + 4096)
    return min(memory, 65536 // (128 * (registers + -registers % 8)))
