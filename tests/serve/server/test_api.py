"""The API over plain HTTP: refusals in one shape, clients that leave, budgets, draining."""

import asyncio
import json
import re
import socket
import time

import httpx
import pytest

from dsv3_jax.config import ServeConfig
from dsv3_jax.serve.server import http
from dsv3_jax.serve.server.keys import make_key
from tests.serve.server.live import serving, wait_for

JSON = {"content-type": "application/json"}
CHAT = {"messages": [{"role": "user", "content": "the model"}]}


@pytest.fixture
def serve(make):
    """serve(text, ...) -> (httpx client, backend, application), until the test's end."""
    opened = []

    def start(text="the model", **options):
        app, backend = make(text, **options)
        context = serving(app)
        opened.append((context, httpx.Client(base_url=context.__enter__(), timeout=20)))
        return opened[-1][1], backend, app

    yield start
    for context, client in opened:
        client.close()
        context.__exit__(None, None, None)


def assert_error(response, status, param=None, code=None, says=""):
    assert response.status_code == status, response.text
    content = response.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["param"] == param
    assert content["error"]["code"] == code
    assert says in content["error"]["message"]
    kinds = {401: "authentication_error", 408: "timeout_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    assert content["error"]["type"] == kind


BAD_BODIES = {
    b"": None,
    b"{": None,
    b"[1]": None,
    b'"\\ud800"': None,
    b'{"prompt": "\xff"}': None,
    b'{"prompt": "\\ud800"}': None,
    b'{"prompt": ' + b"[" * 100_000: None,
    b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}": None,
    b'{"prompt": "a", "seed": 9223372036854775808}': "seed",
    b'{"prompt": "a", "temperature": NaN}': "temperature",
    b'{"prompt": "a", "temperature": 1e999}': "temperature",
    b'{"prompt": "a", "temperature": "1"}': "temperature",
    b'{"prompt": "a", "temperature": 2.5}': "temperature",
    b'{"prompt": "a", "n": true}': "n",
    b'{"prompt": "a", "n": 0}': "n",
    b'{"prompt": "a", "max_tokens": 0}': "max_tokens",
    b'{"prompt": "a", "top_p": 0}': "top_p",
    b'{"prompt": "a", "stop": ""}': "stop",
    b'{"prompt": "a", "colour": "red"}': "colour",
    b'{"prompt": "a", "best_of": 3}': "best_of",
    b'{"prompt": "a", "logit_bias": {"x": 1}}': "logit_bias.x",
    b'{"prompt": "a", "logit_bias": {"400": 1}}': "logit_bias",
    b'{"prompt": "a", "logprobs": 21}': "logprobs",
    b'{"prompt": "a", "echo": true, "logprobs": 1}': "logprobs",
    b'{"prompt": "a", "stream_options": {"include_usage": true}}': "stream_options",
    b'{"prompt": ""}': "prompt",
    b'{"prompt": []}': "prompt",
    b'{"prompt": [400]}': "prompt",
    b'{"prompt": [-1]}': "prompt",
    b'{"prompt": [1, "a"]}': "prompt",
    b'{"prompt": null}': "prompt",
    b"{}": "prompt",
    b'{"prompt": ["a", "b", "c"], "n": 50}': "n",
}


def test_a_body_that_is_wrong_is_a_400_that_names_the_field(serve):
    client, backend, _ = serve()
    for body, param in BAD_BODIES.items():
        response = client.post("/v1/completions", content=body, headers=JSON)
        assert response.json()["error"]["param"] == param, body[:80]
        assert_error(response, 400, param)
    assert backend.requests == []


def test_fields_of_a_chat_that_cannot_be_honoured_are_refused_by_name(serve):
    client, backend, _ = serve()
    refused = {
        "tools": [{"type": "function"}],
        "functions": [{"name": "f"}],
        "tool_choice": "auto",
        "audio": {"voice": "a"},
        "prediction": {"type": "content", "content": "a"},
        "web_search_options": {},
        "modalities": ["audio"],
        "reasoning_effort": "high",
        "verbosity": "low",
        "store": True,
        "service_tier": "flex",
    }
    for name, value in refused.items():
        response = client.post("/v1/chat/completions", json={**CHAT, name: value})
        assert response.status_code == 400, name
        assert response.json()["error"]["param"].startswith(name)
    assert backend.requests == []
    harmless = {
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "user": "a",
        "metadata": {"a": "b"},
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "max_tokens": 2,
    }
    assert client.post("/v1/chat/completions", json={**CHAT, **harmless}).status_code == 200


