"""Both units in one process of simulated devices, against `generate`; run by test_one_process.py.

python -m tests.serve.disaggregated.one_process_program one meshes ...   prints what was found
"""

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

from dsv3_jax.config import ModelConfig, ParallelConfig, ServerConfig
from dsv3_jax.environment import simulate_devices
from dsv3_jax.serve.disaggregated.one_process import TwoMeshEngine, load_two_meshes
from dsv3_jax.serve.engine_thread import EngineThread
from dsv3_jax.serve.load_engine import load_engine, load_on_devices
from dsv3_jax.serve.request import Backend, EngineStatistics, Request
from tests.programs import QUICK
from tests.serve.disaggregated.tiny import (
    CONFIG,
    SERVE,
    WHOLE,
    expected,
    make_model,
    random_requests,
)
from tests.serve.test_engine import Receiver

CANCELLED = ("2", "4", "7", "11")


def server_of(parallel: ParallelConfig, **changes: Any) -> ServerConfig:
    serve = dataclasses.replace(SERVE, unit_processes=False, **changes)
    return ServerConfig(serve=serve, parallel=parallel)


def serving(config: ModelConfig, parallel: ParallelConfig, **changes: Any) -> dict[str, Any]:
    """Requests at random times, some cancelled at random times."""
    server = server_of(parallel, slots=3, **changes)
    load = partial(make_model, config)
    engine = load_two_meshes(load, server, config.n_routed_experts, compiler_options=QUICK)
    prefill = engine._reader._engine
    devices = [sorted(d.id for d in e.runner.mesh.devices.flat) for e in (prefill, engine)]
    thread, receiver = EngineThread(engine), Receiver()
    assert isinstance(thread, Backend)
    thread.start(receiver)
    compiled, found = engine.statistics().compilations, {"right": True, "devices": devices}
    ends = []
    for seed in range(3):
        requests, rng = random_requests(16, seed), np.random.default_rng(seed)
        requests = [dataclasses.replace(r, id=f"{seed} {r.id}") for r in requests]
        for number, request in enumerate(requests):
            thread.submit(request)
            for name in (n for n in CANCELLED if int(n) == number - seed):
                thread.cancel(f"{seed} {name}")
            time.sleep(float(rng.uniform(0, 0.03)))
        thread.cancel("nobody")
        receiver.wait(*(r.id for r in requests))
        for name, answer in expected(make_model(config), requests).items():
            tokens, finish = receiver.tokens[name], receiver.ended[name].finish
            may_end = finish == "length" or name.split()[1] in CANCELLED
            found["right"] &= may_end and tokens == answer[: len(tokens)]
            found["right"] &= finish == "cancelled" or len(tokens) == len(answer)
            ends.append(finish)
    thread.stop()  # its statistics are those of the last step then
    now = thread.statistics()
    return found | {
        "finished": [now.finished, ends.count("length")],
        "cancelled": [now.cancelled, ends.count("cancelled")],
        "compiled meanwhile": now.compilations - compiled,
        "left": left(now),
        "slots": now.slots,
        "pages": now.pages,
        "prefixes found": now.cached_prompt_tokens,
        "read by prefill": [prefill.statistics().prompt_tokens, now.prompt_tokens],
        "right guesses": now.accepted_tokens,
        "placements": now.expert_placements,
        "failure": thread.failure(),
    }


@cache
def small_engine() -> tuple[TwoMeshEngine, Any]:
    """With two slots, and its prefill engine."""
    server, how = server_of(ParallelConfig(), slots=2), {"compiler_options": QUICK}
    prefill = load_engine(make_model, server, 0, hands_over=True, **how)
    model, placing = load_on_devices(make_model, server, 0, first_device=1)
    engine = TwoMeshEngine(model, server.serve, prefill=prefill, **placing, **how)
    engine.warm_up()
    return engine, prefill


