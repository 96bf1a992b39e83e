"""Serving predictions beside DeepSeek's service, and the bounds that a load sets."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3_jax.config import read_config
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.published_tables import day_6_plan
from dsv3_jax.plan.serve_plan import (
    ASSUMED,
    Layout,
    Load,
    as_json,
    as_text,
    predict_serving,
)
from dsv3_jax.plan.serve_units import serving_overhead

CONFIG = read_config(Path(__file__).parents[2] / "configs" / "v3_671b.py")
H800 = find_cluster("h800_2048")
LOAD = Load(input_tokens=4000, output_tokens=1000)


def plan(load=LOAD, **layout):
    return predict_serving(CONFIG, H800, load, Layout(**layout))


def test_day_6():
    """14.8k tokens/s of answers a node at 20 to 22 tokens/s a request; not fitted. Its prefill,
    73.7k, is half of what its own profile reaches: predicted is what full load would give."""
    found = day_6_plan()
    assert found.decode_tokens_per_second_per_node == pytest.approx(14_800, rel=0.20)
    assert 20 < found.tokens_per_second_per_request < 22
    assert 1 < found.prefill_tokens_per_second_per_node / 73_700 < 2


def test_bounds_are_kept():
    for slo in (0.04, 0.05, 0.06):
        found = plan(replace(LOAD, slo_tpot_seconds=slo))
        assert found.tpot_seconds <= slo
        assert found.batch_limit == "slo"
    free = plan()
    assert free.batch_limit == "memory"
    assert free.batch * LOAD.context <= free.cache_tokens_per_gpu
    assert (free.batch + 1) * LOAD.context > free.cache_tokens_per_gpu
    quick = plan(replace(LOAD, slo_ttft_seconds=1.0))
    assert quick.ttft_seconds <= 1.0 < plan().ttft_seconds


def test_prefill_and_decode_nodes_keep_pace():
    found = plan()
    prompts = found.prefill_share * 256 * found.prefill_tokens_per_second_per_node / 4000
    answers = (1 - found.prefill_share) * 256 * found.decode_tokens_per_second_per_node / 1000
    assert prompts == pytest.approx(answers) == pytest.approx(found.requests_per_second)
    dollars = 2 * 2048 / 3600 / (found.requests_per_second * 1000) * 1e6
    assert found.dollars_per_million_output_tokens == pytest.approx(dollars)


def test_drafts_and_cached_prefixes_help():
    slo = replace(LOAD, slo_tpot_seconds=0.05)
    plain, drafted = plan(slo), plan(replace(slo, acceptance=0.85))
    assert drafted.decode_tokens_per_second_per_node > plain.decode_tokens_per_second_per_node
    cached = plan(replace(LOAD, prefix_hit=0.5))
    gain = cached.prefill_tokens_per_second_per_node / plan().prefill_tokens_per_second_per_node
    assert 1.5 < gain < 2  # half of the tokens, which see more


@pytest.mark.parametrize(
    ("load", "layout", "message"),
    [
        ({"slo_tpot_seconds": 0.001}, {}, r"slo-tpot \(ms\) is 1.0, expected at least"),
        ({"slo_ttft_seconds": 0.001}, {}, r"slo-ttft \(ms\) is 1.0, expected at least"),
        ({"input_tokens": 10**7}, {}, "expected room for a prompt of 10000000 tokens"),
        ({}, {"decode_gpus": 7}, "gpus is 7, expected a divisor of the 288"),
        ({}, {"prefill_gpus": 1}, "cache tokens is 0, expected room"),
    ],
)
def test_what_cannot_be_is_named(load, layout, message):
    with pytest.raises(ValueError, match=message):
        plan(replace(LOAD, **load), **layout)


@pytest.mark.parametrize("fields", [{"acceptance": 1.5}, {"prefix_hit": 1.0}, {"output_tokens": 0}])
def test_a_wrong_load_is_named(fields):
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*, expected"):
        replace(LOAD, **fields)


def test_report():
    found = plan(replace(LOAD, slo_tpot_seconds=0.05))
    assert json.loads(json.dumps(as_json(found)))["batch"] == found.batch
    text = as_text(found)
    assert f"{found.batch} requests a GPU, bounded by the bound on time per token" in text
    for kind in ("prefill", "decode"):  # the factors in the remarks are those used
        assert f"{kind} {serving_overhead(kind):.2f} times" in ASSUMED[0]
