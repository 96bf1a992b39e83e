"""The tile sizes of the Hopper kernel, and which of them a shape gets."""

from dataclasses import dataclass, replace

from dsv3_kernels.quantize.tiles import MEMORY_BYTES_PER_CYCLE

SM_COUNT = 132
"""Of an H100 or H800 SXM: programs that run at once."""
SHARED_MEMORY_BYTES = 227 * 1024
"""That a program may use on Hopper."""
M = 128
"""Rows of a tile: 64, those of a wgmma, for each of two warpgroups."""
K = 128
"""Of k in one step: what one scale holds for."""
L2_BYTES_PER_CYCLE = 5120 / SM_COUNT
"""That an SM gets of L2's 5,120, NVIDIA's figure for the A100; there is none for Hopper."""
STORE_BYTES = 128
"""Of a row in one store: the widest swizzle."""
FILL_CYCLES = 1500
"""From a tile's first load to its first product. No fact of the hardware: the one number fitted to
speeds that were measured, see `dsv3_kernels.published`."""


def tile_cycles(n: int, out_bytes: int) -> float:
    """What a tile of `n` columns takes besides its steps of k: it begins with nothing to multiply,
    and when all SMs have a tile to store at once they wait for memory."""
    return FILL_CYCLES + M * n * out_bytes / MEMORY_BYTES_PER_CYCLE


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one program works. Registers follow from `n`: 64 x n sums, and as many parts of them."""

    n: int
    """Columns of a tile: 128 or 192."""
    stages: int
    """Steps of k in shared memory."""
    store_slots: int
    """Pieces of 64 rows x 128 bytes of the result, per warpgroup, that wait to be written. A tile
    has a multiple of them, so that the next one goes on with the slot whose store is the oldest."""
    cluster: int = 2
    """Programs that work on tiles below one another, and load b for one another."""
    programs: int = SM_COUNT
    """Programs in the grid; each works on every `programs`-th tile."""
    band: int = 8
    """A cluster's tiles of rows that are worked on side by side: both operands stay in L2."""

    def __post_init__(self) -> None:
        if self.n not in (128, 192):
            raise ValueError(f"n is {self.n}, expected 128 or 192")
        if self.cluster not in (1, 2) or self.programs % self.cluster:
            raise ValueError(
                f"cluster is {self.cluster}, expected 1 or 2 and a divisor of {self.programs}"
            )
        for name in ("stages", "store_slots", "programs", "band"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.n // 64 % self.store_slots:
            raise ValueError(
                f"store_slots is {self.store_slots}, expected a divisor of n / 64 = {self.n // 64}"
            )
        if self.shared_memory_bytes > SHARED_MEMORY_BYTES:
            raise ValueError(
                f"stages and store_slots take {self.shared_memory_bytes} bytes of shared memory,"
                f" expected at most {SHARED_MEMORY_BYTES}"
            )

    @property
    def cluster_m(self) -> int:
        """Rows of a cluster's tile."""
        return self.cluster * M

    @property
    def shared_memory_bytes(self) -> int:
        """What the buffers take at most; barriers and the compiler's own are under 1 KB."""
        values, scales = (M + self.n) * K, 4 * (M + self.n)
        return self.stages * (values + scales) + 2 * self.store_slots * 64 * STORE_BYTES

    def step_cycles(self, b_in_rows: bool) -> float:
        """Of a step of k, whose bound is shared memory, or L2 where no cluster shares b.

        Shared memory moves 128 bytes a cycle, read or written. Scales of columns take a cycle for
        each: every warp reads them all, 8 at a time.
        """
        written = (M + self.n) * K
        read = 2 * (M // 2 + self.n) * K
        shared_memory = (written + read) / 128 + (self.n if b_in_rows else 0)
        return max(shared_memory, (M + self.n / self.cluster) * K / L2_BYTES_PER_CYCLE)

    def rounds(self, batch: int, m: int, n: int) -> int:
        """Tiles of the result that a program works on, one after the other."""
        tiles = batch * -(-m // self.cluster_m) * -(-n // self.n)
        return -(-tiles // (self.programs // self.cluster))

    def share_of_peak(self, batch: int, m: int, n: int, b_in_rows: bool) -> float:
        """What the tensor cores could do with the time of all rounds, as a share: an upper bound.

        What is lost: the cycles of memories, values past the edges, programs without a tile in the
        last round. What is not counted: the first loads and the last stores.
        """
        needed = batch * m * n / 32  # 4,096 FP8 products a cycle, K of them for each result
        spent = self.rounds(batch, m, n) * self.programs * self.step_cycles(b_in_rows)
        return needed / spent

    def share_with_tile_costs(
        self, batch: int, m: int, n: int, k: int, b_in_rows: bool, out_bytes: int
    ) -> float:
        """The same, with what every tile takes besides its steps."""
        steps = -(-k // K)
        of_steps = steps * self.step_cycles(b_in_rows)
        share = self.share_of_peak(batch, m, n, b_in_rows) * k / (steps * K)
        return share * of_steps / (of_steps + tile_cycles(self.n, out_bytes))


WIDE = Tiles(n=192, stages=4, store_slots=3)
"""Per step 768 cycles of tensor core; 28 KB from L2, 40 KB into shared memory."""
SQUARE = Tiles(n=128, stages=5, store_slots=2)
"""512 cycles; 24 and 32 KB."""


def choose(batch: int, m: int, n: int, b_in_rows: bool) -> Tiles:
    """The tiles expected to be quickest for `batch` products [m, k] x [n, k].

    The narrower ones where a last round that is nearly empty, or columns past the last, cost more
    than the wider ones gain; no clusters where a tile has none below it.
    """
    single = [replace(tiles, cluster=1) for tiles in (WIDE, SQUARE)]
    choices = (WIDE, SQUARE, *single)
    return max(choices, key=lambda tiles: tiles.share_of_peak(batch, m, n, b_in_rows))
