"""metrics.jsonl to the bit, over interruptions; the display on and off a terminal."""

import io
import json
import logging
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from dsv3_jax.train.metrics import MetricsWriter, ProgressDisplay, read_metrics


def write_steps(run_dir, steps, resume_step=None):
    with MetricsWriter(run_dir, resume_step) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 1 / step})


def events_of(run_dir):
    """Every event of the TensorBoard files; a record is length, its checksum, data, checksum."""
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]


def test_numbers_read_back_to_the_bit(tmp_path):
    loss = np.float32(np.pi * 1e-9)
    load = np.array([[0.1, 2.0], [3.0, 0.0]], np.float32)
    with MetricsWriter(tmp_path, None) as writer:
        writer.write({"step": 1, "loss": loss, "tokens_seen": 10**12, "grad_norm": 0.1 + 0.2})
        writer.write({"step": 2, "loss": jnp.float32(loss), "expert_load": load})
        writer.write({"step": jnp.int32(3), "loss": jnp.bfloat16(1.5), "router_bias": load})
    first, second, third = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "loss": float(loss), "tokens_seen": 10**12, "grad_norm": 0.1 + 0.2}
    assert np.float32(second["loss"]).tobytes() == loss.tobytes()
    assert np.array_equal(np.float32(second["expert_load"]), load)
    assert third == {"step": 3, "loss": 1.5, "router_bias": load.tolist()}


def test_lines_are_valid_json_and_there_at_once(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        writer.write(
            {"step": 1, "loss": math.nan, "grad_norm": -math.inf, "expert_load": [math.inf]}
        )
        text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": "nan",
        "grad_norm": "-inf",
        "expert_load": ["inf"],
    }
    assert text.endswith("\n")
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["loss"])
    assert (read["grad_norm"], read["expert_load"]) == (-math.inf, [math.inf])


def test_a_resumed_run_has_every_step_once(tmp_path, caplog):
    write_steps(tmp_path, range(1, 8))
    path = tmp_path / "metrics.jsonl"
    unbroken = path.read_text()
    with open(path, "a") as out:
        out.write('{"step": 8, "lo')
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    with caplog.at_level(logging.WARNING):
        write_steps(tmp_path, range(6, 8), resume_step=5)
    assert f"{path}: line 8 dropped" in caplog.text
    assert path.read_text() == unbroken
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_new_run_begins_anew(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [1])
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]


def test_tensorboard_is_told_what_a_resumed_run_replaces(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [3], resume_step=2)
    events = list(events_of(tmp_path))
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert sorted(scalars) == sorted(
        (step, "loss", float(np.float32(1 / step))) for step in (1, 2, 3, 3)
    )
    starts = [e.step for e in events if e.HasField("session_log")]
    assert starts == [0, 3]


def test_wrong_metrics_and_files_are_named(tmp_path):
    with MetricsWriter(tmp_path, None) as writer:
        with pytest.raises(ValueError, match=r"\['loss'\], expected a step"):
            writer.write({"loss": 1.0})
        with pytest.raises(ValueError, match="metric note is 'warm', expected a number"):
            writer.write({"step": 1, "note": "warm"})
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot JSON\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is 'not JSON', expected a JSON"):
        read_metrics(path)


def test_piped_output_has_plain_lines(monkeypatch):
    clock = iter(float(second) for second in range(0, 400, 4))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with ProgressDisplay(10, console=Console(file=out), plain_every_seconds=12.0) as display:
        for step in range(1, 11):
            display.update(step, loss=10 / step, tokens_per_second=12345.6)
            if step == 5:
                display.message("step 5  eval loss 2.1 [held out]")
    assert out.getvalue().splitlines() == [
        "step 1/10  loss 10.0000  12,346 tokens/s  -:-- left",
        "step 4/10  loss 2.5000  12,346 tokens/s  0:24 left",
        "step 5  eval loss 2.1 [held out]",
        "step 7/10  loss 1.4286  12,346 tokens/s  0:12 left",
        "step 10/10  loss 1.0000  12,346 tokens/s  0:00 left",
    ]


def test_a_terminal_gets_a_bar():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with ProgressDisplay(3, first_step=2, console=console) as display:
        display.update(2, loss=3.5, tokens_per_second=1000.0)
        display.message("a line above")
        display.update(3, loss=3.25, tokens_per_second=1000.0)
    text = out.getvalue()
    assert "\x1b[" in text and "a line above" in text
    assert "step 3/3" in text and "loss 3.2500  1,000 tokens/s  0:00 left" in text
