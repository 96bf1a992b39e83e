"""`dsv3 serve` as a process: what it prints, how it ends, what it says of wrong options."""

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dsv3_jax.config import ServerConfig, apply_overrides
from dsv3_jax.serve.server.command import _bound_socket, run
from dsv3_jax.serve.server.options import add_arguments
from tests.serve.server.served_program import load

ROOT = Path(__file__).resolve().parents[3]
BODY = {"prompt": "the", "max_tokens": 40, "stream": True}


@pytest.fixture
def checkpoint(tokenizer, tmp_path) -> Path:
    folder = tmp_path / "small"
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def start(checkpoint):
    """start(option, ...) -> (process, its URL)."""
    started = []

    def begin(*options, checkpoint=checkpoint):
        command = [sys.executable, "-m", "tests.serve.server.served_program", str(checkpoint)]
        process = subprocess.Popen(
            [*command, "--port", "0", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, process.stdout.readline()

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_the_first_signal_drains_and_the_exit_code_is_0(start):
    process, line = start("--name", "mine")
    name, _, url = line.removeprefix("dsv3 serve: ").partition(" at ")
    url = url.split()[0]
    assert name == "mine"
    with (
        httpx.Client(base_url=url) as client,
        client.stream("POST", "/v1/completions", json=BODY) as response,
    ):
        process.send_signal(signal.SIGTERM)
        while client.get("/ready").status_code == 200:
            time.sleep(0.01)
        assert client.post("/v1/completions", json=BODY).status_code == 503
        assert response.read().endswith(b"data: [DONE]\n\n")
    output, errors = process.communicate(timeout=10)
    assert (process.returncode, output) == (0, "")
    events = [json.loads(line) for line in errors.splitlines()]
    assert {"ready", "draining", "answered", "drained"} < {each["event"] for each in events}
    [drained] = [each for each in events if each["event"] == "drained"]
    assert drained["all_finished"] is True


@pytest.mark.slow
def test_what_is_not_done_in_time_is_cancelled(start):
    process, line = start("--set", "serve.drain_seconds=0.2")
    url = line.partition(" at ")[2].split()[0]
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 250}
    ) as response:
        process.send_signal(signal.SIGINT)
        last = response.read().decode().strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
    process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.slow
def test_the_second_signal_ends_it_at_once(start):
    process, line = start()
    url = line.partition(" at ")[2].split()[0]
    with httpx.stream("POST", f"{url}/v1/completions", json={**BODY, "max_tokens": 250}):
        process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url) as client:
            while client.get("/ready").status_code == 200:
                time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=3)  # 250 tokens would take 5 s
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_an_engine_that_does_not_start_is_exit_code_1(start, checkpoint):
    process, line = start(checkpoint=checkpoint / "broken")
    assert line == ""
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert any(
        "there is none left" in json.loads(line).get("error", "") for line in errors.splitlines()
    )


def run_with(load, *arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(arguments)
    return run(options, apply_overrides(ServerConfig(), options.set), load)


def test_wrong_options_are_said_before_the_model_is_loaded(checkpoint):
    def never(path: Path, config: ServerConfig):
        raise AssertionError("the model was loaded")

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(ValueError, match=rf"--port {port}: .*expected a free address"):
            run_with(never, "x", "--port", port)
    with pytest.raises(ValueError, match=r"--port is 70000, expected a number from 0 to 65535"):
        run_with(never, "x", "--port", "70000")
    with pytest.raises(ValueError, match=r"--host is 'no\.such\.host\.invalid', expected"):
        run_with(never, "x", "--host", "no.such.host.invalid")
    with pytest.raises(ValueError, match=r"serve\.slots is 0, expected a number of at least 1"):
        run_with(never, "x", "--set", "serve.slots=0")
    keys = checkpoint / "none.jsonl"
    with pytest.raises(ValueError, match=r"none\.jsonl: .*expected a file of API keys"):
        run_with(load, str(checkpoint), "--port", "0", "--set", f"serve.api_keys_file={keys}")


def test_both_kinds_of_addresses():
    for host in ("127.0.0.1", "localhost", "::1"):
        with _bound_socket(host, 0) as listener:
            assert listener.getsockname()[1] > 0
