"""Stages of the model: every unit once and in order, even sizes, and where a rank finds them."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv3_jax.parallel.pipeline.orders import Layout
from dsv3_jax.parallel.pipeline.stages import Unit, UnitKind, make_stage_tables, split_units
from tests.parallel.pipeline.cases import NAMES, schedule_arguments

EMPTY, DENSE, MOE, NORM, MTP = UnitKind


def units_in_order(dense: int, moe: int, mtp: int) -> list[Unit]:
    """The model's, from the first layer to the last MTP module."""
    counts = ((DENSE, dense), (MOE, moe), (NORM, 1), (MTP, mtp))
    return [Unit(kind, index) for kind, count in counts for index in range(count)]


@st.composite
def models(draw, stages: int):
    """(dense, moe, mtp) that can be split into `stages`."""
    dense, moe, mtp = (draw(st.integers(0, most)) for most in (12, 40, 3))
    assume(dense + moe >= 1 and dense + moe + mtp >= stages)
    assume(mtp <= 1 or stages == 1 or dense + moe >= stages - 1)
    return dense, moe, mtp


@given(st.data())
def test_every_unit_once_and_in_order(data):
    count = data.draw(st.integers(1, 20))
    dense, moe, mtp = data.draw(models(count))
    stages = split_units(dense, moe, mtp, count)
    assert len(stages) == count
    assert [unit for stage in stages for unit in stage] == units_in_order(dense, moe, mtp)
    assert stages[-1][-1 - mtp :] == tuple(units_in_order(0, 0, mtp))


@given(st.data())
def test_stages_are_even_and_the_short_ones_where_said(data):
    """MTP modules count as layers, the norm does not. More modules than a stage's share stay."""
    count = data.draw(st.integers(1, 20))
    dense, moe, mtp = data.draw(models(count))
    sizes = [sum(u.kind != NORM for u in stage) for stage in split_units(dense, moe, mtp, count)]
    even = sizes if mtp <= sum(sizes) // count else sizes[:-1]
    assert min(sizes) >= 1
    assert not even or max(even) - min(even) <= 1
    if even is sizes:
        by_length = [count - 1, 0, *range(count - 2, 0, -1)][:count]
    else:
        assert sizes[-1] == mtp
        by_length = [0, *range(count - 2, 0, -1)][: count - 1]
    short = sum(size == min(even, default=0) for size in even)
    if short < len(even):
        assert [part for part in by_length if sizes[part] == min(even)] == by_length[:short]


def test_deepseek_v3_on_sixteen():
    """The drawing in the module's docstring."""
    stages = split_units(3, 58, 1, 16)
    assert [len(stage) for stage in stages] == [3, *[4] * 15]
    assert stages[0] == (Unit(DENSE, 0), Unit(DENSE, 1), Unit(DENSE, 2))
    assert stages[1] == tuple(Unit(MOE, index) for index in range(4))
    assert stages[15] == (Unit(MOE, 56), Unit(MOE, 57), Unit(NORM, 0), Unit(MTP, 0))


@pytest.mark.parametrize(
    ("model", "stages", "expected"),
    [
        ((1, 0, 0), 1, ["D0 N0"]),
        ((1, 2, 1), 1, ["D0 M0 M1 N0 T0"]),
        ((1, 1, 1), 3, ["D0", "M0", "N0 T0"]),
        ((0, 2, 2), 3, ["M0", "M1", "N0 T0 T1"]),
        ((1, 4, 2), 4, ["D0", "M0 M1", "M2 M3", "N0 T0 T1"]),
        ((2, 4, 0), 4, ["D0", "D1 M0", "M1 M2", "M3 N0"]),
    ],
)
def test_small_models_by_hand(model, stages, expected):
    letters = {DENSE: "D", MOE: "M", NORM: "N", MTP: "T"}
    found = split_units(*model, stages)
    drawn = [" ".join(f"{letters[unit.kind]}{unit.index}" for unit in s) for s in found]
    assert drawn == expected


@pytest.mark.parametrize(
    ("model", "stages"), [((1, 2, 0), 4), ((1, 2, 1), 5), ((0, 1, 2), 3), ((0, 2, 3), 4)]
)
def test_refuses_stages_without_a_layer(model, stages):
    count = model[0] + model[1] + min(model[2], 1)  # MTP modules share a stage
    rule = f"^stages of the pipeline is {stages}, expected at most the model's {count} layers"
    with pytest.raises(ValueError, match=rule):
        split_units(*model, stages)


