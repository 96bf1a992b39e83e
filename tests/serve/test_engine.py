"""The engine against `generate`, which knows no pages, no slots and no guesses."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig, ServeConfig
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.engine_thread import EngineThread
from dsv3_jax.serve.generate import generate
from dsv3_jax.serve.request import Output, Request, SamplingParams
from tests.programs import QUICK, quick_jit
from tests.serve.disaggregated.tiny import WHOLE as CONFIG

SERVE = ServeConfig(slots=4, page_size=8, prefill_chunk=32, decode_steps=2, max_seq_len=96)
MOST_TOKENS = 40


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, rngs=nnx.Rngs(0))


def make(model: Transformer, **changes) -> Engine:
    engine = Engine(model, dataclasses.replace(SERVE, **changes), compiler_options=QUICK)
    engine.warm_up()
    return engine


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """With guesses, kept prefixes, and too few pages for all slots at their longest."""
    return make(model, pages=13, host_pages=4)


def run(engine: Engine, requests: list[Request], arrivals=None, cancel=()) -> dict[str, list[int]]:
    """The tokens of each request; request i arrives before step arrivals[i], and those of `cancel`
    are given up a few steps later."""
    arrivals = arrivals if arrivals is not None else [0] * len(requests)
    waiting = sorted(zip(arrivals, range(len(requests)), requests, strict=True))
    tokens, finishes, step = {r.id: [] for r in requests}, {}, 0
    while waiting or engine.has_work:
        while waiting and waiting[0][0] <= step:
            engine.submit(waiting.pop(0)[2])
        for name in cancel:
            if step == arrivals[int(name)] + 3:
                engine.cancel(name)
        for output in engine.step():
            assert output.id not in finishes
            tokens[output.id] += output.tokens
            if output.finish is not None:
                finishes[output.id] = output.finish
        engine.scheduler.check()
        step += 1
    assert set(finishes) == set(tokens)
    assert {n for n, finish in finishes.items() if finish == "cancelled"} <= set(cancel)
    return {n: t for n, t in tokens.items() if finishes[n] != "cancelled"}


def expected(model: Transformer, *requests: Request) -> dict[str, list[int]]:
    """`generate`'s answers: greedy ones in one batch, of others each alone."""
    answers = {}
    greedy = [r for r in requests if not r.sampling.temperature]
    if greedy:
        found = generate(model, [list(r.prompt) for r in greedy], MOST_TOKENS)
        answers = {r.id: tokens for r, tokens in zip(greedy, found, strict=True)}
    for request in (r for r in requests if r.sampling.temperature):
        s = request.sampling
        options = dict(temperature=s.temperature, top_p=s.top_p, top_k=s.top_k, seed=s.seed)
        (answers[request.id],) = generate(model, [list(request.prompt)], MOST_TOKENS, **options)
    return {r.id: answers[r.id][: r.max_tokens] for r in requests}


def random_requests(count: int, seed: int, samplings) -> list[Request]:
    """Half of them begin alike. Those that are not greedy are of one length, for `generate`."""
    rng = np.random.default_rng(seed)
    beginning = rng.integers(0, 64, 60).tolist()
    requests = []
    for number in range(count):
        sampling = samplings[number % len(samplings)]
        length = 40 if sampling.temperature else int(rng.integers(1, 50))
        alone = rng.integers(0, 64, length).tolist()
        shared = int(rng.integers(0, length)) if number % 2 else 0
        requests.append(
            Request(
                id=str(number),
                prompt=tuple(beginning[:shared] + alone[shared:]),
                max_tokens=int(rng.integers(1, MOST_TOKENS)),
                sampling=sampling,
            )
        )
    return requests


def test_answers_are_generates_whatever_else_is_served(model, engine):
    """Random arrivals, lengths and cancellations, prefixes found again, pages that run out."""
    greedy, drawn = SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=5)
    requests = random_requests(16, 0, [greedy, greedy, drawn])
    arrivals = np.random.default_rng(1).integers(0, 30, 16).tolist()
    compiled = engine.runner.compilations
    before = engine.statistics()
    found = run(engine, requests, arrivals, cancel=("3", "8"))
    answers = expected(model, *requests)
    assert len(found) >= 14 and found == {name: answers[name] for name in found}
    after = engine.statistics()
    assert engine.runner.compilations == compiled
    assert after.preemptions > before.preemptions
    assert after.cached_prompt_tokens > before.cached_prompt_tokens
    assert after.drafted_tokens > after.accepted_tokens > 0
    assert (after.running, after.waiting, after.pages_used) == (0, 0, 0)


