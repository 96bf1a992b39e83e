"""The tile sizes of the Hopper kernels, and how long they should take."""

from dataclasses import dataclass

from dsv3_kernels.fp8_gemm.tiles import L2_BYTES_PER_CYCLE, SM_COUNT
from dsv3_kernels.mla_prefill.tiles import PRODUCTS_PER_CYCLE
from dsv3_kernels.quantize.tiles import MEMORY_BYTES_PER_CYCLE

ROWS = 64
"""Of queries' heads, of a program: those of a wgmma."""
BLOCK = 64
"""Keys of a step: those of a page."""
ROPE_DIM, V_DIM = 64, 512
QK_DIM = V_DIM + ROPE_DIM
STAGES = 2
"""Blocks of keys in shared memory."""
ITEM_BLOCKS = 1
"""What it costs a part to begin with a request, in blocks: to store the output, mostly."""
LOWEST = -(2.0**100)
"""Where the running maximum starts: finite, so that a row that sees no key yet has no NaN."""

SCORES_CYCLES, MIXING_CYCLES = 1152, 1024
"""Of the tensor core, in a step: q k^T, and p v for both warpgroups."""
SOFTMAX_CYCLES = 600
"""In between, while the tensor core waits: estimated from some 350 instructions in SASS."""
LAUNCH_CYCLES = 3000
"""Estimated, of both kernels: what passes before the first block is there, and in between."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one program works."""

    producer_registers: int
    consumer_registers: int
    """Of a thread. A program starts with 168 for each of three; more in all would wait for ever."""
    programs: int = SM_COUNT
    in_place: bool = True
    """Whether wgmma takes probabilities from registers and adds to an output that was there before.
    Mosaic's interpreter has neither: its operands are in shared memory, its sums begin at zero."""

    def __post_init__(self) -> None:
        if self.programs < 1:
            raise ValueError(f"programs is {self.programs}, expected at least 1")
        registers = self.producer_registers + 2 * self.consumer_registers
        if registers > 3 * 168:
            raise ValueError(f"registers of three threads are {registers}, expected at most 504")


BF16 = Tiles(producer_registers=24, consumer_registers=240)
FP8 = Tiles(producer_registers=120, consumer_registers=192)


def parts_at_once(row_tiles: int, programs: int = SM_COUNT) -> int:
    """Of all keys, so that each has a program for every tile of rows."""
    return max(1, programs // row_tiles)


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """What the kernels should take for requests that are all as long, and what they need at least.

    Parts that a program stores last stay in L2 until they are put together; those that it stores
    before, one for each request but the first, go to memory and come back.
    """

    batch: int
    rows: int
    """Of a request: queries x heads."""
    tokens: int
    row_bytes: int
    """Of a token in the cache."""

    @property
    def row_tiles(self) -> int:
        return -(-self.rows // ROWS)

    @property
    def parts(self) -> int:
        return parts_at_once(self.row_tiles)

    @property
    def blocks(self) -> int:
        """Of a request."""
        return -(-self.tokens // BLOCK)

    @property
    def steps(self) -> int:
        """Blocks of a part."""
        return -(-self.batch * (self.blocks + ITEM_BLOCKS) // self.parts)

    @property
    def part_bytes(self) -> int:
        """Of a request's output in FP32."""
        return self.row_tiles * ROWS * V_DIM * 4

    @property
    def needed_bytes(self) -> int:
        """Pages, q and the output."""
        return self.batch * (self.tokens * self.row_bytes + self.rows * 2 * (QK_DIM + V_DIM))

    @property
    def needed_flops(self) -> int:
        return 2 * self.batch * self.rows * self.tokens * (QK_DIM + V_DIM)

    @property
    def memory(self) -> float:
        moved = self.needed_bytes + 2 * (self.batch - 1) * self.part_bytes
        return moved / (SM_COUNT * MEMORY_BYTES_PER_CYCLE)

    @property
    def l2(self) -> float:
        return self.steps * BLOCK * self.row_bytes / L2_BYTES_PER_CYCLE

    @property
    def store(self) -> float:
        """Of one part's output by one program."""
        return ROWS * V_DIM * 4 / L2_BYTES_PER_CYCLE

    @property
    def products(self) -> float:
        """With what the tensor core waits for: softmax, and stores but the last."""
        stores = (self.batch - 1) / self.parts * self.store
        return self.steps * (SCORES_CYCLES + SOFTMAX_CYCLES + MIXING_CYCLES) + stores

    @property
    def total(self) -> float:
        slots = self.parts + self.batch - 1
        combined = slots * self.part_bytes / (SM_COUNT * L2_BYTES_PER_CYCLE)
        longest = max(self.memory, self.l2, self.products)
        return LAUNCH_CYCLES + longest + self.store + combined

    @property
    def shares(self) -> dict[str, float]:
        """Of the peak of memory and of the tensor cores."""
        of_memory = self.needed_bytes / (SM_COUNT * MEMORY_BYTES_PER_CYCLE)
        of_tensor_cores = self.needed_flops / (2 * PRODUCTS_PER_CYCLE * SM_COUNT)
        return {"memory": of_memory / self.total, "bf16": of_tensor_cores / self.total}
