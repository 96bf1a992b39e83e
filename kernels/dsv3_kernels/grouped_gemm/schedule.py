"""What the programs of the Hopper kernel work on, found on the device from the groups' sizes.

One entry for each tile of rows and each group that has rows in it (or, where k is ragged, for each
group): the group, the tile's first row, the group's first row, the one after its last, steps of k.

sizes [130, 0, 60], 200 rows, tiles of 128, 56 steps of k:

    [0, 0, 0, 130, 56]  [0, 128, 0, 130, 56]  [2, 128, 130, 190, 56]  [2, 128, 190, 200, 0]

The last of them is what no group has: sums of no steps, zeros. Tiles begin at multiples of their
height, because TMA needs them to begin at multiples of 8.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int

GROUP, ROW, START, END, STEPS = range(5)
"""Columns of a schedule. Its last row is none: it begins with the number of entries."""


def ragged_rows(
    group_sizes: Int[Array, " groups"], rows: int, tile: int, alignment: int, steps: int
) -> Int[Array, "entries_and_count 5"]:
    """Groups one after the other, then the rows past the last of them."""
    starts, ends = _bounds(group_sizes, rows)
    starts, ends = jnp.append(starts, ends[-1]), jnp.append(ends, jnp.int32(rows))
    entries = -(-rows // tile) + (0 if alignment % tile == 0 else group_sizes.size)
    return _row_tiles(starts, ends, group_sizes.size, entries, tile, steps)


def masked_rows(
    group_sizes: Int[Array, " groups"], max_rows: int, tile: int, stored: int, steps: int
) -> Int[Array, "entries_and_count 5"]:
    """Each group in `max_rows` of its own, of which only the filled ones are worked on.

    Where groups begin at multiples of `stored`, the rows of one store, they end at such too.
    """
    starts = jnp.arange(group_sizes.size, dtype=jnp.int32) * max_rows
    if max_rows % stored == 0:
        group_sizes = -(-group_sizes // stored) * stored
    ends = starts + jnp.minimum(group_sizes, max_rows).astype(jnp.int32)
    entries = group_sizes.size * (-(-max_rows // tile) + (max_rows % tile != 0))
    return _row_tiles(starts, ends, group_sizes.size, entries, tile, steps)


def ragged_k(
    group_sizes: Int[Array, " groups"], rows: int, depth: int
) -> Int[Array, "groups_and_count 5"]:
    """Each group's rows, which are its k, in steps of `depth`."""
    starts, ends = _bounds(group_sizes, rows)
    groups = jnp.arange(group_sizes.size, dtype=jnp.int32)
    columns = groups, jnp.zeros_like(groups), starts, ends, -(-(ends - starts) // depth)
    return _with_count(jnp.stack(columns, axis=1), jnp.int32(group_sizes.size))


def _bounds(
    group_sizes: Int[Array, " groups"], rows: int
) -> tuple[Int[Array, " groups"], Int[Array, " groups"]]:
    ends = jnp.minimum(jnp.cumsum(group_sizes, dtype=jnp.int32), rows)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]]), ends


def _row_tiles(
    starts: Int[Array, " parts"],
    ends: Int[Array, " parts"],
    groups: int,
    entries: int,
    tile: int,
    steps: int,
) -> Int[Array, "entries_and_count 5"]:
    """Parts from `groups` on are zeros."""
    tiles = jnp.where(ends > starts, -(-ends // tile) - starts // tile, 0)
    tiles_end = jnp.cumsum(tiles, dtype=jnp.int32)
    index = jnp.arange(entries, dtype=jnp.int32)
    part = jnp.sum(tiles_end <= index[:, None], axis=1, dtype=jnp.int32)
    part = jnp.minimum(part, starts.size - 1)
    row = (starts[part] // tile + index - (tiles_end - tiles)[part]) * tile
    group, part_steps = jnp.minimum(part, groups - 1), jnp.where(part < groups, steps, 0)
    columns = group, row, starts[part], ends[part], part_steps
    return _with_count(jnp.stack(columns, axis=1), tiles_end[-1])


def _with_count(
    entries: Int[Array, "entries 5"], count: Int[Array, ""]
) -> Int[Array, "entries_and_count 5"]:
    return jnp.concatenate([entries, jnp.full((1, entries.shape[1]), count, jnp.int32)])
