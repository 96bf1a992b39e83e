"""The tile sizes of the Hopper kernels, and which tile a program works on when."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

SM_COUNT = 132
"""Of an H100 or H800 SXM: programs that run at once."""
SHARED_MEMORY_BYTES = 227 * 1024
"""That a program may use on Hopper."""
ROWS = 64
"""Of a warpgroup, and of a wgmma."""
TILE = 2 * ROWS
"""Queries (or, for d_kv, keys) of a program's tile: those of two warpgroups."""
NOPE_DIM, ROPE_DIM, V_DIM = 128, 64, 128
"""What a head's query, key and value have: 192 values for a score, 128 of output."""


PRODUCTS_PER_CYCLE = 2048
"""Of BF16, of the tensor cores of an SM."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one program works: queries stay and keys pass by, or the other way round for d_kv."""

    block: int
    """Rows that pass by in a step."""
    stages: int
    """Steps in shared memory."""
    step_cycles: int
    """Of a step of one warpgroup: of the tensor core or, if more, of shared memory, and what is
    estimated from SASS to pass between the end of one product and the beginning of the next."""
    programs: int = SM_COUNT
    left_in_registers: bool = True
    """Whether wgmma takes probabilities from registers. Mosaic's interpreter knows only shared
    memory, through which they then go."""

    def __post_init__(self) -> None:
        for name in ("block", "stages", "step_cycles", "programs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")


FORWARD = Tiles(block=128, stages=2, step_cycles=1280 + 200)
D_Q = Tiles(block=64, stages=3, step_cycles=1024 + 150)
D_KV = Tiles(block=32, stages=4, step_cycles=720 + 100)


@dataclass(frozen=True, kw_only=True)
class Turns:
    """The tiles of `heads` sequences of each of `batch`, dealt out in pairs.

    The last tile of a sequence has the most keys to see and the first the fewest, so a sequence's
    tiles are taken in the order last, first, last but one, second, ...: all pairs are as much work.
    Programs work on neighbouring pairs at once, so few heads' keys and values must stay in L2.
    """

    batch: int
    heads: int
    tiles: int
    """Of a sequence."""
    programs: int

    @property
    def total(self) -> int:
        return self.batch * self.heads * self.tiles

    @property
    def pairs(self) -> int:
        return -(-self.total // 2)

    def count(self, program: int | Int[Array, ""]) -> Int[Array, ""]:
        """Turns of a program."""
        rounds = lax.div(self.pairs - 1 - program, jnp.int32(self.programs)) + 1
        if self.total % 2 == 0:
            return 2 * rounds
        has_half_a_pair = program == (self.pairs - 1) % self.programs
        return 2 * rounds - jnp.astype(has_half_a_pair, jnp.int32)

    def place(self, program, turn) -> tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Batch, head and tile."""
        two = jnp.int32(2)
        position = 2 * (program + lax.div(turn, two) * self.programs) + lax.rem(turn, two)
        index = lax.div(position, jnp.int32(self.tiles))
        place = position - index * self.tiles
        half = lax.div(place, two)
        tile = lax.select(lax.rem(place, two) == 0, self.tiles - 1 - half, half)
        heads = jnp.int32(self.heads)
        return lax.div(index, heads), lax.rem(index, heads), tile


def share_of_peak(
    kernels: list[Tiles], batch: int, heads: int, seq: int, *, products: int
) -> float:
    """What the tensor cores need for `products` values a score over what `kernels` take.

    What is lost: cycles in which they wait, scores above the diagonal, programs without a pair in
    the last round. What is not counted: the first loads and last stores of a tile.
    """
    needed = batch * heads * seq * (seq + 1) // 2 * products / PRODUCTS_PER_CYCLE
    count = -(-seq // TILE)
    spent = 0
    for kernel in kernels:
        pairs = -(-batch * heads * count // 2)
        steps_of_a_pair = 2 * (count + 1) * TILE // kernel.block
        rounds = -(-pairs // kernel.programs)
        spent += rounds * kernel.programs * steps_of_a_pair * kernel.step_cycles
    return needed / spent