def test_what_is_wrong_with_a_chat(serve):
    client, _, _ = serve()

    def ask(**fields):
        return client.post("/v1/chat/completions", json={**CHAT, **fields})

    assert_error(ask(top_logprobs=2), 400, "top_logprobs")
    assert_error(ask(max_tokens=2, max_completion_tokens=2), 400, "max_tokens")
    assert_error(ask(messages=[]), 400, "messages")
    assert_error(ask(messages=[{"role": "tool", "content": "a"}]), 400, "messages.0.role")
    image = [{"type": "image_url", "image_url": {"url": "a"}}]
    response = ask(messages=[{"role": "user", "content": image}])
    assert response.json()["error"]["param"].startswith("messages.0.content")
    bad = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}
    assert_error(ask(response_format=bad), 400, "response_format", says="not")
    nameless = {"type": "json_schema", "json_schema": {"schema": {}}}
    assert_error(ask(response_format=nameless), 400, "response_format.json_schema.name", says="")
    long = [{"role": "user", "content": "the model " * 500}]
    assert_error(ask(messages=long), 400, "messages", "context_length_exceeded")


def test_paths_methods_types_and_sizes(serve):
    client, _, _ = serve(serve=ServeConfig(slots=4, max_body_bytes=2000))
    assert_error(client.get("/v1/nothing"), 404, says="/v1/nothing")
    response = client.get("/v1/completions")
    assert_error(response, 405)
    assert response.headers["allow"] == "POST"
    assert_error(client.post("/v1/completions", content=b"{}"), 415)
    large = json.dumps({"prompt": "a" * 2000}).encode()
    assert_error(client.post("/v1/completions", content=large, headers=JSON), 413, says="2000")
    chunks = (large[i : i + 100] for i in range(0, len(large), 100))  # without a Content-Length
    assert_error(client.post("/v1/completions", content=chunks, headers=JSON), 413)
    assert_error(
        client.post("/v1/completions", json={"prompt": "a", "model": "b"}),
        404,
        "model",
        "model_not_found",
    )


def test_a_body_that_does_not_end_is_a_408(serve, monkeypatch):
    monkeypatch.setattr(http, "BODY_SECONDS", 0.2)
    client, _, _ = serve()
    head = "POST /tokenize HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as raw:
        raw.sendall(f"{head}content-length: 20\r\n\r\n{{".encode())
        assert raw.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_tokens_there_and_back(serve, tokenizer):
    client, _, _ = serve()
    text = "the é漢🙂"
    found = client.post("/tokenize", json={"prompt": text}).json()
    assert found == {
        "tokens": tokenizer.encode(text),
        "count": len(tokenizer.encode(text)),
        "max_model_len": 256,
    }
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    chat = client.post("/tokenize", json=CHAT).json()["tokens"]
    assert tokenizer.decode(chat) == "User: the model\n\nAssistant:"
    assert_error(client.post("/tokenize", json={}), 400, "prompt")
    assert_error(client.post("/detokenize", json={"tokens": [400]}), 400, "tokens")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_slots(serve, stream):
    client, backend, app = serve("the " * 250, tokens_per_step=1, step_seconds=0.01)
    body = {"prompt": "the", "max_tokens": 250, "n": 2, "stream": stream}
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=client.base_url) as leaving,
        leaving.stream("POST", "/v1/completions", json=body, timeout=0.3) as response,
    ):
        next(response.iter_raw())
        raise httpx.ReadTimeout("we have seen enough")
    wait_for(lambda: backend.open == 0, 2)
    assert list(backend.finishes.values()) == [["cancelled"]] * 2
    wait_for(lambda: app.state.api.admission.in_flight == 0)
    assert b'finish="left"' in client.get("/metrics").content