def refusal(call: Callable[[], Any]) -> str | None:
    """What a ValueError says, None where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def left(statistics: EngineStatistics) -> int:
    now = statistics
    return now.waiting + now.prefilling + now.running + now.pages_used


def ahead() -> dict[str, Any]:
    """How many prompts are read while decode is busy, and what cancelling does at each place."""
    engine, _ = small_engine()
    lengths = {"0": 3, "1": 9, "2": 20, "3": 5, "waits": 7, "4": 30, "5": 8, "6": 11}
    requests = [
        Request(id=name, prompt=tuple(range(1, 1 + count)), max_tokens=40)
        for name, count in lengths.items()
    ]
    for request in requests:
        engine.submit(request)
    found = {"refusal": refusal(lambda: engine.submit(requests[-1]))}
    engine.cancel("waits")
    read = [count for name, count in lengths.items() if name != "waits"]
    most_ahead, tokens, finishes = 0, {}, {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(output.tokens)
            if output.finish is not None:
                finishes[output.id] = output.finish
        time.sleep(0.02)  # prefill has all the time that it wants
        prompt_tokens = engine.statistics().prompt_tokens
        begun = next(i for i in range(8) if sum(read[:i]) >= prompt_tokens)
        most_ahead = max(most_ahead, begun - len(finishes.keys() - {"waits"}))
        if "1" not in finishes and len(tokens.get("1", ())) > 4:
            engine.cancel("2")  # is read, and waits for a slot
            engine.cancel("1")  # is decoded
    answers = expected(make_model(), requests)
    now = engine.statistics()
    return found | {
        "most ahead": most_ahead,
        "finishes": finishes,
        "right": all(tokens[n] == answers[n] for n, f in finishes.items() if f == "length"),
        "cancelled": now.cancelled,
        "left": left(now),
    }


def cancelling() -> dict[str, Any]:
    """Of a request whose first chunk is being read: its last one too, or not."""
    engine, prefill = small_engine()
    step, found = prefill.step, {}
    is_stepping, may_step = threading.Event(), threading.Event()

    def step_when_told():
        is_stepping.set()
        assert may_step.wait(60)
        return step()

    prefill.step = step_when_told
    # One token is read at once whatever shape of chunk is chosen.
    for name, length in {"first chunk": 60, "last chunk": 2}.items():
        is_stepping.clear()
        may_step.clear()
        before = engine.statistics().cancelled, prefill.statistics().cancelled
        engine.submit(Request(id=name, prompt=(7,) * length, max_tokens=9))
        engine.step()
        assert is_stepping.wait(60)
        engine.cancel(name)
        may_step.set()
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        now = engine.statistics()
        found[name] = {
            "outputs": [(output.id, output.finish) for output in outputs],
            "cancelled": now.cancelled - before[0],
            "by prefill": prefill.statistics().cancelled - before[1],
            "left": left(now),
        }
    prefill.step = step
    return found


def failing() -> dict[str, Any]:
    """A prefill engine that fails at its third step. The small engine's end."""
    engine, prefill = small_engine()
    step, steps = prefill.step, []

    def fail():
        steps.append(None)
        if len(steps) == 3:
            raise RuntimeError("out of memory")
        return step()

    prefill.step = fail
    engine.warm_up = lambda: None  # it has
    thread, receiver = EngineThread(engine), Receiver()
    thread.start(receiver)
    for name in "ab":
        thread.submit(Request(id=name, prompt=(3,) * 60, max_tokens=20))
    receiver.wait("a", "b")
    thread.stop()
    refused = refusal(lambda: thread.submit(Request(id="c", prompt=(3,), max_tokens=2)))
    ends = [(receiver.ended[n].finish, receiver.ended[n].error) for n in "ab"]
    return {"failure": thread.failure(), "ends": ends, "refusal": refused}


FOUR = ParallelConfig(node=2, gpu=2, simulated_devices=4)
PROGRAMS: dict[str, Callable[[], dict[str, Any]]] = {
    "one": lambda: serving(CONFIG, ParallelConfig(simulated_devices=1)),
    "meshes": lambda: serving(
        WHOLE, FOUR, prefill_mesh=(1, 1, 2), redundant_experts=4, rebalance_seconds=0.01
    ),
    "ahead": ahead,
    "cancelling": cancelling,
    "failing": failing,
}

if __name__ == "__main__":
    simulate_devices(6)
    print(json.dumps({name: PROGRAMS[name]() for name in sys.argv[1:]}))
