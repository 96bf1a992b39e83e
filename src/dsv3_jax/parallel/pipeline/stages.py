"""Which layers a pipeline's stages hold, and where their weights lie on each rank.

A unit is what a stage runs one after the other: a dense layer, a MoE layer, the final norm, an MTP
module. DeepSeek-V3, 3 dense + 58 MoE layers + 1 MTP module in 16 stages:

    stage 0    D0 D1 D2 -          the first and the last stage are the short ones
    stage 1    M0 M1 M2 M3
    ...
    stage 15   M56 M57 N T0        N the final norm, T the MTP module

Every stage has as many places as the longest needs. A rank's weights are stacked by place: place p
of chunk c is row c * places + p.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

from dsv3_jax.config.checks import require
from dsv3_jax.parallel.pipeline.orders import Layout


class UnitKind(enum.IntEnum):
    EMPTY = 0
    DENSE = 1
    MOE = 2
    NORM = 3
    MTP = 4


class Unit(NamedTuple):
    """The unit number `index` (from 0) of its kind in the model."""

    kind: UnitKind
    index: int


EMPTY_UNIT = Unit(UnitKind.EMPTY, 0)


def split_units(dense: int, moe: int, mtp: int, stages: int) -> tuple[tuple[Unit, ...], ...]:
    """The units of each stage: of `dense` + `moe` + `mtp` layers as many in one as in another.

    If they do not divide, the last stage has one less (the norm is there), then the first, then the
    second last and so on. All MTP modules are in the last stage. ValueError where a stage would
    have no layer.

    >>> [len(stage) for stage in split_units(3, 58, 1, 16)]
    [3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    """
    layers = [Unit(UnitKind.DENSE, i) for i in range(dense)]
    layers += [Unit(UnitKind.MOE, i) for i in range(moe)]
    count = len(layers) + mtp
    most = len(layers) + min(mtp, 1)
    rule = f"at most the model's {most} layers and MTP modules (which share a stage)"
    require(stages <= most, "stages of the pipeline", stages, rule)
    last = max(count // stages, mtp)
    rest = count - last
    sizes = [*_even_sizes(rest, stages - 1), last]
    ends = np.cumsum(sizes)
    starts = ends - sizes
    result = [tuple(layers[start:end]) for start, end in zip(starts, ends, strict=True)]
    result[-1] += (Unit(UnitKind.NORM, 0), *(Unit(UnitKind.MTP, i) for i in range(mtp)))
    return tuple(result)


def _even_sizes(count: int, parts: int) -> list[int]:
    """Sizes that differ by at most one; the short parts are the first, then the last ones."""
    if parts == 0:
        return []
    base, extra = divmod(count, parts)
    short = parts - extra
    order = [0, *range(parts - 1, 0, -1)]
    sizes = [base + 1] * parts
    for part in order[:short]:
        sizes[part] = base
    return sizes


@dataclass(frozen=True)
class StageTables:
    """The units of every rank. `chunks` and `places` as in the module docstring."""

    places: int
    kind: Int32[np.ndarray, "ranks chunks places"]
    """Values of `UnitKind`; that of MTP module i is MTP + i."""
    block: Int32[np.ndarray, "ranks rows"]
    """Of the layer at each row: its number among dense layers, MoE layers, MTP modules in this
    order; 0 where the row has none."""
    routed: Int32[np.ndarray, "ranks rows"]
    """Its number among MoE layers and MTP modules; 0 for all others."""
    dense: Int32[np.ndarray, "ranks dense_rows"]
    """The dense layers of a rank, in as many rows as the rank with most of them has."""
    dense_row: Int32[np.ndarray, "ranks chunks places"]
    """The row of `dense` of each dense layer, 0 for all others."""


def make_stage_tables(layout: Layout, units: Sequence[Sequence[Unit]]) -> StageTables:
    """The tables of stages with these `units` for a schedule's `layout`."""
    places = max(len(stage) for stage in units)
    counts = {
        kind: sum(unit.kind == kind for stage in units for unit in stage)
        for kind in (UnitKind.DENSE, UnitKind.MOE)
    }
    num_dense, num_moe = counts[UnitKind.DENSE], counts[UnitKind.MOE]

    def block(unit: Unit) -> int:
        first = {UnitKind.DENSE: 0, UnitKind.MOE: num_dense, UnitKind.MTP: num_dense + num_moe}
        return first[unit.kind] + unit.index if unit.kind in first else 0

    def routed(unit: Unit) -> int:
        first = {UnitKind.MOE: 0, UnitKind.MTP: num_moe}
        return first[unit.kind] + unit.index if unit.kind in first else 0

    def kind(unit: Unit) -> int:
        return unit.kind + (unit.index if unit.kind == UnitKind.MTP else 0)

    grid = [
        [
            [*units[layout.stage_of(rank, chunk)], *[EMPTY_UNIT] * places][:places]
            for chunk in range(layout.chunks)
        ]
        for rank in range(layout.ranks)
    ]
    dense_lists = [
        [u.index for chunk in rank for u in chunk if u.kind == UnitKind.DENSE] for rank in grid
    ]
    width = max(len(dense) for dense in dense_lists)
    dense = np.array([(row + [0] * width)[:width] for row in dense_lists], np.int32)

    def table(function: Callable[[Unit], int]) -> np.ndarray:
        return np.array([[[function(u) for u in c] for c in rank] for rank in grid], np.int32)

    dense_row = np.zeros((layout.ranks, layout.chunks, places), np.int32)
    is_dense = table(kind) == UnitKind.DENSE
    for rank in range(layout.ranks):
        dense_row[rank][is_dense[rank]] = np.arange(len(dense_lists[rank]))
    return StageTables(
        places=places,
        kind=table(kind),
        block=table(block).reshape(layout.ranks, -1),
        routed=table(routed).reshape(layout.ranks, -1),
        dense=dense,
        dense_row=dense_row,
    )
