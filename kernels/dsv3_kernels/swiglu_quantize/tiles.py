"""The tile sizes of the Hopper kernels, and what bounds their speed."""

from dsv3_kernels.quantize.tiles import K, M

__all__ = ["K", "M", "asked_bytes", "moved_bytes", "programs_per_sm"]
SHARED_MEMORY_BYTES = 227 * 1024
"""Of an SM, of which each program takes 1 KB more than its buffers."""


def asked_bytes(itemsize: int, is_backward: bool) -> int:
    """What a program waits for: its tiles of gate and up, and of d_a in the same dtype."""
    return M * K * itemsize * (3 if is_backward else 2)


def moved_bytes(itemsize: int, is_backward: bool) -> int:
    """The same and what it writes: d_gate, d_up; or values in 8 bits. 4 bytes for each row."""
    written = M * K * (2 * itemsize if is_backward else 1)
    return asked_bytes(itemsize, is_backward) + written + 4 * M


def programs_per_sm(shared_memory_bytes: int, registers: int) -> int:
    """How many programs of 128 threads an SM has room for."""
    memory = SHARED_MEMORY_BYTES // (shared_memory_bytes + 1024)
    return min(memory, 65536 // (128 * (registers + -registers % 8)))
