"""The load tool: figures against those of requests written by hand, and against a live server."""

import argparse
import json
import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.config import ServeConfig
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.plan.bench_serve import (
    Seen,
    add_arguments,
    as_text,
    poisson,
    quantiles,
    read_trace,
    run,
    summarise,
)
from dsv3_jax.plan.serve_plot import draw
from dsv3_jax.serve.server.app import make_app
from tests.serve.server.fake_backend import FakeBackend
from tests.serve.server.live import serving

TEXT = "the model of an expert returns a token to its router and adds what two layers keep\n"


def options(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_poisson_arrivals_have_their_rate_and_no_memory():
    arrivals = poisson(rate=5.0, requests=4000, prompt_tokens=7, max_tokens=9, seed=3)
    assert arrivals == poisson(5.0, 4000, 7, 9, seed=3) != poisson(5.0, 4000, 7, 9, seed=4)
    gaps = [b.seconds - a.seconds for a, b in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.2, rel=0.05)  # 3 standard errors
    assert math.sqrt(variance) == pytest.approx(mean, rel=0.05)  # exponential: equal
    assert {(each.prompt_tokens, each.max_tokens) for each in arrivals} == {(7, 9)}


@given(values=st.lists(st.floats(0, 100), min_size=1, max_size=200))
def test_quantiles_have_their_share_at_or_below(values):
    for name, found in quantiles(values).items():
        share = int(name[1:]) / 100
        assert sum(value <= found for value in values) >= share * len(values)
        assert sum(value < found for value in values) < share * len(values)
        assert found in values


def test_a_summary_by_hand():
    seen = [
        Seen(sent_at=1.0, status="200", ttft=0.1, tpot=0.02, e2e=0.5, prompt_tokens=10, tokens=20),
        Seen(sent_at=2.0, status="200", ttft=0.3, tpot=None, e2e=0.3, prompt_tokens=6, tokens=1),
        Seen(sent_at=2.5, status="429", e2e=0.5, retry_after=3),
        Seen(sent_at=2.6, status="ReadError"),
    ]
    report = summarise(seen, {"pages": 3})
    assert (report.requests, report.answered) == (4, 2)
    assert report.errors == {"429": 1, "ReadError": 1}
    assert report.seconds == pytest.approx(2.0)  # from 1.0 to 3.0
    assert report.tokens_per_second == pytest.approx(21 / 2)
    assert report.prompt_tokens_per_second == pytest.approx(8)
    assert report.requests_per_second == pytest.approx(1)
    assert report.ttft_seconds == {"p50": 0.1, "p95": 0.3, "p99": 0.3}
    assert report.tpot_seconds == {"p50": 0.02, "p95": 0.02, "p99": 0.02}
    text = as_text(report)
    assert "2 of 4 requests answered in 2.0 s; 1 x 429, 1 x ReadError" in text
    assert "p95 300.0 ms" in text
    nothing = summarise(seen[3:], {})
    assert nothing.answered == 0 and nothing.ttft_seconds["p50"] is None
    assert "none" in as_text(nothing)


def test_a_trace_is_read_in_the_order_of_its_times(tmp_path):
    file = tmp_path / "trace.jsonl"
    lines = [
        {"arrival": 2, "prompt": "the model", "max_tokens": 3},
        {"arrival": 0.5, "prompt_tokens": 40},
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    first, second = read_trace(file, prompt_tokens=8, max_tokens=16)
    assert (first.seconds, first.prompt, first.prompt_tokens, first.max_tokens) == (
        *(0.5, None),
        *(40, 16),
    )
    assert (second.seconds, second.prompt, second.max_tokens) == (2.0, "the model", 3)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Expecting property name"),
        ("[]", r"line is \[\], expected an object"),
        ("{}", "arrival is None, expected a number of at least 0"),
        ('{"arrival": -1}', "arrival is -1"),
        ('{"arrival": NaN}', "arrival is nan"),
        ('{"arrival": 1, "max_tokens": 1.5}', "max_tokens is 1.5"),
        ('{"arrival": 1, "prompt": 3}', "prompt is 3, expected a text"),
        ('{"arrival": 1, "colour": 3}', "field is 'colour', expected one of arrival"),
    ],
)
def test_a_wrong_line_of_a_trace_is_named(tmp_path, line, says):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"arrival": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"trace\.jsonl, line 2: {says}"):
        read_trace(file, 8, 16)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rate", "0"], "--rate is 0.0, expected a positive number"),
        (["--rate", "inf"], "--rate is inf"),
        (["--requests", "0"], "--requests is 0, expected at least 1"),
        (["--max-tokens", "0"], "--max-tokens is 0, expected at least 1"),
        (["--trace", "none.jsonl"], "none.jsonl: No such file"),
        (["--trace", "x", "--rate", "3"], "--rate is 3.0, expected no trace"),
        (["--set", "serve.slots=3"], "--set is .*that server is running"),
        ([], "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_is_a_value_error(arguments, says):
    with pytest.raises(ValueError, match=says):
        run(options("http://127.0.0.1:9", *arguments))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, vocab_size=300)


def test_it_measures_what_a_server_does(tokenizer, tmp_path, capsys):
    """The server's step takes 50 ms and makes a token for each request: so that is the time per
    token, and two in one slot wait for each other."""
    script = tokenizer.encode(TEXT)
    backend = FakeBackend(
        script=lambda _: script, slots=1, tokens_per_step=1, step_seconds=0.05, max_seq_len=128
    )
    app = make_app(backend, tokenizer, ServeConfig(slots=1, max_queue=1), name="tiny")
    trace = tmp_path / "trace.jsonl"
    lines = [
        {"arrival": 0, "prompt_tokens": 40, "max_tokens": 21},
        {"arrival": 0.1, "prompt": "the model", "max_tokens": 11},
        {"arrival": 0.2, "prompt_tokens": 3},  # the queue is full then
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    png = tmp_path / "load.png"
    with serving(app) as url:
        assert run(options(url, "--trace", str(trace), "--json", "--png", str(png))) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["requests"], report["answered"], report["errors"]) == (3, 2, {"429": 1})
    assert report["tpot_seconds"]["p50"] >= 0.04  # the first may be seen a little late
    assert report["ttft_seconds"]["p95"] >= 0.5  # of the first's 21 steps, 0.1 s had gone
    assert report["e2e_seconds"]["p95"] >= 1.0
    asked = {len(request.prompt): request for request in backend.requests}
    assert set(asked) == {40, len(tokenizer.encode("the model"))}
    assert asked[40].max_tokens == 21 and asked[40].stop_tokens == ()
    assert report["server"]["slots"] == 1
    content = png.read_bytes()
    assert content[:4] == b"\x89PNG" and len(content) > 10_000
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1800, 600)


def test_nothing_answered_is_nothing_to_draw(tmp_path):
    seen = [Seen(sent_at=0.0, status="429", e2e=0.1)]
    with pytest.raises(ValueError, match="1 requests have no answer, expected one to draw"):
        draw(seen, summarise(seen, {}), tmp_path / "load.png")
