"""The `openai` client against a live server: what it returns is what the script says."""

import json
from itertools import chain

import openai
import pytest

from tests.serve.server.live import serving, wait_for

ANSWER = "the experts returns é漢🙂 to the model"
CHAT = [{"role": "user", "content": "the model?"}]


@pytest.fixture
def connect(make):
    """connect(text, ...) -> (client, backend), until the test's end."""
    opened = []

    def start(text=ANSWER, **options):
        app, backend = make(text, **options)
        context = serving(app)
        url = context.__enter__()
        opened.append((context, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)))
        return opened[-1][1], backend

    yield start
    for context, client in opened:
        client.close()
        context.__exit__(None, None, None)


def test_a_completion(connect, tokenizer):
    client, backend = connect(cached_tokens=2)
    found = client.completions.create(model="tiny", prompt="the model", max_tokens=100)
    tokens = tokenizer.encode(ANSWER)
    assert found.object == "text_completion" and found.model == "tiny"
    assert found.choices[0].text == ANSWER
    assert found.choices[0].finish_reason == "stop"
    assert found.usage.prompt_tokens == len(tokenizer.encode("the model"))
    assert found.usage.completion_tokens == len(tokens) + 1  # the end token counts
    assert found.usage.total_tokens == found.usage.prompt_tokens + len(tokens) + 1
    assert found.usage.prompt_tokens_details.cached_tokens == 2
    assert backend.requests[0].prompt == tuple(tokenizer.encode("the model"))
    assert backend.requests[0].sampling.temperature == 1.0
    assert backend.requests[0].stop_tokens == (tokenizer.eos_id,)


def test_completions_have_16_tokens_and_chats_what_is_left(connect, tokenizer):
    client, _ = connect("the model " * 99, max_seq_len=64)
    found = client.completions.create(model="tiny", prompt="the")
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (16, "length")
    found = client.chat.completions.create(model="tiny", messages=CHAT)
    assert found.usage.total_tokens == 64
    assert found.choices[0].finish_reason == "length"


def test_a_streamed_completion_joins_to_the_whole(connect):
    client, _ = connect(tokens_per_step=1)
    options = dict(model="tiny", prompt="the", max_tokens=100, logprobs=2)
    whole = client.completions.create(**options).choices[0]
    chunks = list(client.completions.create(**options, stream=True))
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["stop"]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(c.choices[0].logprobs, name) for c in chunks if c.choices[0].logprobs]
        assert [*chain.from_iterable(parts)] == getattr(whole.logprobs, name)


def test_several_prompts_with_several_choices(connect, tokenizer):
    client, backend = connect()
    prompts = ["the", "model", "é"]
    found = client.completions.create(model="tiny", prompt=prompts, n=2, seed=7, temperature=0.5)
    assert [choice.index for choice in found.choices] == list(range(6))
    by_id = {request.id.rpartition("-")[2]: request for request in backend.requests}
    for index in range(6):
        assert by_id[str(index)].prompt == tuple(tokenizer.encode(prompts[index // 2]))
        assert by_id[str(index)].sampling.seed == 7 + index
    total = sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert found.usage.prompt_tokens == total
    one, several = [6, 7, 8], [[6, 7], [9]]
    client.completions.create(model="tiny", prompt=one)
    client.completions.create(model="tiny", prompt=several)
    assert [request.prompt for request in backend.requests[6:]] == [(6, 7, 8), (6, 7), (9,)]


def test_without_a_seed_two_answers_have_two(connect):
    client, backend = connect()
    for _ in range(2):
        client.completions.create(model="tiny", prompt="the")
    assert backend.requests[0].sampling.seed != backend.requests[1].sampling.seed


def test_a_chat(connect, tokenizer):
    client, backend = connect()
    found = client.chat.completions.create(model="tiny", messages=CHAT)
    assert found.object == "chat.completion"
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].message.content == ANSWER
    prompt = "User: the model?\n\nAssistant:"  # the documented fallback
    assert tokenizer.decode(backend.requests[0].prompt) == prompt
    assert found.usage.prompt_tokens == len(backend.requests[0].prompt)


def test_a_streamed_chat_of_three_choices_with_usage(connect):
    client, _ = connect()
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, n=3, stream=True, stream_options={"include_usage": True}
    )
    texts, roles, finishes, usages = {}, [], [], []
    for chunk in stream:
        if chunk.usage is not None:
            usages.append((chunk.usage, list(chunk.choices)))
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            roles += [choice.delta.role] if choice.delta.role else []
            finishes += [choice.finish_reason] if choice.finish_reason else []
    assert texts == dict.fromkeys(range(3), ANSWER)
    assert roles == ["assistant"] * 3 and finishes == ["stop"] * 3
    [(usage, choices)] = usages
    assert choices == [] and usage.total_tokens > usage.completion_tokens > 0


def test_logprobs_of_a_chat_give_tokens_and_their_bytes(connect, tokenizer):
    client, _ = connect()
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, logprobs=True, top_logprobs=3
    )
    content = found.choices[0].logprobs.content
    assert bytes(chain.from_iterable(each.bytes for each in content)) == ANSWER.encode()
    assert len(content) == len(tokenizer.encode(ANSWER))  # without the end token
    assert [each.logprob for each in content[0].top_logprobs] == pytest.approx([-0.7, -1.4, -2.1])
    assert content[0].top_logprobs[0].token == content[0].token
    found = client.chat.completions.create(model="tiny", messages=CHAT, logprobs=True)
    assert found.choices[0].logprobs.content[0].top_logprobs == []
    assert client.chat.completions.create(model="tiny", messages=CHAT).choices[0].logprobs is None


