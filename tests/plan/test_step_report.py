"""`dsv3 compile`: the run's own step on a cluster of its size, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.config import DataConfig, ParallelConfig, RunConfig, TrainConfig
from dsv3_jax.model.accounting import count_flops
from dsv3_jax.plan.compiled_work import read_report
from dsv3_jax.plan.hardware import find_gpu
from dsv3_jax.plan.step_report import balanced_trips, check_hosts, model_flops_per_gpu

ROOT = Path(__file__).resolve().parents[2]
H800 = find_gpu("h800")
# Two layers are as good as many, and compile sooner.
MESH = ["parallel.node=2", "parallel.gpu=8", "train.batch_size=16", "model.num_hidden_layers=2"]


def dsv3_compile(*arguments: str, settings: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsv3_jax.cli", "compile", "configs/bench_tiny.py"]
    return subprocess.run(
        [*command, *arguments, *(f"--set={setting}" for setting in settings)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_run_s_step_is_compiled_and_reported(tmp_path):
    arguments = ("--gpu=h800", "--hosts=2", "--json", f"--dump={tmp_path / 'dump'}")
    result = dsv3_compile(*arguments, settings=MESH)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["gpu"], report["devices"], report["fits"]) == ("h800", 16, True)
    assert report["bytes_by_kind"]["optimizer"] == 2 * report["bytes_by_kind"]["weights"] > 0
    assert 1 < report["flops_over_model"] < 4
    kinds = {row["kind"] for row in report["collectives"]}
    assert {"all-to-all", "all-gather", "reduce-scatter"} <= kinds
    assert report["network_bytes_per_gpu"] > 0
    assert 0 < report["predicted_step_seconds"] < 1
    assert (tmp_path / "dump" / "step.hlo.txt").read_text().startswith("HloModule")
    assert "<svg" in (tmp_path / "dump" / "report.html").read_text()
    read = read_report(tmp_path / "dump")
    assert read.flops_per_gpu == report["compiled_flops_per_gpu"]


@pytest.mark.slow
def test_a_pipeline_s_step_sends_as_often_as_its_schedule_says():
    """Six routed layers (one the MTP module's), 8 micro-batches, 2 ranks, one hop: forward sends
    experts, rows and sums, backward the gradients of rows and sums. What is kept is not sent again,
    but the MTP module's backward needs its sums once more, for the gradient of the norm after them.
    """
    sizes = {"pipe": 2, "gpu": 8, "schedule": "dualpipe", "micro_batches": 8}
    settings = [*(f"parallel.{name}={value}" for name, value in sizes.items())]
    settings += ["parallel.late_weight_gradients=false", "train.batch_size=64"]
    settings += ["model.num_hidden_layers=6", "model.first_k_dense_replace=1"]
    settings += ["model.num_nextn_predict_layers=1"]
    result = dsv3_compile("--gpu=h800", "--hosts=2", "--json", settings=settings)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    rows = [row for row in report["transfers"] if "routed_experts" in row["op_name"]]
    sent = sum(row["times"] for row in rows if row["kind"] == "all-to-all")
    assert sent == pytest.approx(6 * 8 * 5 / 2 + 8 / 2)
    assert report["pair_transfers"] > 0
    assert 0 <= report["pair_hidden_fraction"] <= 1
    assert 1 < report["flops_over_model"] < 2
    kinds = report["bytes_by_kind"]
    assert kinds["gradients"] > kinds["gathered weights"] / 2 > 0


def kept_bytes_of_671b() -> int:
    """Of 17 micro-batches that DualPipe has under way on a rank, and a slot for what nobody wants,
    in four layers: hidden states before and between attention and MLP, latents, attention's output
    in E5M6 (12 bits, a scale of 1 byte) and its log-sum-exp, what came over the node hop as it
    came, SwiGLU's inputs in FP8, routing. Then what passes between ranks."""
    tokens, rows, in_fp8 = 4096, 4 * 9224, 1 + 4 / 128  # 1.125 times the mean of 4 experts, +8
    of_layer = tokens * 2 * (2 * 7168 + 1536 + 512 + 64)
    of_layer += tokens * 128 * (128 * 1.5 + 1 + 4) + 18432 * (7168 + 56 + 16)
    of_layer += (rows * 2 * 2048 + tokens * 2 * 2048) * in_fp8
    of_layer += (tokens + 18432 + 37888) * 8 * 4 + 4
    passing = (3 + 3 + 2 * 2) * tokens * 7168 * 2
    return round((17 + 1) * 4 * of_layer) + passing


@pytest.mark.slow
def test_the_671b_step_fits_2048_h800():
    """In FP8: memory, recomputation, every transfer of a pair beside products, bytes of a token."""
    command = [sys.executable, "-m", "dsv3_jax.cli", "compile", "configs/v3_671b.py"]
    result = subprocess.run(
        [*command, "--gpu=h800", "--hosts=256", "--json"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["devices"] == 2048 and report["fits"]
    assert report["peak_bytes_per_gpu"] <= 80e9
    assert 1 < report["flops_over_model"] <= 1.15
    # NVLink hops of dispatch's backward and of combine (docs/LOG.md, 2026-11-26).
    assert report["pair_transfers_without_compute"] <= 4
    assert report["pair_hidden_fraction"] > 0.5
    kinds = report["bytes_by_kind"]
    assert kinds["kept for backward"] == kept_bytes_of_671b()
    # All of the model's products but attention's, the head's and the MTP module's eh_proj.
    assert 0.75 < report["fp8_flops_per_gpu"] / report["compiled_flops_per_gpu"] < 0.9
    rows = [row for row in report["transfers"] if "routed_experts" in row["op_name"]]
    sent = {row["network_bytes"] / 4096 for row in rows if row["kind"] == "all-to-all"}
    copies = max(sent) / (7168 * 2 + 8 * 2)  # of a token's gradient in BF16, with its weights'
    assert 3 < copies <= 4, "copies that cross nodes: of 3.63 one in 8 stays"
    # In E4M3 with an exponent for 128 of them, and the routing weights.
    assert any(abs(bytes_sent / copies - (7168 + 56 + 16)) < 1 for bytes_sent in sent)
    assert report["compile_host_bytes"] < 8e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu=a100", "--hosts=2"), "gpu is 'a100', expected one of h100, h200, h800, b200"),
        (("--gpu=h800", "--hosts=3"), "x gpu = 1 x 1 x 2 x 8 = 16 GPUs: --hosts 2"),
        (("--gpu=b200", "--hosts=2", "--set=precision.recipe=fp8"), "NVIDIA B200 (compute capa"),
    ],
)
def test_wrong_input_ends_in_one_line(arguments, message):
    result = dsv3_compile(*arguments, settings=MESH)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("sizes", "hosts", "advice"),
    [
        (dict(node=2, gpu=8), 1, "--hosts 2"),
        (dict(gpu=4), 1, "the mesh does not fill whole hosts"),
        (dict(node=2, gpu=8), 0, "--hosts 2"),
    ],
)
def test_hosts_must_be_those_of_the_mesh(sizes, hosts, advice):
    config = RunConfig(parallel=ParallelConfig(**sizes), train=TrainConfig(batch_size=16))
    with pytest.raises(ValueError, match=f"--hosts is {hosts} of 8 GPUs, .* GPUs: {advice}$"):
        check_hosts(config, H800, hosts)


def test_the_model_s_flops_are_shared_out():
    config = RunConfig(
        data=DataConfig(seq_len=4096),
        train=TrainConfig(batch_size=15360, accumulation=120),
    )
    flops = model_flops_per_gpu(config, 2048)
    assert flops == pytest.approx(count_flops(config.model, 4096).training * 15360 * 4096 / 2048)
    no_mtp = dataclasses.replace(config.model, num_nextn_predict_layers=0)
    without = model_flops_per_gpu(dataclasses.replace(config, model=no_mtp), 2048)
    assert without == pytest.approx(250.46e9 * 15360 * 4096 / 2048, rel=1e-4)  # Table 2


def test_loops_of_an_evenly_loaded_step():
    trips = balanced_trips(120)
    assert trips("jit(step)/shard_map/while") == 120
    assert trips("jit(step)/shard_map/while/body/jvp()/routed_experts/while") == 0
    assert trips("jit(step)/shard_map/while/body/while") == 1
    assert balanced_trips(1)("jit(step)/jvp()/eval_jaxpr/routed_experts/jvp()/while") == 0
