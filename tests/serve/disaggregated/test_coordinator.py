"""Real units in real processes, against `generate`, which knows of none of them."""

import dataclasses
import os
import signal
import threading
import time
from functools import partial

import numpy as np
import pytest

from dsv3_jax.config import ModelConfig, ParallelConfig, ServerConfig
from dsv3_jax.serve.disaggregated.coordinator import Coordinator
from dsv3_jax.serve.request import Backend, Output, Request, SamplingParams
from tests.programs import QUICK
from tests.serve.disaggregated.tiny import (
    CONFIG,
    SERVE,
    WHOLE,
    expected,
    make_model,
    random_requests,
)

SOON = 30
"""Seconds until an affected request has ended; 10 is the aim, where other tests leave room."""


class Deliveries:
    """What a backend has delivered so far; no request ends twice, nor goes on after its end."""

    def __init__(self):
        self.tokens: dict[str, list[int]] = {}
        self.last: dict[str, Output] = {}
        self.seconds: dict[str, float] = {}
        self.wrong: list[Output] = []
        self._changed = threading.Condition()

    def __call__(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                if output.id in self.last:
                    self.wrong.append(output)
                self.tokens.setdefault(output.id, []).extend(output.tokens)
                if output.finish is not None:
                    self.last[output.id] = output
                    self.seconds[output.id] = time.monotonic()
            self._changed.notify_all()

    def wait(self, seconds: float, is_enough) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: is_enough(self), seconds), self.last

    def wait_for_ends(self, requests: list[Request], seconds: float) -> None:
        self.wait(seconds, lambda now: all(r.id in now.last for r in requests))
        assert not self.wrong


def started(
    config: ModelConfig, parallel: ParallelConfig | None = None, **changes
) -> tuple[Coordinator, Deliveries]:
    serve = dataclasses.replace(SERVE, **changes)
    load = partial(make_model, config)
    server = ServerConfig(serve=serve, parallel=parallel or ParallelConfig())
    coordinator = Coordinator(config, server, load, compiler_options=QUICK)
    deliveries = Deliveries()
    coordinator.start(deliveries)
    return coordinator, deliveries


def settled(coordinator: Coordinator):
    """Statistics once nothing runs."""
    deadline = time.monotonic() + 10
    while (now := coordinator.statistics()).running or now.pages_used or now.waiting:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return now


@pytest.fixture(scope="module")
def served():
    coordinator, deliveries = started(CONFIG)
    yield coordinator, deliveries
    coordinator.stop()


REQUESTS = random_requests(12, 0)


@pytest.fixture(scope="module")
def answers():
    return expected(make_model(), REQUESTS)


