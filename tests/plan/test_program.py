"""The schedule as a tree, and what a step costs in total."""

import re

import pytest

from dsv3_jax.plan.hlo import parse_module
from dsv3_jax.plan.links import Traffic
from dsv3_jax.plan.program import (
    Choice,
    Done,
    Kernel,
    Loop,
    Start,
    count_totals,
    list_unknowns,
    read_program,
    walk_blocks,
)
from tests.plan.programs import DOT, LAYERS, ROWS, WEIGHT

PROGRAM = read_program(parse_module(LAYERS), 8)
KNOWN = LAYERS.replace(
    "condition=%less, body=%body",
    'condition=%less, body=%body, backend_config={"known_trip_count":{"n":"5"}}',
)


def outline(block) -> list[str]:
    """One word or two for each item."""
    words = []
    for item in block.items:
        match item:
            case Kernel():
                words.append(item.name)
            case Start():
                words.append(f"start {item.collective.name}")
            case Done():
                words.append(f"done {item.name}")
            case Loop():
                words.append(f"loop {item.trips} {item.body.name}")
            case Choice():
                words.append(f"choice {' '.join(b.name for b in item.branches)}")
    return words


def test_the_schedule():
    assert outline(PROGRAM) == ["ring0", "loop 3 body", "start permuted", "done permuted"]
    body = next(block for block in walk_blocks(PROGRAM) if block.name == "body")
    assert outline(body) == [
        "start async-start",
        "done async-start",
        "start all-to-all-start",
        "gemm_fusion",
        "done all-to-all-start",
        "store_fusion",
        "choice keep expert",
        "start combine",
        "done combine",
        "next",
    ]
    assert [block.name for block in walk_blocks(PROGRAM)] == ["main", "body", "keep", "expert"]


def test_collectives_and_their_links():
    body = next(block for block in walk_blocks(PROGRAM) if block.name == "body")
    gather, dispatch, combine = (item.collective for item in body.items if isinstance(item, Start))
    assert (gather.kind, gather.asynchronous, gather.group_size) == ("all-gather", True, 8)
    assert gather.payload_bytes == WEIGHT
    assert gather.traffic == Traffic(WEIGHT * 7 / 8, 0)
    assert (dispatch.kind, dispatch.asynchronous, dispatch.group_size) == ("all-to-all", True, 16)
    assert dispatch.traffic == Traffic(ROWS * 7 / 16, ROWS * 8 / 16)
    assert dispatch.op_name == "jit(step)/while/body/dispatch"
    assert (combine.kind, combine.asynchronous, combine.group_size) == ("all-to-all", False, 8)
    assert combine.traffic == Traffic(ROWS * 7 / 8, 0)
    permuted = PROGRAM.items[-2].collective
    assert (permuted.kind, permuted.traffic) == ("collective-permute", Traffic(0, ROWS))


@pytest.mark.parametrize(("branches", "fp8"), [("max", 3 * DOT), ("mean", 1.5 * DOT)])
def test_totals(branches, fp8):
    totals = count_totals(PROGRAM, branches)
    assert totals.cost.bf16_flops == 3 * DOT
    assert totals.cost.fp8_flops == fp8
    assert totals.counts == {"all-gather": 3, "all-to-all": 6, "collective-permute": 1}
    assert totals.bytes_by_kind["all-to-all"] == Traffic(
        3 * ROWS * (7 / 16 + 7 / 8), 3 * ROWS * 8 / 16
    )
    by_kind = totals.bytes_by_kind.values()
    assert totals.traffic.total_bytes == sum(traffic.total_bytes for traffic in by_kind)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match=r"'min', expected one of max, mean$"):
        count_totals(PROGRAM, "min")


def test_xla_s_trip_count_is_taken_first():
    totals = count_totals(read_program(parse_module(KNOWN), 8))
    assert totals.cost.bf16_flops == 5 * DOT


def test_a_loop_that_ends_by_its_data_is_guessed_and_listed():
    text = LAYERS.replace("direction=LT", "direction=NE")
    assert list_unknowns(read_program(parse_module(text), 8)) == (["while x 1"], [])
    seen = []
    program = read_program(parse_module(text), 8, trips=lambda op_name: seen.append(op_name) or 7)
    assert seen == [""]
    assert list_unknowns(program)[0] == ["while x 7"]
    assert count_totals(program).cost.bf16_flops == 7 * DOT
    assert list_unknowns(PROGRAM) == ([], [])


def test_a_predicated_conditional_lists_true_first():
    text = re.sub(
        r"branch_computations=\{%keep, %expert\}",
        "true_computation=%expert, false_computation=%keep",
        LAYERS,
    )
    choice = next(
        item
        for block in walk_blocks(read_program(parse_module(text), 8))
        for item in block.items
        if isinstance(item, Choice)
    )
    assert [branch.name for branch in choice.branches] == ["expert", "keep"]


def test_a_collective_in_a_fusion_is_a_transfer():
    text = LAYERS.replace(
        "async-start(%w1), calls=%wrapped", "fusion-start(%w1), kind=kCustom, calls=%wrapped"
    )
    body = next(b for b in walk_blocks(read_program(parse_module(text), 8)) if b.name == "body")
    assert outline(body)[:2] == ["start async-start", "done async-start"]