@pytest.mark.slow
def test_sixty_four_requests_some_given_up(model, engine):
    requests = random_requests(64, 11, [SamplingParams()])
    arrivals = np.random.default_rng(2).integers(0, 120, 64).tolist()
    found = run(engine, requests, arrivals, cancel=("3", "17", "40", "55"))
    answers = expected(model, *requests)
    assert len(found) >= 60 and found == {name: answers[name] for name in found}


def test_nothing_is_compiled_while_requests_run(engine):
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event)  # noqa: E731
    run(engine, random_requests(4, 7, [SamplingParams(), SamplingParams(temperature=1.0, seed=3)]))
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        run(engine, random_requests(6, 8, [SamplingParams(), SamplingParams(temperature=1.0)]))
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [event for event in compiled if "backend_compile" in event]


def test_a_step_reads_as_often_as_the_pace_allows(model, engine, monkeypatch):
    asked = []

    def choose(left, decoding, spent):
        asked.append((left, decoding, spent > 0))
        return (1, 8) if len(asked) < 3 else None

    requests = [Request(id=str(i), prompt=(7 + i, *range(20, 28)), max_tokens=3) for i in range(3)]
    for request in requests:
        engine.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(engine._pace, "choose", choose)
        outputs = engine.step()
    assert asked == [([[8, 8, 8]], 0, False), ([[8, 8]], 1, True), ([[8]], 2, True)]
    assert {output.id for output in outputs} == {"0", "1"}  # one has its prompt to read
    found = {output.id: list(output.tokens) for output in outputs}
    while engine.has_work:
        for output in engine.step():
            found[output.id] = found.get(output.id, []) + list(output.tokens)
    assert found == expected(model, *requests)


def test_a_wrong_latent_would_be_seen(model, engine):
    """The negative control: another page's content, and the answer is another."""
    request = random_requests(1, 4, [SamplingParams()])[0]
    request = dataclasses.replace(request, prompt=tuple(range(40)), max_tokens=20)
    good = run(engine, [request])["0"]
    engine.submit(request)
    engine.step()
    (sequence,) = engine.scheduler.sequences
    pages = sequence.holding.pages[:2]
    content = engine.runner.read_pages(pages)
    engine.runner.write_pages(pages, np.zeros_like(content))
    tokens = []
    while engine.has_work:
        tokens += [t for output in engine.step() for t in output.tokens]
    engine.runner.write_pages(pages, content)  # kept pages go on being what they say
    assert tokens != good[-len(tokens) :]


def test_stop_tokens_end_an_answer(model, engine):
    prompt = tuple(range(20, 30))
    whole = run(engine, [Request(id="a", prompt=prompt, max_tokens=30)])["a"]
    stop = whole[7]
    stopping = Request(id="a", prompt=prompt, max_tokens=30, stop_tokens=(63, stop))
    assert run(engine, [stopping])["a"] == whole[: whole.index(stop) + 1]


def test_edits_and_logprobs_are_the_definitions(model, engine):
    """Against NumPy on the whole text's logits, beside a request without any."""
    edited = SamplingParams(
        presence_penalty=0.7,
        frequency_penalty=0.4,
        repetition_penalty=1.3,
        logit_bias=((5, 4.0), (9, -100.0)),
        logprobs=3,
    )
    request = Request(id="a", prompt=(9, 5, 33, 2), max_tokens=12, sampling=edited)
    plain = Request(id="b", prompt=(1, 2, 3), max_tokens=9)
    outputs, logprobs = {"a": [], "b": []}, []
    for each in (request, plain):
        engine.submit(each)
    while engine.has_work:
        for output in engine.step():
            outputs[output.id] += output.tokens
            logprobs += output.logprobs
    assert outputs["b"] == expected(model, plain)["b"]
    forward = quick_jit(lambda model, row: model(row))
    text = list(request.prompt)
    for token, found in zip(outputs["a"], logprobs, strict=True):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(text)] = text
        logits = np.asarray(forward(model, jnp.asarray(row))[0, len(text) - 1], np.float64)
        exact = logits - np.log(np.sum(np.exp(logits)))
        assert (found.token, len(found.top)) == (token, 3)
        np.testing.assert_allclose(found.logprob, exact[token], atol=1e-4)
        assert [t for t, _ in found.top] == np.argsort(-exact)[:3].tolist()
        answer = text[len(request.prompt) :]
        for t in set(text):
            logits[t] = logits[t] / 1.3 if logits[t] > 0 else logits[t] * 1.3
        for t in set(answer):
            logits[t] -= 0.7 + 0.4 * answer.count(t)
        logits[5] += 4.0
        logits[9] -= 100.0
        assert token == int(np.argmax(logits))
        text.append(token)


