"""A compiled step's figures take the place of the closed forms, which agree with accounting's."""

import json
from pathlib import Path

import pytest

from dsv3_jax.config import apply_overrides, read_config
from dsv3_jax.model.accounting import attention_core_flops, count_flops
from dsv3_jax.plan.cluster import find_cluster
from dsv3_jax.plan.compiled_work import (
    CompiledWork,
    closed_flops_per_gpu,
    closed_network_bytes_per_gpu,
    read_report,
)
from dsv3_jax.plan.layer_times import Job
from dsv3_jax.plan.machine import fanout
from dsv3_jax.plan.train_plan import predict_training

CONFIG = apply_overrides(
    read_config(Path(__file__).parents[2] / "configs" / "v3_671b.py"),
    ["parallel.micro_batches=32", "train.batch_size=4096"],
)
H800 = find_cluster("h800_2048")
REPORT = {
    "gpu": "h800",
    "devices": 2048,
    "compiled_flops_per_gpu": 1e16,
    "peak_bytes_per_gpu": 73_290_000_000,
    "collectives": [
        {"kind": "all-to-all", "network_bytes": 4e11},
        {"kind": "all-gather", "network_bytes": 9e11},
    ],
}


def model_flops():
    tokens = CONFIG.train.batch_size * CONFIG.data.seq_len
    return count_flops(CONFIG.model, CONFIG.data.seq_len).training * tokens / 2048


def test_closed_flops_are_the_model_s_and_what_is_computed_again():
    """MLA's up-projections are computed again, and attention's backward has five products for two,
    3 x 192 + 2 x 128 of 192 + 128 values: 2.6 times the forward's FLOPs where accounting has 2."""
    job, model = Job.of(CONFIG), CONFIG.model
    layers = model.num_hidden_layers + 1
    again = 2 * (1536 * 128 * 192 + 512 * 128 * 256)
    attention = 0.6 * attention_core_flops(model, 4096, causal=True)
    tokens = CONFIG.train.batch_size * 4096
    expected = model_flops() + layers * (again + attention) * tokens / 2048
    assert closed_flops_per_gpu(CONFIG, job) == pytest.approx(expected, rel=3e-3)  # no router
    # `dsv3 compile` counts 1.136 times accounting's (docs/LOG.md): a tenth more rows are padding.
    assert 1.04 < closed_flops_per_gpu(CONFIG, job) / model_flops() < 1.136


def test_closed_network_bytes():
    job, spread = Job.of(CONFIG), fanout(CONFIG.model, 64, 8)
    # 59 layers; FP8 rows there, BF16 back, and the same in backward; 3.175 other nodes a token.
    sent = 59 * 4096 * spread.remote_nodes * 7168 * 2 * (1 + 4 / 128 + 2) * 32 / 16
    assert closed_network_bytes_per_gpu(CONFIG, job, spread) == pytest.approx(sent)


def test_a_report_is_read(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(REPORT))
    work = read_report(path)
    assert (work.flops_per_gpu, work.network_bytes_per_gpu) == (1e16, 4e11)
    assert (work.devices, work.peak_bytes_per_gpu) == (2048, 73_290_000_000)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "expected gpu, devices, compiled_flops_per_gpu, .* as well"),
        (None, "expected a file of `dsv3 compile --json`"),
    ],
)
def test_no_report(tmp_path, text, message):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_report(path)


def test_more_flops_make_the_step_longer():
    flops = closed_flops_per_gpu(CONFIG, Job.of(CONFIG))
    sent = closed_network_bytes_per_gpu(CONFIG, Job.of(CONFIG), fanout(CONFIG.model, 64, 8))

    def plan(times):
        work = CompiledWork(
            gpu="h800",
            devices=2048,
            flops_per_gpu=times * flops,
            network_bytes_per_gpu=times * sent,
            peak_bytes_per_gpu=90_000_000_000,
        )
        return predict_training(CONFIG, H800, compiled=work)[0]

    closed = predict_training(CONFIG, H800)[0]
    same, double = plan(1), plan(2)
    assert same.step_seconds == pytest.approx(closed.step_seconds)
    assert double.pair_seconds == pytest.approx(2 * closed.pair_seconds)
    assert closed.fits and not same.fits  # by the compiler's bytes
    assert (closed.counted_from, same.counted_from) == ("closed forms", "dsv3 compile")


def test_a_report_of_another_run_is_refused():
    work = CompiledWork(
        gpu="h800",
        devices=8,
        flops_per_gpu=1.0,
        network_bytes_per_gpu=1.0,
        peak_bytes_per_gpu=1,
    )
    with pytest.raises(ValueError, match="--compiled: devices is 8, expected 2048"):
        predict_training(CONFIG, H800, compiled=work)
