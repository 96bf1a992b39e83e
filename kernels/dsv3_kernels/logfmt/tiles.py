"""The tile sizes of the Hopper kernels, and what bounds their speed."""

from dsv3_kernels.logfmt.reference import METADATA_BYTES, TILE, packed_bytes

TILES = 128
"""Of 128 values, in a program: one for each thread."""
PIECE = 64
"""Values of a tile that a thread works on at once: 128 bytes of BF16."""
SHARED_MEMORY_BYTES = 227 * 1024
"""Of an SM, of which each program takes 1 KB more than its buffers."""


def words(bits: int) -> int:
    """Of 32 bits, in a packed tile: 8 groups of bits / 2, and one of the limits. An odd number, so
    that 32 threads with a tile each meet in no bank of shared memory."""
    return packed_bytes(TILE, bits) // METADATA_BYTES


def value_bytes(itemsize: int) -> int:
    """Of a program's values."""
    return TILES * TILE * itemsize


def coded_bytes(bits: int) -> int:
    """Of the same, packed."""
    return TILES * packed_bytes(TILE, bits)


def programs_per_sm(shared_memory_bytes: int, registers: int) -> int:
    """How many programs of 128 threads an SM has room for."""
    memory = SHARED_MEMORY_BYTES // (shared_memory_bytes + 1024)
    return min(memory, 65536 // (128 * (registers + -registers % 8)))