def test_logprobs_of_a_completion_say_where_in_the_text_tokens_are(connect, tokenizer):
    client, _ = connect("the model of é")
    found = client.completions.create(model="tiny", prompt="the", logprobs=1, max_tokens=50)
    logprobs = found.choices[0].logprobs
    texts = [tokenizer.decode([token]) for token in tokenizer.encode("the model of é")]
    for text, token, offset in zip(texts, logprobs.tokens, logprobs.text_offset, strict=True):
        if "\N{REPLACEMENT CHARACTER}" not in text:
            assert token == text
            assert found.choices[0].text[offset:].startswith(text)
        else:
            assert token.startswith("bytes:\\x")
    assert logprobs.token_logprobs == [pytest.approx(-0.7)] * len(texts)
    assert all(len(top) == 1 for top in logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_its_request(connect, stream):
    client, backend = connect("one two three " * 20, tokens_per_step=1, step_seconds=0.002)
    found = client.completions.create(
        model="tiny", prompt="the", max_tokens=200, stop=["never", "three"], stream=stream
    )
    if stream:
        chunks = list(found)
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        text = found.choices[0].text
        assert found.choices[0].finish_reason == "stop"
        assert found.usage.completion_tokens < 200
    assert text == "one two "
    wait_for(lambda: backend.open == 0)
    assert list(backend.finishes.values()) == [["cancelled"]]


def test_the_fallback_template_stops_before_the_next_turn(connect):
    client, _ = connect("the model\nUser: to")
    found = client.chat.completions.create(model="tiny", messages=CHAT)
    assert found.choices[0].message.content == "the model"


def test_json_by_a_schema_whatever_the_model_would_say(connect):
    client, backend = connect("the experts", max_seq_len=2000)
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["model", "expert"]},
            "size": {"type": "integer", "minimum": 10, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["kind", "size", "tags"],
        "additionalProperties": False,
    }
    found = client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        n=2,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    for choice in found.choices:
        value = json.loads(choice.message.content)
        assert set(value) == {"kind", "size", "tags"}
        assert value["kind"] in ("model", "expert") and 10 <= value["size"] <= 99
        assert [type(tag) for tag in value["tags"]] == [bool, bool]
        assert choice.finish_reason == "stop"
    assert set(map(tuple, backend.finishes.values())) == {("stop",)}


def test_json_without_a_schema_is_an_object(connect):
    client, _ = connect('{"a": 1, "b": [true]}')
    found = client.chat.completions.create(
        model="tiny", messages=CHAT, response_format={"type": "json_object"}
    )
    assert json.loads(found.choices[0].message.content) == {"a": 1, "b": [True]}


def test_parameters_reach_the_engine(connect):
    client, backend = connect()
    client.chat.completions.create(
        model="tiny",
        messages=CHAT,
        temperature=0.3,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"7": -100, "9": 2.5},
        seed=-1,
        max_completion_tokens=3,
        user="somebody",
        store=False,
        extra_body={"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    request = backend.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        *(0.3, 0.9),
        *(5, 0.05),
    )
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.repetition_penalty == 1.2
    assert sampling.logit_bias == ((7, -100.0), (9, 2.5))
    assert sampling.seed == 2**32 - 1
    assert (request.max_tokens, request.stop_tokens) == (3, ())


def test_echo_gives_the_prompt_too(connect):
    client, _ = connect("of", tokens_per_step=1)
    options = dict(model="tiny", prompt=["the model ", "é"], echo=True, max_tokens=1)
    found = client.completions.create(**options)
    assert [choice.text for choice in found.choices] == ["the model of", "éof"]
    texts = ["", ""]
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["the model of", "éof"]


def test_a_suffix_is_filled_in_before(connect, tokenizer):
    client, backend = connect()
    client.completions.create(model="tiny", prompt="the ", suffix=" of")
    marks = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    before, after = tokenizer.encode("the "), tokenizer.encode(" of")
    assert list(backend.requests[0].prompt) == [marks[0], *before, marks[1], *after, marks[2]]


def test_models(connect):
    client, _ = connect()
    [model] = client.models.list().data
    assert model.id == "tiny" and model.max_model_len == 256
    assert model.chat_template == "fallback"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/one")
    assert caught.value.code == "model_not_found"


def test_errors_are_the_clients_own(connect):
    client, _ = connect()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="the", max_tokens=5000)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="the")


def test_an_engines_error_ends_the_answer(connect):
    client, backend = connect("the model " * 20, fail_after=4)
    with pytest.raises(openai.InternalServerError, match="a unit has died"):
        client.completions.create(model="tiny", prompt="the", max_tokens=50)
    with pytest.raises(openai.APIError, match="a unit has died"):
        list(client.completions.create(model="tiny", prompt="the", max_tokens=50, stream=True))
    backend.fail_after = None
    assert client.completions.create(model="tiny", prompt="the").choices[0].text
