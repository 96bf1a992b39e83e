"""How a row is cut for a program's threads, and what the Hopper kernels leave of the bandwidth."""

import math
from dataclasses import dataclass

from dsv3_kernels.fp8_gemm.tiles import SM_COUNT
from dsv3_kernels.quantize.tiles import MEMORY_BYTES_PER_CYCLE

THREADS = 128
"""Of a program: a warpgroup, a warp on each scheduler."""
VECTOR_BYTES = 16
"""Most that one instruction brings a thread."""
MOST_REGISTERS = 64
"""Of a thread, for a row."""
MOST_COLUMNS = MOST_REGISTERS * THREADS
"""Of a row that is summed: a sum has a register."""
MOST_TOP_K = 16
"""Rows of a sum: the code has a copy for each."""
LATENCY_CYCLES = 1000
"""Of memory."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Columns that all threads have in turn, `vector` of them side by side."""

    start: int
    size: int
    vector: int


def spans(width: int, itemsize: int) -> tuple[Span, ...]:
    """The columns of rows that lie one behind the other, in as wide vectors as rows are aligned to.

    A multiple of 128 is cut exactly; otherwise the last 128 columns are a span that reaches back
    over others, so `width` is at least that.

    >>> [(span.start, span.size, span.vector) for span in spans(7240, 1)]
    [(0, 7168, 8), (7112, 128, 1)]
    """
    assert width >= THREADS
    cut, start = [], 0
    vector = math.gcd(VECTOR_BYTES, width * itemsize) // itemsize
    while vector:
        size = (width - start) // (THREADS * vector) * THREADS * vector
        if size:
            cut.append(Span(start=start, size=size, vector=vector))
        start, vector = start + size, vector // 2
    if start < width:
        cut.append(Span(start=width - THREADS, size=THREADS, vector=1))
    return tuple(cut)


def row_registers(width: int, itemsize: int) -> int:
    """Registers of a thread that a row takes; a vector has its own, be they filled or not."""
    return sum(
        span.size // (THREADS * span.vector) * -(-span.vector * itemsize // 4)
        for span in spans(width, itemsize)
    )


def programs_per_sm(registers: int) -> int:
    """How many programs an SM has room for: it has 65,536 registers and 2,048 threads."""
    return min(65536 // (THREADS * (registers + -registers % 8)), 2048 // THREADS)


def shares(registers: int, programs: int, moved_bytes: float, loads: float) -> dict[str, float]:
    """What is left of memory's bandwidth, of `programs` that move `moved_bytes` each on average.

    `latency`: a program waits for its indices, for `loads` rows one after the other, and to begin
    and end; as many as an SM has room for wait at once. `ends`: the first program and the last have
    nothing beside them.
    """
    cycles = moved_bytes / MEMORY_BYTES_PER_CYCLE
    path = (2 + loads) * LATENCY_CYCLES
    whole = programs * cycles / SM_COUNT
    return {
        "latency": min(1.0, programs_per_sm(registers) * cycles / path),
        "ends": whole / (whole + path),
    }
