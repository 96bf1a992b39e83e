"""Prefill and decode in one process. Engines run in another one, which sees 6 devices."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsv3_jax.config import ParallelConfig, ServerConfig
from dsv3_jax.serve.disaggregated.handover import Layout
from dsv3_jax.serve.disaggregated.one_process import Reader, load_two_meshes
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.request import EngineStatistics, Output
from tests.serve.disaggregated.tiny import SERVE

ROOT = Path(__file__).parents[3]


def found(*names: str) -> dict:
    """What `one_process_program` finds."""
    command = [sys.executable, "-m", "tests.serve.disaggregated.one_process_program", *names]
    run = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check_served(report: dict) -> None:
    """All answers are `generate`'s, and the statistics say what happened."""
    assert report["right"] and report["failure"] is None
    assert report["finished"][0] == report["finished"][1] >= 48 - 3 * 4
    assert report["cancelled"][0] == report["cancelled"][1] > 0
    assert report["compiled meanwhile"] == report["left"] == 0
    assert report["read by prefill"][0] == report["read by prefill"][1] > 0
    assert report["prefixes found"] > 0


@pytest.mark.slow
def test_answers_are_generates_on_a_device_each():
    report = found("one")["one"]
    check_served(report)
    assert report["devices"] == [[0], [1]]
    assert (report["slots"], report["pages"]) == (3, 2 * 3 * 96 // 8)


@pytest.mark.slow
def test_answers_are_generates_on_meshes_whose_experts_move():
    """With guesses."""
    report = found("meshes")["meshes"]
    check_served(report)
    assert report["devices"] == [[0, 1], [2, 3, 4, 5]]
    assert (report["slots"], report["pages"]) == (4 * 3, 6 * 3 * 96 // 8)
    assert report["placements"] > 2 and report["right guesses"] > 0


@pytest.mark.slow
def test_little_is_read_ahead_cancelling_works_anywhere_and_a_failure_ends_all():
    of = found("ahead", "cancelling", "failing")
    ahead = of["ahead"]
    assert ahead["refusal"] == "request id is '6', expected one not running"
    assert ahead["most ahead"] == 3  # two slots and a quarter more, rounded up
    cancelled = {"waits", "1", "2"}
    ends = {n: "cancelled" if n in cancelled else "length" for n in (*"0123456", "waits")}
    assert ahead["finishes"] == ends and ahead["right"]
    assert (ahead["cancelled"], ahead["left"]) == (3, 0)
    for name, by_prefill in {"first chunk": 1, "last chunk": 0}.items():
        report = of["cancelling"][name]
        assert report == {
            "outputs": [[name, "cancelled"]],
            "cancelled": 1,
            "by prefill": by_prefill,  # the second is handed over, and cancelled by decode
            "left": 0,
        }
    reason = "RuntimeError: out of memory"
    refusal = f"the engine has ended: {reason}"
    assert of["failing"] == {"failure": reason, "ends": [["error", reason]] * 2, "refusal": refusal}


def test_too_few_devices_are_said_before_anything_is_loaded(assert_refused):
    server = ServerConfig(serve=SERVE, parallel=ParallelConfig(node=2, gpu=2, simulated_devices=4))
    rule = "at least 4 for prefill and 4 for decode = 8 (parallel.simulated_devices fakes some"

    def load():
        raise AssertionError

    assert_refused(lambda: load_two_meshes(load, server, 8), "devices of this process", 1, rule)


class Script(Engine):
    """Steps that wait to be allowed, and end one request each."""

    def __init__(self, names: list[str]):
        self.names, self.may_step, self.is_stepping = names, threading.Event(), threading.Event()

    @property
    def has_work(self):
        return bool(self.names)

    def warm_up(self):
        pass

    def layout(self):
        return Layout(layers=1, page_size=8, row=24, dtype="float32")

    def statistics(self):
        return EngineStatistics(waiting=len(self.names))

    def take_handovers(self):
        return []

    def step(self):
        self.is_stepping.set()
        assert self.may_step.wait(10)
        name = self.names.pop(0)
        if name == "fails":
            raise RuntimeError("out of memory")
        return [Output(id=name, finish="cancelled")]


def test_a_failure_of_the_thread_is_raised_by_who_asks_for_news():
    engine = Script(["a", "fails", "b"])
    reader = Reader(engine)
    reader.start()
    assert reader.take(0.0).ended == []
    engine.may_step.set()
    with pytest.raises(RuntimeError, match="out of memory"):
        while True:
            reader.take(10.0)
    assert reader.statistics.waiting == 2  # after the last whole step
    reader.close()
    assert engine.names == ["b"]


def test_closing_waits_for_the_step_that_runs():
    engine = Script(["a", "b"])
    reader = Reader(engine)
    reader.start()
    assert engine.is_stepping.wait(10)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    engine.may_step.set()
    closing.join(10)
    assert not closing.is_alive() and engine.names == ["b"]
    assert [output.id for output in reader.take(0.0).ended] == ["a"]
