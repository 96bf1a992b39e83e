"""The report's figures, as an object, as text and as a page."""

import json
import re

import pytest

from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.program import Loop
from dsv3_jax.plan.report import (
    RESERVED_BYTES,
    HeldBytes,
    MemoryUse,
    analyse,
    as_json,
    as_text,
    bytes_by_kind,
    bytes_text,
    kinds_of_arguments,
    seconds_text,
)
from tests.plan.programs import DOT, LAYERS, ROWS

GB = 10**9
ARGUMENTS = {
    "[0].step": 4,
    "[0].params['lm_head']['kernel']": 2 * GB,
    "[0].params['norm']['scale']": GB,
    "[0].moments.mu['lm_head']['kernel']": 5 * GB,
    "[0].moments.nu['lm_head']['kernel']": 5 * GB,
    "[1]": 96,
}


def memory(temp_gb: int) -> MemoryUse:
    return MemoryUse(
        argument_bytes=13 * GB + 200,
        new_output_bytes=50,
        temp_bytes=temp_gb * GB,
        code_bytes=7,
        arguments=ARGUMENTS,
    )


def analysis(temp_gb: int = 40, **options):
    return analyse(
        options.pop("text", LAYERS),
        memory(temp_gb),
        find_gpu("h800"),
        compile_seconds=2.5,
        compile_host_bytes=3 * GB,
        **options,
    )


def test_arguments_are_told_apart():
    assert kinds_of_arguments(ARGUMENTS) == {
        "weights": 3 * GB,
        "optimizer": 10 * GB,
        "other arguments": 100,
    }


def test_parts_add_up_to_the_peak():
    parts = bytes_by_kind(memory(40), HeldBytes(weights=3 * GB, gradients=6 * GB, kept=GB))
    assert (parts["gathered weights"], parts["gradients"]) == (3 * GB, 6 * GB)
    assert parts["kept for backward"] == GB
    assert parts["activations and buffers"] == 30 * GB
    assert parts["other arguments"] == 200  # padding with them
    assert sum(parts.values()) == 53 * GB + 200 + 50 + 7
    assert bytes_by_kind(memory(4), HeldBytes(gradients=6 * GB))["gradients"] == 4 * GB


def test_json_has_the_keys_and_is_json():
    report = analysis(model_flops_per_gpu=2 * DOT).report
    printed = json.loads(json.dumps(as_json(report)))
    keys = (
        "gpu devices peak_bytes_per_gpu memory_bytes_per_gpu compiled_flops_per_gpu"
        " model_flops_per_gpu collectives hidden_fraction predicted_step_seconds compile_seconds"
    )
    assert set(keys.split()) <= set(printed)
    assert (printed["gpu"], printed["devices"]) == ("h800", 16)
    assert printed["compiled_flops_per_gpu"] == 6 * DOT
    assert printed["flops_over_model"] == 3
    assert printed["peak_bytes_per_gpu"] == sum(printed["bytes_by_kind"].values())
    assert printed["network_bytes_per_gpu"] == 3 * ROWS / 2 + ROWS
    kinds = {row["kind"]: row for row in printed["collectives"]}
    assert kinds["all-to-all"]["count"] == 6
    assert kinds["all-to-all"]["network_bytes"] == 3 * ROWS / 2
    assert sum(row["predicted_exposed_seconds"] for row in kinds.values()) == pytest.approx(
        printed["predicted_exposed_seconds"]
    )
    covered = {row["name"]: row["covering_flops"] for row in printed["transfers"]}
    assert covered == {"async-start": 0, "all-to-all-start": DOT, "combine": 0, "permuted": 0}


def test_branches_can_be_a_rule_of_the_caller():
    never = analysis(branches=lambda choice, seconds: [0.0, 0.0]).report
    assert never.compiled_flops_per_gpu == 3 * DOT
    assert analysis(branches="mean").report.compiled_flops_per_gpu == 4.5 * DOT
    with pytest.raises(ValueError, match=r"'min', expected one of max, mean$"):
        analysis(branches="min")


def test_pairs_are_told_apart():
    """Of two all-to-alls in the loop one has a product beside it."""
    without = analysis().report
    assert (without.pair_hidden_fraction, without.pair_transfers) == (None, None)
    assert "overlapped pairs" not in as_text(without)

    def loop(program):
        (body,) = (item.body for item in program.items if isinstance(item, Loop))
        return frozenset([body.name])

    report = analysis(pairs=loop).report
    rows = [row for row in report.transfers if row.kind == "all-to-all"]
    assert report.pair_transfers == len(rows) == 2
    assert report.pair_transfers_without_compute == sum(r.covering_seconds == 0 for r in rows) == 1
    waited = sum(row.predicted_exposed_seconds * row.times for row in rows)
    total = sum(row.predicted_seconds * row.times for row in rows)
    assert report.pair_hidden_fraction == pytest.approx(1 - waited / total)
    assert "1 of 2 all-to-alls have no computation beside them" in as_text(report)
    nothing = analysis(pairs=lambda program: frozenset()).report
    assert (nothing.pair_hidden_fraction, nothing.pair_transfers) == (1.0, 0)


def test_text_says_what_is_predicted():
    text = as_text(analysis(model_flops_per_gpu=4 * DOT).report)
    assert "16 x h800: compiled in 2.5 s, 3.00 GB of host memory" in text
    assert "53.00 GB of 84.94 GB (62%): fits, 29.80 GB free beside 2.15 GB for CUDA" in text
    assert "1.500 x the model's" in text
    assert re.search(r"^step .* predicted, of which .* wait for transfers$", text, re.MULTILINE)
    assert "their predicted time is under computation" in text
    assert re.search(r"^  combine \(sync\) +3 ", text, re.MULTILINE)
    assert "assumed: of a conditional the slowest branch runs each time" in text


def test_unknowns_are_said():
    text = LAYERS.replace("direction=LT", "direction=NE").replace("__cublas$lt$matmul$f8", "mine")
    printed = as_text(analysis(text=text, trips=lambda op_name: 4).report)
    assert "assumed: loops that end by their data run while x 4" in printed
    assert "assumed: no FLOPs are counted of mine" in printed


@pytest.mark.parametrize(
    ("temp_gb", "options", "advice"),
    [
        (80, {}, "(parallel.pipe), a smaller micro-batch (train.batch_size), more recompute"),
        (
            80,
            {"held": HeldBytes(gradients=60 * GB)},
            "(parallel.pipe), state sharded further (parallel.zero=3, parallel.data)",
        ),
        (
            80,
            {"held": HeldBytes(gradients=60 * GB), "pairs": lambda program: frozenset()},
            "(parallel.pipe), state sharded further (parallel.data)",
        ),
    ],
)
def test_what_does_not_fit_says_by_how_much_and_what_would_help(temp_gb, options, advice):
    report = analysis(temp_gb, **options).report
    assert not report.fits
    over = report.peak_bytes_per_gpu - (84_942_979_072 - RESERVED_BYTES)
    text = as_text(report)
    assert f"does not fit by {bytes_text(over)}; smaller with more stages {advice}" in text
    assert bytes_text(over) == "10.20 GB"


def test_units():
    assert [bytes_text(n) for n in (12, 1500, 2_500_000, 3.25e9)] == [
        "12 B",
        "1.50 kB",
        "2.50 MB",
        "3.25 GB",
    ]
    assert [seconds_text(n) for n in (2.0, 0.0155, 2e-5, 0.0)] == [
        "2.00 s",
        "15.50 ms",
        "20.0 µs",
        "0.0 µs",
    ]
