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
def served(checkpoint):
    """The server's process, its URL, and its units' process ids."""
    settings = [word for setting in SETTINGS for word in ("--set", f"serve.{setting}")]
    command = [sys.executable, "-m", "dsv3_jax.cli", "serve", str(checkpoint[0]), "--port", "0"]
    server = subprocess.Popen([*command, *settings], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    url = server.stdout.readline().partition(" at ")[2].split()[0]
    units = children(server.pid)
    assert len(units) == 2
    yield server, url, units
    for pid in (server.pid, *units):
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_answers_and_leaves_no_process_behind(checkpoint, served, number):
    server, url, units = served
    folder, answer = checkpoint
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    tokenizer = load_tokenizer(folder / "tokenizer.json", 320)
    assert reply.json()["choices"][0]["text"] == tokenizer.decode(answer)
    assert reply.json()["usage"]["completion_tokens"] == 12
    metrics = httpx.get(f"{url}/metrics", timeout=10).text
    assert re.search(r"^dsv3_generated_tokens(_total)? 12\.0$", metrics, re.MULTILINE)
    server.send_signal(number)
    assert server.wait(30) == (0 if number == signal.SIGTERM else -number)
    wait_for_ends(units, 5)
