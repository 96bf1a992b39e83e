"""The server over the real engine, as `dsv3 serve` starts it; a tiny model of random weights."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

import dsv3_jax
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.export.huggingface import save_hf
from dsv3_jax.plan.bench_serve import served
from tests.model.weights import build_transformer, model_config
from tests.oracle import random_weights
from tests.oracle.cases import tiny_config

pytestmark = pytest.mark.slow
CHAT = [{"role": "user", "content": "the model?"}]
SETTINGS = ("serve.slots=4", "serve.max_seq_len=192", "serve.page_size=8", "serve.prefill_chunk=32")


@pytest.fixture(scope="module")
def checkpoint(tokenizer: Tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder / "tokenizer.json")
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    model = build_transformer(
        model_config(config, eos_token_id=tokenizer.eos_id, max_position_embeddings=192),
        random_weights(config, seed=0, std=0.5),
    )
    target = tmp_path_factory.mktemp("exported") / "tiny"
    save_hf(model, target, weights="float32", tokenizer_from=folder)
    return target


@pytest.fixture(scope="module")
def client(checkpoint):
    with served(str(checkpoint), SETTINGS) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def test_greedy_answers_are_generates(client, checkpoint, tokenizer):
    prompts = ["the model", "of é漢", "returns to the experts"]
    model = dsv3_jax.load(checkpoint)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    expected = dsv3_jax.generate(model, ids, max_new_tokens=24)
    for stream in (False, True):
        found = client.completions.create(
            model="tiny", prompt=prompts, max_tokens=24, temperature=0, stream=stream
        )
        texts = [""] * 3
        for part in found if stream else [found]:
            for choice in part.choices:
                texts[choice.index] += choice.text
        assert texts == [tokenizer.decode(row) for row in expected]


def test_a_seed_gives_the_same_answer_again(client):
    options = dict(model="tiny", messages=CHAT, n=3, max_tokens=20, temperature=1.2)
    one = client.chat.completions.create(**options, seed=5)
    two = client.chat.completions.create(**options, seed=5)
    contents = [choice.message.content for choice in one.choices]
    assert contents == [choice.message.content for choice in two.choices]
    assert len(set(contents)) == 3
    next_seed = client.chat.completions.create(**options, seed=6)
    assert [choice.message.content for choice in next_seed.choices][:2] == contents[1:]


def test_a_prompt_is_found_again_in_the_cache(client):
    prompt = "the model of the experts returns to the model of the experts"
    options = dict(model="tiny", prompt=prompt, max_tokens=4, temperature=0)
    client.completions.create(**options)
    usage = client.completions.create(**options).usage
    assert 8 <= usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_logprobs_are_probabilities(client):
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=8, logprobs=True, top_logprobs=5, temperature=0
    )
    for token in found.choices[0].logprobs.content:
        top = [each.logprob for each in token.top_logprobs]
        assert top == sorted(top, reverse=True)
        assert token.logprob == top[0]  # greedy


def test_json_by_a_schema_of_a_model_that_knows_none(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    for temperature in (0, 1.5):
        found = client.chat.completions.create(
            model="tiny", messages=CHAT, response_format=wanted, temperature=temperature, seed=1
        )
        value = json.loads(found.choices[0].message.content)
        assert value["a"] in ("x", "y") and value["b"] in (True, False)
        assert found.choices[0].finish_reason == "stop"


def test_the_load_tool_measures_it(client, tmp_path):
    """As a program of its own, over the server that runs."""
    code = (
        "import argparse, sys; from dsv3_jax.plan.bench_serve import add_arguments, run;"
        "p = argparse.ArgumentParser(); add_arguments(p); sys.exit(run(p.parse_args()))"
    )
    url = str(client.base_url).removesuffix("/v1/")
    options = ["--rate", "20", "--requests", "12", "--prompt-tokens", "20", "--max-tokens", "16"]
    command = [sys.executable, "-c", code, url, *options, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    report = json.loads(ended.stdout)
    assert (report["answered"], report["errors"]) == (12, {})
    assert report["server"]["running"] == report["server"]["waiting"] == 0
    assert report["server"]["pages_used"] == 0


def test_sigterm_is_exit_code_0(checkpoint):
    command = [sys.executable, "-m", "dsv3_jax.cli", "serve", str(checkpoint), "--port", "0"]
    command += [f"--set={setting}" for setting in SETTINGS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("dsv3 serve: tiny at http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