def test_many_that_leave_at_any_time_leave_nothing_behind(serve):
    client, backend, app = serve(
        "the model " * 20,
        tokens_per_step=1,
        step_seconds=0.001,
        serve=ServeConfig(slots=4, max_queue=8),
    )

    async def one(http, number):
        body = {"prompt": "the", "max_tokens": 30, "stream": number % 2 == 0}
        timeout = 0.02 * (number % 7) if number % 3 == 0 else 20
        try:
            async with asyncio.timeout(timeout):
                response = await http.post("/v1/completions", json=body)
        except (TimeoutError, httpx.HTTPError):
            return None
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
        return response.status_code

    async def all_of_them():
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=client.base_url, timeout=20, limits=limits) as http:
            return await asyncio.gather(*(one(http, number) for number in range(80)))

    statuses = asyncio.run(all_of_them())
    assert set(statuses) == {None, 200, 429}
    wait_for(lambda: backend.open == 0)
    assert {len(finishes) for finishes in backend.finishes.values()} == {1}
    wait_for(lambda: app.state.api.admission.in_flight == 0)
    assert app.state.api.bridge._open == {}


def test_a_full_queue_is_a_429_with_retry_after(serve):
    client, _, _ = serve(
        "the " * 100,
        slots=1,
        tokens_per_step=1,
        step_seconds=0.005,
        serve=ServeConfig(slots=1, max_queue=1),
    )
    body = {"prompt": "the", "max_tokens": 100, "stream": True}
    with (
        client.stream("POST", "/v1/completions", json=body) as first,
        client.stream("POST", "/v1/completions", json=body) as second,
    ):
        response = client.post("/v1/completions", json=body)
        assert_error(response, 429, code="queue_full")
        assert int(response.headers["retry-after"]) >= 1
        assert first.read() and second.read()
    assert_error(client.post("/v1/completions", json={"prompt": "a", "n": 3}), 400, "n")
    assert b'dsv3_rejected_total{reason="queue_full"} 1.0' in client.get("/metrics").content
    assert client.post("/v1/completions", json={"prompt": "the"}).status_code == 200