@given(st.data())
def test_a_rank_finds_its_units(data):
    """Every place of every chunk, unit by unit, against the stages themselves."""
    layout = Layout(*data.draw(schedule_arguments()))
    dense, moe, mtp = data.draw(models(layout.stages))
    stages = split_units(dense, moe, mtp, layout.stages)
    tables = make_stage_tables(layout, stages)
    places = max(len(stage) for stage in stages)
    assert tables.places == places
    assert tables.kind.shape == (layout.ranks, layout.chunks, places)
    assert tables.block.shape == tables.routed.shape == (layout.ranks, layout.chunks * places)
    first_block = {DENSE: 0, MOE: dense, MTP: dense + moe}
    first_routed = {MOE: 0, MTP: moe}
    found: dict[Unit, int] = {}
    for rank, chunk, place in np.ndindex(tables.kind.shape):
        kind, row = int(tables.kind[rank, chunk, place]), chunk * places + place
        units = stages[layout.stage_of(rank, chunk)]
        if place >= len(units):
            assert (kind, tables.block[rank, row], tables.routed[rank, row]) == (EMPTY, 0, 0)
            continue
        unit = units[place]
        found[unit] = found.get(unit, 0) + 1
        assert kind == unit.kind + (unit.index if unit.kind == MTP else 0)
        block, routed = (first.get(unit.kind) for first in (first_block, first_routed))
        assert tables.block[rank, row] == (0 if block is None else block + unit.index)
        assert tables.routed[rank, row] == (0 if routed is None else routed + unit.index)
        dense_row = tables.dense_row[rank, chunk, place]
        if unit.kind == DENSE:
            assert tables.dense[rank, dense_row] == unit.index
        else:
            assert dense_row == 0
    copies = 2 if layout.name == "dualpipe" else 1
    assert found == dict.fromkeys(units_in_order(dense, moe, mtp), copies)


@pytest.mark.parametrize("name", NAMES)
def test_deepseek_v3_s_tables(name):
    """On 16 stages; both ends are on rank 0 where a rank has two chunks."""
    layout = Layout(name, 16, 40)
    tables = make_stage_tables(layout, split_units(3, 58, 1, 16))
    assert tables.places == 4
    first = [DENSE, DENSE, DENSE, EMPTY]
    last = [MOE, MOE, NORM, MTP]
    chunks = {"dualpipe": (first, last), "dualpipev": (first, last)}.get(name, (first,))
    np.testing.assert_array_equal(tables.kind[0], chunks)
    dense_ranks = {"dualpipe": [0, 15]}.get(name, [0])
    dense = np.zeros((layout.ranks, 3), np.int32)
    dense[dense_ranks] = [0, 1, 2]
    np.testing.assert_array_equal(tables.dense, dense)
    rows = tables.block[0], tables.routed[0]
    np.testing.assert_array_equal(rows[0][:4], [0, 1, 2, 0])
    np.testing.assert_array_equal(rows[1][:4], [0, 0, 0, 0])
    if layout.chunks == 2:
        np.testing.assert_array_equal(rows[0][4:], [59, 60, 0, 61])
        np.testing.assert_array_equal(rows[1][4:], [56, 57, 0, 58])


def test_two_modules_have_kinds_of_their_own():
    layout = Layout("zb1p", 2, 4)
    tables = make_stage_tables(layout, split_units(1, 3, 2, 2))
    np.testing.assert_array_equal(tables.kind[:, 0], [[DENSE, MOE, MOE, 0], [MOE, NORM, 4, 5]])
    np.testing.assert_array_equal(tables.block, [[0, 1, 2, 0], [3, 0, 4, 5]])
    np.testing.assert_array_equal(tables.routed, [[0, 0, 1, 0], [2, 0, 3, 4]])


def test_a_rank_s_dense_layers_lie_in_rows_of_both_chunks():
    """DualPipeV with dense layers at both ends of the model's depth: rank 0 has stages 0 and 3."""
    layout = Layout("dualpipev", 4, 4)
    tables = make_stage_tables(layout, split_units(8, 0, 0, 4))
    np.testing.assert_array_equal(tables.dense, [[0, 1, 6, 7], [2, 3, 4, 5]])
    np.testing.assert_array_equal(
        tables.dense_row, [[[0, 1, 0], [2, 3, 0]], [[0, 1, 0], [2, 3, 0]]]
    )
