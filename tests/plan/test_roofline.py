"""The predicted time of small schedules, computed by hand."""

import dataclasses

import pytest

from dsv3_jax.plan.costs import Cost
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.hlo import parse_module
from dsv3_jax.plan.links import Traffic
from dsv3_jax.plan.program import (
    Block,
    Choice,
    Collective,
    Done,
    Kernel,
    Loop,
    Start,
    read_program,
)
from dsv3_jax.plan.roofline import (
    COMPUTE,
    MATRIX_EFFICIENCY,
    MEMORY_EFFICIENCY,
    NETWORK,
    NETWORK_SECONDS,
    NVLINK,
    NVLINK_SECONDS,
    kernel_seconds,
    mean_branch,
    predict,
    ranked_transfers,
)
from tests.plan.programs import DOT, HALF, LAYERS, ROWS, WEIGHT

# One FLOP, and one byte of anything, takes a second.
GPU = dataclasses.replace(
    find_gpu("h800"),
    bf16_flops_per_second=1 / MATRIX_EFFICIENCY,
    memory_bytes_per_second=1 / MEMORY_EFFICIENCY,
    nvlink_achieved_bytes_per_second=1.0,
    network_achieved_bytes_per_second=1.0,
)


def transfer(name: str, nvlink: float = 0.0, network: float = 0.0) -> Start:
    traffic = Traffic(nvlink, network)
    return Start(Collective(name, "all-to-all", "", int(nvlink + network), traffic, 16, True))


def kernel(seconds: float, name: str = "gemm") -> Kernel:
    return Kernel(name, Cost(bf16_flops=seconds))


def timing_of(*items, branches=None):
    prediction = predict(Block("b", items), GPU, *([branches] if branches else []))
    assert prediction.blocks["b"] is prediction.step
    return prediction.step


def near(seconds: float):
    """But for the links' microseconds."""
    return pytest.approx(seconds, abs=2e-5)


def test_a_kernel_takes_the_longer_of_computing_and_moving():
    assert kernel_seconds(Cost(bf16_flops=3, hbm_bytes=2), GPU) == pytest.approx(3)
    assert kernel_seconds(Cost(bf16_flops=1, hbm_bytes=2), GPU) == pytest.approx(2)
    h800 = find_gpu("h800")
    assert kernel_seconds(Cost(fp8_flops=1978.9e12), h800) == pytest.approx(1 / MATRIX_EFFICIENCY)
    assert kernel_seconds(Cost(tf32_flops=494.7e12), h800) == pytest.approx(1 / MATRIX_EFFICIENCY)
    assert kernel_seconds(Cost(hbm_bytes=3.35e12), h800) == pytest.approx(1 / MEMORY_EFFICIENCY)


def test_a_covered_transfer_costs_nothing():
    timing = timing_of(transfer("a", network=4.0), kernel(5), Done("a"), kernel(1))
    assert timing.seconds == near(6)
    assert timing.exposed_seconds == 0
    assert timing.hidden_fraction == 1
    (row,) = timing.transfers
    assert row.seconds == 4 + NETWORK_SECONDS
    assert row.covering_seconds == pytest.approx(5)
    assert row.covering_flops == 5


def test_what_is_not_covered_is_waited_for():
    timing = timing_of(transfer("a", network=4.0), kernel(1), Done("a"), kernel(1))
    assert timing.seconds == near(5)
    assert timing.exposed_seconds == near(3)
    assert timing.hidden_fraction == near(1 / 4)
    assert [(i.lane, i.kind) for i in timing.intervals] == [
        (NETWORK, "all-to-all"),
        (COMPUTE, "matrix"),
        (COMPUTE, "wait"),
        (COMPUTE, "matrix"),
    ]


def test_a_link_serves_who_came_first():
    """The second transfer begins at 4 and ends at 7, under 5 seconds of kernels."""
    items = (
        transfer("a", network=4.0),
        transfer("b", network=3.0),
        kernel(5),
        Done("b"),
        Done("a"),
    )
    timing = timing_of(*items)
    assert timing.seconds == near(7)
    assert timing.exposed_seconds == near(2)
    assert timing.hidden_fraction == near(5 / 7)