class Alternating:
    """A grammar: even tokens, then odd ones."""

    def __init__(self):
        self.accepted = []

    def allowed(self):
        is_allowed = np.arange(64) % 2 == len(self.accepted) % 2
        return (is_allowed.reshape(-1, 32) << np.arange(32)).sum(axis=1).astype(np.uint32)

    def accept(self, token):
        self.accepted.append(token)


def test_a_grammar_is_followed(model, engine):
    constraint = Alternating()
    request = Request(id="a", prompt=(1, 2), max_tokens=9, constraint=constraint)
    other = Request(id="b", prompt=(4, 4, 4), max_tokens=9)
    found = run(engine, [request, other])
    assert found["a"] == constraint.accepted
    assert [token % 2 for token in found["a"]] == [0, 1] * 4 + [0]
    assert found["b"] == expected(model, other)["b"]


class Receiver:
    """Collects what a backend delivers, and waits for requests to end."""

    def __init__(self):
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Output] = {}
        self._changed = threading.Condition()

    def __call__(self, outputs: list[Output]) -> None:
        with self._changed:
            for output in outputs:
                self.tokens.setdefault(output.id, []).extend(output.tokens)
                if output.finish is not None:
                    assert output.id not in self.ended
                    self.ended[output.id] = output
            self._changed.notify_all()

    def wait(self, *names: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: set(names) <= set(self.ended), timeout=120)


def test_a_thread_serves_cancels_and_ends(model, engine, monkeypatch):
    monkeypatch.setattr(engine, "warm_up", lambda: None)  # it has
    thread, receiver = EngineThread(engine), Receiver()
    thread.start(receiver)
    request = Request(id="a", prompt=(3, 1, 4), max_tokens=20)
    with pytest.raises(ValueError, match="prompt tokens plus max_tokens is 203, expected at most"):
        thread.submit(dataclasses.replace(request, max_tokens=200))
    thread.submit(request)
    receiver.wait("a")
    assert receiver.tokens["a"] == expected(model, request)["a"]
    thread.submit(dataclasses.replace(request, id="b", max_tokens=80))
    thread.cancel("b")
    receiver.wait("b")
    thread.submit(dataclasses.replace(request, id="c", max_tokens=80))
    thread.stop()
    receiver.wait("c")
    assert {receiver.ended[name].finish for name in "bc"} <= {"cancelled", "length"}
    assert thread.failure() is None
    with pytest.raises(ValueError, match="the engine has ended: it was stopped"):
        thread.submit(request)
    for name in "bc":
        engine.cancel(name)
    engine.step()


def test_a_failed_step_ends_all_requests_with_its_reason(engine, monkeypatch):
    monkeypatch.setattr(engine, "warm_up", lambda: None)
    thread, receiver = EngineThread(engine), Receiver()

    def fail():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "step", fail)
    thread.start(receiver)
    thread.submit(Request(id="a", prompt=(3, 1, 4), max_tokens=20))
    receiver.wait("a")
    assert (receiver.ended["a"].finish, thread.failure()) == (
        "error",
        "RuntimeError: out of memory",
    )
    assert receiver.ended["a"].error == thread.failure()
    with pytest.raises(ValueError, match="the engine has ended: RuntimeError: out of memory"):
        thread.submit(Request(id="b", prompt=(3,), max_tokens=2))
    monkeypatch.undo()
    engine.cancel("a")
    engine.step()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(speculative=False),
        dict(prefix_cache=False, decode_steps=3, slots=3),
        dict(page_size=16, prefill_chunk=5),
    ],
    ids=str,
)
def test_the_same_in_other_settings(model, changes):
    engine = make(model, **changes)
    requests = random_requests(12, 2, [SamplingParams(), SamplingParams(temperature=1.0, seed=9)])
    found = run(engine, requests, arrivals=list(range(12)))
    assert found == expected(model, *requests)


@pytest.mark.slow
def test_an_fp8_cache_is_656_bytes_a_token_and_layer_and_close(model):
    """Of DeepSeek-V3; here its answers begin as FP32's do."""
    from dsv3_jax.model.cache import row_bytes

    assert row_bytes(ModelConfig(), "fp8") == 656 and row_bytes(ModelConfig(), "bf16") == 1152
    engine = make(model, cache_dtype="fp8")
    # 16 values in FP8, one FP32 scale, 8 rotary values in BF16; three layers have pages.
    assert engine.statistics().cache_bytes_per_token == 3 * (16 + 4 + 16)
    requests = random_requests(8, 3, [SamplingParams()])
    found = run(engine, requests)
    answers = expected(model, *requests)
    same = [found[name][:1] == answers[name][:1] for name in found]
    assert np.mean(same) > 0.7
