"""Prefill and decode units against closed forms; compiled in the slow tests."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import (
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ServeConfig,
    read_config,
)
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.unit_step import _random_experts, further_round_share, speed_limit, unit_trips

ROOT = Path(__file__).parents[2]
UNITS = {name: read_config(ROOT / f"configs/v3_671b_{name}.py") for name in ("decode", "prefill")}
H800 = find_gpu("h800")


def test_the_units_are_those_of_deepseeks_service():
    decode, prefill = UNITS["decode"], UNITS["prefill"]
    for unit, gpus, experts in ((decode, 144, 2), (prefill, 32, 9)):
        devices = unit.parallel.node * unit.parallel.gpu
        held = unit.model.n_routed_experts + unit.serve.redundant_experts
        assert (devices, held / devices, held) == (gpus, experts, 288)
    assert decode.serve.slots == 128 and prefill.serve.prefill_chunk == 16384


def test_a_unit_needs_experts_that_divide():
    with pytest.raises(ValueError, match=r"node x gpu is 8, expected a divisor of .*experts = 257"):
        RunConfig(
            parallel=ParallelConfig(gpu=8),
            serve=ServeConfig(unit="decode", redundant_experts=1),
        )
    with pytest.raises(ValueError, match=r"serve\.unit is 'both', expected one of prefill, decode"):
        ServeConfig(unit="both")


def test_the_speed_limit_is_the_papers_formula():
    """Three bytes of each of 7,168 values to and from eight experts, of 128 tokens, 58 times."""
    by_hand = 3 * 7168 * 8 * 128 * 58 / 50e9
    assert speed_limit(UNITS["decode"].model, UNITS["decode"], H800).token_seconds == by_hand
    narrow = dataclasses.replace(
        UNITS["decode"], precision=PrecisionConfig(recipe="fp8", combine="logfmt8")
    )
    limit = speed_limit(narrow.model, narrow, H800)
    assert limit.token_seconds == pytest.approx(by_hand * 2 / 3)


def test_random_experts_are_distinct_and_in_few_groups():
    model = ModelConfig()
    experts = _random_experts(model, (3, 500), np.random.default_rng(0))
    assert experts.shape == (3, 500, 8) and experts.min() >= 0 and experts.max() < 256
    groups = np.sort(experts // 32, axis=-1)
    assert (np.diff(np.sort(experts, axis=-1), axis=-1) > 0).all()
    distinct = 1 + (np.diff(groups, axis=-1) > 0).sum(axis=-1)
    assert distinct.max() == 4
    # 8 of 256 in 4 of 8 groups touch 3.63 groups on average (facts §7.4).
    assert abs(distinct.mean() - 3.63) < 0.05


def test_how_often_buffers_overflow():
    """Never where a buffer holds all rows, always where it holds fewer than the mean."""
    decode = UNITS["decode"]

    def share(factor: float, dispatcher: str = "two_hop", **sizes: int) -> float:
        how = {"dispatcher": dispatcher, "capacity_factor": factor} | sizes
        parallel = dataclasses.replace(decode.parallel, **how)
        return further_round_share(dataclasses.replace(decode, parallel=parallel), layers=2)

    assert share(64.0) == share(64.0, "flat") == 0
    assert share(0.5) == share(0.5, "flat") == 1
    assert share(0.5, node=1, gpu=1) == 0  # nothing is sent


def test_loops_that_end_by_data():
    assert unit_trips("jit(call)/shard_map/while") == 1
    assert unit_trips("jit(call)/shard_map/while/body/eval_jaxpr/routed_experts/while") == 0
    assert unit_trips("jit(call)/shard_map/while/body/eval_jaxpr/attention/while") == 0


def compiled(name: str, hosts: int) -> dict:
    """In a process of its own, which another plugin comes into."""
    command = [sys.executable, "-m", "dsv3_jax.cli", "compile", f"configs/v3_671b_{name}.py"]
    command += ["--gpu", "h800", "--hosts", str(hosts), "--json"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "reference, for the Hopper kernel lacks" not in run.stderr
    return json.loads(run.stdout)


ATTENTION = 1536 * 7168 + 128 * 192 * 1536 + 576 * 7168 + 128 * 256 * 512 + 7168 * 128 * 128
EXPERT = 3 * 7168 * 2048
DENSE = 3 * 7168 * 18432


def weight_bytes(experts: int, tables: int) -> float:
    """Of one GPU: matrices in E4M3, a scale for 128x128; embedding, head, routers in BF16."""
    matrices = 61 * ATTENTION + 3 * DENSE + 58 * (experts + 1) * EXPERT
    return matrices * (1 + 4 / 128**2) + 2 * (tables * 129280 * 7168 + 58 * 256 * 7168)


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize(("name", "hosts", "experts"), [("decode", 18, 2), ("prefill", 4, 9)])
def test_a_unit_compiled_for_h800(name, hosts, experts):
    report = compiled(name, hosts)
    assert report["devices"] == 8 * hosts and report["fits"]
    assert report["unit"] == name and report["experts_per_gpu"] == experts
    tables = 2 if name == "decode" else 1  # reading a prompt needs no head
    expected = weight_bytes(experts, tables)
    assert report["weight_bytes_per_gpu"] == pytest.approx(expected, rel=0.002)
    slots, tokens = (128, 4608) if name == "decode" else (16, 8192)
    assert report["cache_bytes_per_token_and_layer"] == 1152
    assert report["cache_bytes_per_gpu"] == slots * tokens * 61 * 1152
    in_step = 128 if name == "decode" else 16384
    assert report["tokens_per_gpu"] == in_step
    # Every routed layer once there and back: rows and their experts, over both hops.
    counts = {c["kind"]: c["count"] for c in report["collectives"]}
    assert counts["all-to-all"] == 58 * 6
    # What the matrices need of the tokens' share, and attention; buffers are a half larger.
    active = 61 * ATTENTION + 3 * DENSE + 58 * 9 * EXPERT + 129280 * 7168 * (name == "decode")
    assert 2 * active * in_step < report["compiled_flops_per_gpu"]
    if name == "decode":
        assert report["predicted_seconds_per_token"] > report["limit_seconds_per_token"]
        assert report["published_limit_seconds_per_token"] == pytest.approx(14.76e-3, rel=1e-3)
        cache = report["cache_bytes_per_gpu"] + report["weight_bytes_per_gpu"]
        assert cache < report["hbm_bytes_per_gpu"] < 2.5 * cache