def test_links_work_side_by_side():
    items = (transfer("a", network=4.0), transfer("b", nvlink=3.0), Done("a"), Done("b"))
    assert timing_of(*items).seconds == near(4)
    both = timing_of(transfer("a", nvlink=2.0, network=3.0), Done("a"))
    assert both.seconds == near(3)
    assert both.transfer_seconds == near(3)
    nvlink = next(i for i in both.intervals if i.lane == NVLINK)
    assert nvlink.end == 2 + NVLINK_SECONDS


def test_an_empty_group_sends_nothing():
    timing = timing_of(transfer("a"), Done("a"))
    assert timing.seconds == 0
    assert timing.hidden_fraction == 1


def test_a_done_of_something_else_is_no_matter_and_a_missing_one_is_made_up():
    assert timing_of(Done("fusion-start")).seconds == 0
    assert timing_of(transfer("a", network=2.0)).seconds == near(2)


def test_loops_and_choices():
    body = Block("body", (transfer("a", network=2.0), kernel(1), Done("a")))
    idle = Block("idle", ())
    work = Block("work", (Loop("while", "", 3, True, body), kernel(1)))
    choice = Choice("conditional", "", (idle, work))
    slowest = timing_of(choice, kernel(1))
    assert slowest.seconds == near(3 * 2 + 1 + 1)
    assert slowest.exposed_seconds == near(3)
    assert slowest.cost.flops == 3 + 1 + 1
    assert slowest.traffic == Traffic(0, 6)
    (row,) = slowest.transfers
    assert (row.block, row.times) == ("body", 3)
    assert next((i.kind, i.name) for i in slowest.intervals) == ("choice", "conditional")
    mean = timing_of(choice, kernel(1), branches=mean_branch)
    assert mean.seconds == near(3.5 + 1)
    assert mean.transfers[0].times == 1.5


def test_a_rule_sees_what_each_branch_takes():
    """As of a pipeline: the second branch is the slowest rank's in a quarter of the ticks."""
    seen = []

    def rule(choice, seconds):
        seen.append(seconds)
        return [0.0, 0.25]

    choice = Choice("conditional", "", (Block("one", (kernel(2),)), Block("two", (kernel(8),))))
    timing = timing_of(Loop("while", "", 8, True, Block("tick", (choice,))), branches=rule)
    assert timing.seconds == pytest.approx(8 * 0.25 * 8)
    assert seen == [pytest.approx((2, 8))]


def test_transfers_are_ranked_by_what_a_step_waits():
    first = Block("body", (transfer("often", network=2.0), Done("often")))
    items = (transfer("once", network=5.0), Done("once"), Loop("while", "", 3, True, first))
    timing = timing_of(*items)
    assert [row.collective.name for row in ranked_transfers(timing)] == ["often", "once"]
    assert predict(Block("b", items), GPU).busiest_block == "body"


def test_a_program_on_h800s():
    """LAYERS, as its schedule says: the gather is waited for, the dispatch partly covered."""
    gpu = find_gpu("h800")
    step = predict(read_program(parse_module(LAYERS), 8), gpu).step

    def moving(nbytes: float) -> float:
        return nbytes / 3.35e12 / MEMORY_EFFICIENCY

    gather = NVLINK_SECONDS + WEIGHT * 7 / 8 / 160e9
    dispatch = NETWORK_SECONDS + ROWS / 2 / 40e9
    combine = NVLINK_SECONDS + ROWS * 7 / 8 / 160e9
    permute = NETWORK_SECONDS + ROWS / 40e9
    product = max(DOT / 989.4e12 / MATRIX_EFFICIENCY, moving(ROWS + WEIGHT + HALF))
    store = moving(4 + 2 * HALF)
    # Quantising is two kernels here: each reads BF16 and writes FP8.
    quantise = moving(HALF * 1.5) + moving(WEIGHT * 1.5)
    traffic = moving(HALF / 2 + WEIGHT / 2 + 8 + ROWS)
    expert = quantise + max(DOT / 1978.9e12 / MATRIX_EFFICIENCY, traffic)
    add = moving(12)
    layer = gather + max(product, dispatch) + store + expert + combine + add
    ring = moving(2 + 3 * HALF)
    assert step.seconds == pytest.approx(ring + 3 * layer + permute, rel=1e-9)
    assert step.exposed_seconds == pytest.approx(
        3 * (gather + dispatch - product + combine) + permute
    )
    assert step.hidden_fraction == pytest.approx(
        3 * product / (3 * (gather + dispatch + combine) + permute)
    )
