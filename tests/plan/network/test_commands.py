"""`dsv3 plan network`: what it prints, draws and refuses."""

import argparse
import functools
import json

import pytest

from dsv3_jax.plan.network import commands
from dsv3_jax.plan.network.deepep import compare_bandwidths
from dsv3_jax.plan.network.roce import compare_rings


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    commands.add_arguments(parser)
    return commands.run(parser.parse_args(arguments))


def test_the_page(capsys):
    assert run("mpft", "--gpus", "128", "--traffic", "alltoall", "--fail", "plane=3") == 0
    text = capsys.readouterr().out
    assert "alltoall on MPFT: 128 GPUs, 8 switches" in text
    assert "failed: plane=3" in text
    assert "35.00 GB/s" in text  # seven eighths of 40
    assert [line.split()[:2] for line in text.splitlines()[-4:]] == [
        ["NIC", "out"],
        ["NIC", "in"],
        ["NVLink", "out"],
        ["NVLink", "in"],
    ]


def test_json_and_a_picture(capsys, tmp_path):
    path = tmp_path / "use.png"
    arguments = ("mrft", "--gpus", "64", "--tokens", "16", "--json", "--png", str(path))
    assert run(*arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["topology"] == "MRFT" and found["gpus"] == 64
    assert found["seconds"] >= found["bound_seconds"] * (1 - 1e-9)
    assert path.stat().st_size > 10_000


def test_table_3(capsys):
    assert run("--table") == 0
    text = capsys.readouterr().out
    assert "261,632 / 261,632" in text and "384,272 / 384,272" in text
    assert run("--table", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    pairs = zip(found["ours"], found["published"], strict=True)
    assert all(ours["links"] == paper["links"] for ours, paper in pairs)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("latency", "across leaves"),
        ("contention", "KV fetch"),
        ("roce", "TP 2"),
        ("deepep", "low-latency kernels"),
    ],
)
def test_other_tables(capsys, monkeypatch, table, expected):
    few = functools.partial(compare_bandwidths, sizes=(8,))
    monkeypatch.setattr(commands, "compare_bandwidths", few)
    monkeypatch.setattr(commands, "compare_rings", functools.partial(compare_rings, seeds=1))
    assert run(f"--{table}") == 0
    assert expected in capsys.readouterr().out
    assert run(f"--{table}", "--json") == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "TOPOLOGY is missing, expected one of ft2"),
        (("mpft",), "--gpus is missing, expected a multiple of 8"),
        (("torus", "--gpus", "8"), "topology is 'torus', expected one of"),
        (("mpft", "--table"), "TOPOLOGY is 'mpft', expected none beside --table"),
        (("--latency", "--png", "x.png"), "--png is 'x.png', expected none beside --latency"),
        (("ft2", "--gpus", "64", "--gpu", "tpu"), "gpu is 'tpu', expected one of"),
        (("mpft", "--gpus", "64", "--fail", "plane=9"), "--fail plane is 9, expected below 8"),
        (("mpft", "--gpus", "8", "--ep", "8", "--traffic", "pipeline"), "stages is 16, expected"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        run(*arguments)