def test_keys_and_their_budgets(serve, tmp_path):
    secrets = {}
    file = tmp_path / "keys.jsonl"
    with file.open("w") as out:
        for name, requests in (("ann", 2.0), ("bob", None)):
            secrets[name], key = make_key(name, requests_per_minute=requests)
            out.write(json.dumps({k: v for k, v in vars(key).items() if v is not None}) + "\n")
    client, _, _ = serve(serve=ServeConfig(slots=4, api_keys_file=str(file)))

    def ask(secret, scheme="Bearer"):
        headers = {"authorization": f"{scheme} {secret}"} if secret else {}
        return client.post("/v1/completions", json={"prompt": "the"}, headers=headers)

    for response in (ask(None), ask("dsv3-wrong"), ask(secrets["ann"], "Basic")):
        assert_error(response, 401, code="invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    assert [ask(secrets["ann"]).status_code for _ in range(3)] == [200, 200, 429]
    assert 1 <= int(ask(secrets["ann"]).headers["retry-after"]) <= 30
    assert [ask(secrets["bob"]).status_code for _ in range(4)] == [200] * 4
    for path in ("/v1/models", "/v1/models/tiny"):
        assert client.get(path).status_code == 401
    for path in ("/tokenize", "/detokenize", "/v1/chat/completions"):
        assert client.post(path, json={}).status_code == 401
    for path in ("/health", "/ready", "/metrics", "/stats", "/"):
        assert client.get(path).status_code == 200


def test_an_answer_past_its_deadline_is_ended(serve):
    client, backend, _ = serve(
        "the " * 200,
        tokens_per_step=1,
        step_seconds=0.02,
        serve=ServeConfig(slots=4, deadline_seconds=0.2),
    )
    body = {"prompt": "the", "max_tokens": 200}
    response = client.post("/v1/completions", json=body)
    assert_error(response, 408, code="deadline", says="0.2 s")
    assert response.headers["x-should-retry"] == "false"
    lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "deadline"
    wait_for(lambda: backend.open == 0)
    assert list(backend.finishes.values()) == [["cancelled"]] * 2


def test_draining_finishes_what_runs_and_takes_no_more(serve):
    client, backend, app = serve("the " * 60, tokens_per_step=1, step_seconds=0.01)
    api = app.state.api
    with client.stream(
        "POST", "/v1/completions", json={"prompt": "the", "max_tokens": 60, "stream": True}
    ) as running:
        wait_for(lambda: backend.open == 1)
        api.drain(30.0)
        response = client.post("/v1/completions", json={"prompt": "the"})
        assert_error(response, 503, code="draining")
        assert 1 <= int(response.headers["retry-after"]) <= 30
        assert client.get("/ready").status_code == 503
        assert client.get("/health").status_code == 200
        assert running.read().endswith(b"data: [DONE]\n\n")
    assert list(backend.finishes.values()) == [["length"]]


def test_health_and_ready(serve):
    client, backend, _ = serve()
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    backend.broken = "out of memory"
    assert_error(client.get("/health"), 503, code="engine_failed", says="out of memory")
    response = client.post("/v1/completions", json={"prompt": "the"})
    assert_error(response, 503, code="engine_failed")
    assert int(response.headers["retry-after"]) >= 1


def test_before_warm_up_it_is_up_but_not_ready(make):
    app, _ = make(warm_up_seconds=0.5)

    async def ask():
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            before = await client.get("/ready"), await client.get("/health")
            asked = await client.post("/v1/completions", json={"prompt": "the"})
            started = time.monotonic()
            while (await client.get("/ready")).status_code != 200:
                assert time.monotonic() - started < 5
                await asyncio.sleep(0.02)
            return *before, asked, await client.post("/v1/completions", json={"prompt": "the"})

    ready, health, asked, answered = asyncio.run(ask())
    assert (health.status_code, answered.status_code) == (200, 200)
    assert_error(ready, 503, code="warming_up")
    assert_error(asked, 503, code="warming_up")


def test_metrics_and_stats_count_what_happened(serve):
    client, _, _ = serve("the model " * 30, cached_tokens=1)
    for _ in range(3):
        client.post("/v1/completions", json={"prompt": "the model", "max_tokens": 10})
    client.post("/v1/completions", json={"prompt": ""})
    text = client.get("/metrics").text

    def value(name):
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])

    assert value("dsv3_time_to_first_token_seconds_count") == 3
    assert value("dsv3_time_per_token_seconds_count") == 3
    assert value("dsv3_request_seconds_count") == 3
    path = 'endpoint="/v1/completions"'
    assert value(f'dsv3_answers_total{{{path},finish="complete"}}') == 3
    assert value('dsv3_errors_total{status="400"}') == 1
    assert value("dsv3_cached_prompt_tokens_total") == 3
    assert value("dsv3_expert_load_max_over_mean") == 1.5  # of 1, 3, 2, 2
    assert value("dsv3_running") == value("dsv3_waiting") == 0
    stats = client.get("/stats").json()
    assert stats["tokens_per_second"] > 0
    assert stats["acceptance"] == 0.75  # 6 of 8
    assert 0 < stats["ttft_p50"] <= stats["ttft_p95"] < 5


def test_the_log_has_numbers_and_no_text(serve, caplog):
    client, _, _ = serve("the experts", cached_tokens=1)
    with caplog.at_level("INFO", "dsv3_jax.serve"):
        found = client.post("/v1/completions", json={"prompt": "secret words"}).json()
        client.post("/v1/completions", json={"prompt": "secret words", "n": 0})
    answered, refused = (record.fields for record in caplog.records)
    assert answered["event"] == "answered" and answered["id"] == found["id"]
    assert answered["prompt_tokens"] == found["usage"]["prompt_tokens"]
    assert answered["completion_tokens"] == found["usage"]["completion_tokens"]
    assert (answered["cached_tokens"], answered["reasons"]) == (1, ["stop"])
    assert 0 < answered["ttft_seconds"] <= answered["seconds"]
    assert refused == {
        "event": "refused",
        "path": "/v1/completions",
        "status": 400,
        "param": "n",
    }
    assert "secret" not in str([record.__dict__ for record in caplog.records])
