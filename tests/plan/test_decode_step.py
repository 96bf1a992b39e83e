"""The decode step compiled for a Hopper GPU: made of the kernels, and without what they spare."""

import json
import math
import os
import re
import subprocess
import sys

import pytest

from tests.plan.decode_step import LAYERS, REQUESTS, TOKENS


def report(**environment: str) -> dict:
    """In a process of its own, which another plugin comes into."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.plan.decode_step"],
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def sizes(report: dict, dtype: str) -> list[int]:
    shapes = [shape for shape in report["arrays"] if shape.startswith(dtype)]
    return [math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape in shapes]


@pytest.mark.slow
@pytest.mark.compile
def test_decoding_on_hopper_is_the_kernels():
    kernels, plain = report(), report(DSV3_KERNELS="plain")
    assert kernels["calls"]["mla_decode"] == 2 * LAYERS  # attention, and its parts put together
    assert kernels["calls"]["grouped_gemm"] == 2  # the experts' products, of filled rows
    assert all(kernels["calls"][name] > 0 for name in ("fp8_gemm", "take_rows", "sum_rows"))
    assert not plain["calls"]
    # No scores of all heads and cached tokens; and no weight in anything wider than 8 bits, but
    # kv_b_proj's, which the absorbed form multiplies with outside of any rule.
    scores, kv_b_proj, a_weight = REQUESTS * 128 * TOKENS, 128 * 256 * 512, 7168 * 18432
    assert scores in sizes(plain, "f32")
    assert scores not in sizes(kernels, "f32")
    cache = {LAYERS * REQUESTS * TOKENS * 576, REQUESTS * TOKENS * 576, 129280 * 7168}
    wide = [n for n in sizes(kernels, "f32") + sizes(kernels, "bf16") if n not in cache]
    assert max(wide) == kv_b_proj
    assert a_weight in sizes(plain, "f32")
    assert kernels["hbm_bytes"] < plain["hbm_bytes"]
    assert kernels["peak_bytes"] < plain["peak_bytes"]