class Alternating:
    """A grammar: even tokens, then odd ones."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        is_allowed = np.arange(64) % 2 == len(self.accepted) % 2
        return (is_allowed.reshape(-1, 32) << np.arange(32)).sum(axis=1).astype(np.uint32)

    def accept(self, token):
        self.accepted.append(token)


class Failing(Alternating):
    """A grammar that ends in an error."""

    def allowed(self):
        if len(self.accepted) == 3:
            raise RuntimeError("too complex")
        return super().allowed()


def test_answers_are_generates(answers, served):
    """Of a prefill and a decode unit; random lengths and arrivals, some cancelled."""
    coordinator, deliveries = served
    assert isinstance(coordinator, Backend)
    requests, before = REQUESTS, coordinator.statistics()
    for number, pause in enumerate(np.random.default_rng(0).uniform(0, 0.05, 12)):
        coordinator.submit(requests[number])
        if number in (5, 9):
            coordinator.cancel(str(number - 2))
        time.sleep(pause)
    coordinator.cancel("nobody")
    deliveries.wait_for_ends(requests, 60)
    finishes = {name: output.finish for name, output in deliveries.last.items()}
    whole = [r for r in requests if finishes[r.id] == "length"]
    assert {r.id for r in requests} - {r.id for r in whole} <= {"3", "7"}
    assert {r.id: deliveries.tokens[r.id] for r in whole} == {r.id: answers[r.id] for r in whole}
    for name in ("3", "7"):
        made = deliveries.tokens[name]
        assert finishes[name] in ("cancelled", "length") and made == answers[name][: len(made)]
    now = settled(coordinator)
    assert now.finished - before.finished == len(whole)
    assert now.cancelled - before.cancelled == 12 - len(whole)
    assert now.cached_prompt_tokens > before.cached_prompt_tokens
    assert now.generated_tokens >= sum(map(len, deliveries.tokens.values()))
    assert (now.slots, now.prefilling, now.compilations) == (4, 0, before.compilations)
    assert coordinator.failure() is None


def test_a_grammar_stays_with_the_coordinator(answers, served):
    coordinator, deliveries = served
    constraint = Alternating()
    request = Request(id="grammar", prompt=(1, 2), max_tokens=9, constraint=constraint)
    other = dataclasses.replace(REQUESTS[1], id="beside it")
    failing = Request(id="failing", prompt=(1, 2), max_tokens=9, constraint=Failing())
    for each in (request, other, failing):
        coordinator.submit(each)
    deliveries.wait_for_ends([request, other, failing], 60)
    found = deliveries.tokens["grammar"]
    assert found == constraint.accepted
    assert [token % 2 for token in found] == [0, 1] * 4 + [0]
    assert deliveries.tokens["beside it"] == answers["1"]
    assert deliveries.last["failing"].error == "RuntimeError: too complex"
    assert deliveries.tokens["failing"] == found[:3]
    settled(coordinator)


def test_what_could_never_be_served_is_refused_at_once(served):
    coordinator, _ = served
    with pytest.raises(ValueError, match="prompt: token is 64, expected a token from 0 to 63"):
        coordinator.submit(Request(id="x", prompt=(64,), max_tokens=1))
    with pytest.raises(ValueError, match="max_tokens is 97, expected at most 96"):
        coordinator.submit(Request(id="x", prompt=(1,) * 90, max_tokens=7))
    wrong = dataclasses.replace(SERVE, max_seq_len=97)
    with pytest.raises(ValueError, match=r"serve\.max_seq_len is 97, expected at most"):
        Coordinator(CONFIG, ServerConfig(serve=wrong), make_model)


def refuse():
    raise ValueError("the checkpoint is damaged, expected a whole one")


@pytest.mark.slow
def test_units_that_cannot_start_are_said_to():
    coordinator = Coordinator(CONFIG, ServerConfig(serve=SERVE), refuse)
    with pytest.raises(RuntimeError, match="cannot run: the checkpoint is damaged, expected"):
        coordinator.start(Deliveries())
    assert "no " in coordinator.failure() and "unit can be started" in coordinator.failure()
    with pytest.raises(ValueError, match="the engine has ended"):
        coordinator.submit(Request(id="x", prompt=(1,), max_tokens=1))
    assert all(unit.pid is None for unit in coordinator.units.values())


@pytest.mark.slow
def test_stopped_while_its_units_start():
    coordinator, failures = (
        Coordinator(CONFIG, ServerConfig(serve=SERVE), partial(time.sleep, 60)),
        [],
    )

    def start():
        with pytest.raises(RuntimeError, match="stopped while units were starting"):
            coordinator.start(Deliveries())
        failures.append(coordinator.failure())

    starting = threading.Thread(target=start)
    starting.start()
    time.sleep(1)
    coordinator.stop()
    starting.join(10)
    assert failures == [None] and all(unit.pid is None for unit in coordinator.units.values())


def kill(coordinator: Coordinator, name: str, number: int = signal.SIGKILL) -> int:
    pid = coordinator.units[name].pid
    assert pid is not None
    os.kill(pid, number)
    return pid


def long_requests(prefix: str, count: int) -> list[Request]:
    """Of 16 prompt tokens and 80 more; every third is drawn."""
    rng = np.random.default_rng(len(prefix))
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=7)
    return [
        Request(
            id=f"{prefix}{number}",
            prompt=tuple(rng.integers(0, 64, 16).tolist()),
            max_tokens=80,
            sampling=drawn if number % 3 == 2 else SamplingParams(),
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def whole_model():
    return make_model(WHOLE)


@pytest.fixture(scope="module")
def three():
    """A prefill and two decode units, with guesses; each test leaves them alive."""
    coordinator, deliveries = started(WHOLE, decode_units=2, decode_steps=1)
    yield coordinator, deliveries
    pids = [unit.pid for unit in coordinator.units.values()]
    coordinator.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_decode_unit_that_dies_or_hangs_costs_no_answer(whole_model, three, number):
    """Its requests go on at the other one, with guesses; it comes back."""
    coordinator, deliveries = three
    requests = long_requests(f"{number.name} ", 8)
    before, retries = coordinator.statistics(), coordinator.retries
    for request in requests:
        coordinator.submit(request)
    begun = lambda now: sum(len(now.tokens.get(r.id, ())) > 2 for r in requests) >= 4  # noqa: E731
    deliveries.wait(60, begun)
    pid = kill(coordinator, "decode-0", number)
    at = time.monotonic()
    deliveries.wait_for_ends(requests, 60)
    assert max(deliveries.seconds[r.id] for r in requests) - at < SOON
    answers = expected(whole_model, requests)
    assert {r.id: deliveries.tokens[r.id] for r in requests} == answers
    now = coordinator.statistics()
    assert now.generated_tokens > before.generated_tokens
    assert now.prompt_tokens >= before.prompt_tokens + 8 * 16
    assert coordinator.retries > retries
    wait_for_restart(coordinator, "decode-0", pid)


@pytest.mark.slow
def test_a_prefill_unit_that_dies_ends_what_it_reads_and_no_more(whole_model, three):
    coordinator, deliveries = three
    requests = long_requests("prefill ", 16)
    for request in requests[:6]:
        coordinator.submit(request)
    deliveries.wait(60, lambda now: all(r.id in now.tokens for r in requests[:6]))
    kill(coordinator, "prefill-0", signal.SIGSTOP)  # so that it has something to be killed with
    for request in requests[6:]:
        coordinator.submit(request)
    pid = kill(coordinator, "prefill-0")
    at = time.monotonic()
    wait_for_restart(coordinator, "prefill-0", pid)  # those that waited are read then
    deliveries.wait_for_ends(requests, 60)
    answers = expected(whole_model, requests)
    failed = [r for r in requests if deliveries.last[r.id].finish == "error"]
    assert 1 <= len(failed) <= 4 and not {r.id for r in failed} & {r.id for r in requests[:6]}
    for request in failed:
        assert "prefill-0 was killed by signal 9" in deliveries.last[request.id].error
        assert deliveries.seconds[request.id] - at < SOON
    whole = [r for r in requests if r not in failed]
    assert {r.id: deliveries.tokens[r.id] for r in whole} == {r.id: answers[r.id] for r in whole}
    settled(coordinator)


@pytest.mark.slow
def test_units_on_meshes_of_their_own_whose_experts_move(whole_model):
    """2 devices read, 4 decode, each with 12 slots for 8 experts, placed anew all the time."""
    four = ParallelConfig(node=2, gpu=2, simulated_devices=4)
    coordinator, deliveries = started(
        WHOLE,
        four,
        prefill_mesh=(1, 1, 2),
        redundant_experts=4,
        rebalance_seconds=0.01,
        speculative=False,  # half as many programs
    )
    try:
        for request in REQUESTS:
            coordinator.submit(request)
        deliveries.wait_for_ends(REQUESTS, 200)
        now = settled(coordinator)
    finally:
        coordinator.stop()
    assert deliveries.tokens == expected(whole_model, REQUESTS)
    pages = 4 * 96 // 8  # of a device
    assert (now.slots, now.pages, now.pages_used) == (4 * 4, (2 + 4) * pages, 0)
    assert now.expert_placements > 2 and now.device_load_max_over_mean >= 1


def test_gpus_have_to_suffice_for_all_units(monkeypatch):
    """What is wrong is said before any unit is started."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    serve = dataclasses.replace(SERVE, prefill_units=2, prefill_mesh=(1, 1, 1))
    server = ServerConfig(serve=serve, parallel=ParallelConfig(gpu=4))
    with pytest.raises(ValueError, match=r"GPUs of this server is 4, expected at least 6, one for"):
        Coordinator(CONFIG, server, make_model)
    simulated = ParallelConfig(gpu=4, simulated_devices=4)
    Coordinator(CONFIG, dataclasses.replace(server, parallel=simulated), make_model)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,4,5,6,7")
    Coordinator(CONFIG, server, make_model)


def wait_for_restart(coordinator: Coordinator, name: str, pid: int) -> None:
    """Until a unit has another process, and that is ready."""
    deadline = time.monotonic() + 200
    while coordinator.units[name].pid == pid or name not in coordinator.ready_units():
        assert time.monotonic() < deadline
        time.sleep(0.2)
