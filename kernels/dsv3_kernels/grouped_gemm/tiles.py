"""The tile sizes of the Hopper kernel, and which of them a shape gets."""

from dataclasses import dataclass, replace

from dsv3_kernels.fp8_gemm.tiles import (
    L2_BYTES_PER_CYCLE,
    SHARED_MEMORY_BYTES,
    SM_COUNT,
    STORE_BYTES,
    M,
    tile_cycles,
)

K_BYTES = 128
"""Of k in one step: 128 values of 8 bits, for which one scale holds, or 64 of 16."""
ROWS = M // 2
"""Of a warpgroup, and of a wgmma."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one program works."""

    n: int
    """Columns of a tile: 128, 192 or 256. A thread keeps n/2 sums, in FP8 as many parts of them."""
    stages: int
    """Steps of k in shared memory."""
    store_slots: int
    """Pieces of 64 rows x 128 bytes of the result, per warpgroup, that wait to be written; one is
    kept for the ends of groups where they may end within a piece."""
    cluster: int = 2
    """Programs that work on tiles beside one another, and load a for one another."""
    programs: int = SM_COUNT
    """Programs in the grid; each works on every `programs`-th tile."""
    band: int = 16
    """Tiles of rows that are worked on side by side: both operands stay in L2."""

    def __post_init__(self) -> None:
        if self.n not in (128, 192, 256):
            raise ValueError(f"n is {self.n}, expected 128, 192 or 256")
        if self.cluster not in (1, 2) or self.programs % self.cluster:
            raise ValueError(
                f"cluster is {self.cluster}, expected 1 or 2 and a divisor of {self.programs}"
            )
        for name, least in (("stages", 1), ("store_slots", 2), ("programs", 1), ("band", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"stages and store_slots take {self.shared_memory_bytes} bytes of shared memory,"
                f" expected at most {SHARED_MEMORY_BYTES}"
            )

    @property
    def cluster_n(self) -> int:
        """Columns of a cluster's tile."""
        return self.cluster * self.n

    @property
    def scale_bytes(self) -> int:
        """Of a stage's scales at most: none for 256 columns, which only BF16 has."""
        return 0 if self.n == 256 else 4 * (M + self.n)

    @property
    def shared_memory_bytes(self) -> int:
        """What the buffers take at most; barriers and the compiler's own are under 1 KB."""
        stage = (M + self.n) * K_BYTES + self.scale_bytes
        return self.stages * stage + 2 * self.store_slots * ROWS * STORE_BYTES

    def step_cycles(self, b_in_rows: bool) -> float:
        """Of a step of k: of the tensor core, of shared memory or of L2, whichever takes longest.

        Shared memory moves 128 bytes a cycle, read or written. Scales of columns take a cycle for
        each: every warp reads them all, 8 at a time.
        """
        written = (M + self.n) * K_BYTES
        read = 2 * (ROWS + self.n) * K_BYTES
        shared_memory = (written + read) / 128 + (self.n if b_in_rows else 0)
        l2 = (M / self.cluster + self.n) * K_BYTES / L2_BYTES_PER_CYCLE
        return max(self.tensor_cycles, shared_memory, l2)

    @property
    def tensor_cycles(self) -> int:
        """Of a step of k: 4 MMAs of n/2 for each of two warpgroups."""
        return 4 * self.n

    def rounds(self, row_tiles: int, n: int) -> int:
        """Tiles of the result that a program works on, one after the other."""
        tiles = row_tiles * -(-n // self.cluster_n)
        return -(-tiles // (self.programs // self.cluster))

    def share_of_peak(self, group_rows: int, groups: int, n: int, b_in_rows: bool) -> float:
        """What the tensor cores could do with the time of all rounds, as a share: an upper bound.

        Of groups of the same size. What is lost: the cycles of memories, values past the edges,
        programs without a tile in the last round. What is not counted: the first loads, the stores.
        """
        needed = groups * group_rows * n * self.tensor_cycles / (M * self.n)
        row_tiles = groups * -(-group_rows // M)
        return needed / (self.rounds(row_tiles, n) * self.programs * self.step_cycles(b_in_rows))

    def share_with_tile_costs(
        self, group_rows: int, groups: int, n: int, k_bytes: int, b_in_rows: bool, out_bytes: int
    ) -> float:
        """The same, with what every tile takes besides its steps; `k_bytes` of a row."""
        steps = -(-k_bytes // K_BYTES)
        of_steps = steps * self.step_cycles(b_in_rows)
        share = self.share_of_peak(group_rows, groups, n, b_in_rows) * k_bytes / (steps * K_BYTES)
        return share * of_steps / (of_steps + tile_cycles(self.n, out_bytes))


WIDE_FP8 = Tiles(n=192, stages=4, store_slots=3)
"""Per step 768 cycles of tensor core, 832 of shared memory, 845 of L2."""
SQUARE_FP8 = Tiles(n=128, stages=5, store_slots=3)
"""512, 640 and 634 cycles."""
WIDE_BF16 = Tiles(n=256, stages=4, store_slots=2)
"""1,024, 1,024 and 1,056 cycles."""
MIDDLE_BF16 = Tiles(n=192, stages=4, store_slots=3)
SQUARE_BF16 = Tiles(n=128, stages=5, store_slots=3)


def choose(group_rows: int, groups: int, n: int, *, is_fp8: bool, b_in_rows: bool) -> Tiles:
    """The tiles expected to be quickest for groups of the same size, [group_rows, k] x [n, k].

    The narrower ones where a last round that is nearly empty, or columns past the last, cost more
    than the wider ones gain; no clusters where a tile has none beside it.
    """
    pairs = (WIDE_FP8, SQUARE_FP8) if is_fp8 else (WIDE_BF16, MIDDLE_BF16, SQUARE_BF16)
    choices = (*pairs, *(replace(tiles, cluster=1) for tiles in pairs))
    return max(choices, key=lambda tiles: tiles.share_of_peak(group_rows, groups, n, b_in_rows))
