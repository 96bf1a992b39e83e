"""The real engine with twice as many requests as it can answer, by experiments/serving/overload.py,
and that program's judgement of servers that break its rules."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dsv3_jax
from tests.model.weights import build_transformer, model_config
from tests.oracle import random_weights
from tests.oracle.cases import tiny_config

PROGRAM = Path(__file__).parents[3] / "experiments/serving/overload.py"
SETTINGS = ("slots=4", "max_seq_len=96", "page_size=8", "prefill_chunk=32", "max_queue=12")


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder / "tokenizer.json")
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    model = build_transformer(
        model_config(config, eos_token_id=tokenizer.eos_id, max_position_embeddings=96),
        random_weights(config, seed=0, std=0.5),
    )
    target = tmp_path_factory.mktemp("exported") / "tiny"
    dsv3_jax.save_hf(model, target, weights="float32", tokenizer_from=folder)
    return target


@pytest.mark.slow
def test_nothing_breaks_or_leaks(checkpoint):
    command = [sys.executable, str(PROGRAM), "--checkpoint", str(checkpoint), "--requests", "500"]
    command += ["--new-tokens", "48", "--every", "50"]
    command += [f"--set=serve.{setting}" for setting in SETTINGS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (summary,) = re.findall(r"^all: .*", ended.stdout, re.MULTILINE)
    counts = {name: int(count) for count, name in re.findall(r"(\d+) (\w+)", summary)}
    assert counts["answered"] + counts["refused"] + counts["left"] == 500
    assert min(counts["answered"], counts["refused"], counts["left"]) > 20
    assert "48 of 48 pages could be had at once" in ended.stdout


CHOICE = '{"choices": [{"text": "a", "finish_reason": "length"}]}'
JUDGED = [
    (200, {}, CHOICE, False, "answered"),
    (200, {}, CHOICE.replace("length", "stop"), False, "answer cut short"),
    (200, {}, f"data: {CHOICE}\n\ndata: [DONE]\n\n", True, "answered"),
    (200, {}, f"data: {CHOICE}\n\n", True, "stream cut short"),
    (200, {}, "", True, "stream cut short"),
    (200, {}, 'data: {"error": {"code": 503}}\n\ndata: [DONE]\n\n', True, "status 503 in a stream"),
    (200, {}, 'data: {"error": {"code": 503}}\n\n', True, "status 503 in a stream"),
    (429, {"retry-after": "2"}, "{}", True, "refused"),
    (429, {"retry-after": "0"}, "{}", False, "429 without Retry-After"),
    (429, {}, "{}", False, "429 without Retry-After"),
    (500, {}, "{}", False, "status 500"),
    (503, {"retry-after": "2"}, "{}", True, "status 503"),
]


@pytest.mark.parametrize(("status", "headers", "content", "stream", "expected"), JUDGED)
def test_it_sees_what_breaks_a_rule(monkeypatch, status, headers, content, stream, expected):
    monkeypatch.syspath_prepend(PROGRAM.parent)
    judge = importlib.import_module("overload").judge
    assert judge(status, headers, content.encode(), stream).what == expected
