"""`dsv3 serve CHECKPOINT --set serve.disaggregated=true`, as processes."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.export.huggingface import save_hf
from dsv3_jax.serve.generate import generate
from tests.serve.disaggregated.tiny import CONFIG, make_model

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = ("disaggregated=true", "slots=2", "page_size=8", "prefill_chunk=8", "drain_seconds=20")
PROMPT = [5, 7, 300, 11, 5, 7, 300, 12, 13, 14]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> tuple[Path, list[int]]:
    """A checkpoint and its greedy answer."""
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    tokenizer = train_tokenizer(["the model of the experts " * 3], vocab_size=320)
    model = make_model(dataclasses.replace(CONFIG, vocab_size=320))
    (answer,) = generate(model, [PROMPT], 12)
    save_hf(model, folder, weights="float32")
    tokenizer.save(folder / "tokenizer.json")
    return folder, answer


@pytest.fixture
def serve(checkpoint):
    """Starts a server with more settings: its process, its URL, and its units' process ids."""
    pids, servers = [], []

    def start(*more: str):
        settings = [f"serve.{setting}" for setting in SETTINGS] + list(more)
        words = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "dsv3_jax.cli", "serve", str(checkpoint[0]), "--port", "0"]
        server = subprocess.Popen([*command, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        servers.append(server)
        url = server.stdout.readline().partition(" at ")[2].split()[0]
        units = children(server.pid)
        pids.extend((server.pid, *units))
        return server, url, units

    yield start
    for pid in pids:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    for server in servers:
        server.communicate()


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether it runs: what has ended stays a zombie until its parent asks."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for_ends(pids: list[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def check_answer(checkpoint, url: str) -> None:
    folder, answer = checkpoint
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    tokenizer = load_tokenizer(folder / "tokenizer.json", 320)
    assert reply.json()["choices"][0]["text"] == tokenizer.decode(answer)
    assert reply.json()["usage"]["completion_tokens"] == 12
    metrics = httpx.get(f"{url}/metrics", timeout=10).text
    assert re.search(r"^dsv3_generated_tokens(_total)? 12\.0$", metrics, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_answers_and_leaves_no_process_behind(checkpoint, serve, number):
    server, url, units = serve()
    assert len(units) == 2
    check_answer(checkpoint, url)
    server.send_signal(number)
    assert server.wait(30) == (0 if number == signal.SIGTERM else -number)
    wait_for_ends(units, 5)


@pytest.mark.slow
def test_answers_in_one_process(checkpoint, serve):
    server, url, units = serve("serve.unit_processes=false", "parallel.simulated_devices=1")
    assert units == []
    check_answer(checkpoint, url)
    server.send_signal(signal.SIGTERM)
    assert server.wait(30) == 0


@pytest.mark.slow
def test_one_process_needs_devices_for_both(checkpoint):
    settings = [f"--set=serve.{setting}" for setting in (*SETTINGS, "unit_processes=false")]
    command = [sys.executable, "-m", "dsv3_jax.cli", "serve", str(checkpoint[0]), "--port", "0"]
    run = subprocess.run([*command, *settings], cwd=ROOT, capture_output=True, text=True)
    message = "devices of this process is 1, expected at least 1 for prefill and 1 for decode = 2"
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert run.stderr.startswith(f"dsv3 serve: {message}"), run.stderr
