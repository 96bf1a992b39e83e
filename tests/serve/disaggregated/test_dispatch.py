"""The dispatcher as a state machine, with units that a test makes up."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.serve.disaggregated.dispatch import MOST_ATTEMPTS, Dispatcher
from dsv3_jax.serve.disaggregated.messages import Kind
from dsv3_jax.serve.request import Output, Request

SIZE = 4


def request(name: str, prompt=(1, 2, 3, 4, 5)) -> Request:
    return Request(id=name, prompt=tuple(prompt), max_tokens=3)


def dispatcher(prefill=1, decode=1, credits=2) -> Dispatcher:
    machine = Dispatcher(SIZE)
    for kind, count in ((Kind.PREFILL, prefill), (Kind.DECODE, decode)):
        for number in range(count):
            machine.unit_ready(f"{kind}-{number}", kind, credits)
    return machine


def test_a_prompt_waits_until_a_decode_unit_has_room():
    machine = dispatcher(prefill=2)
    for name in "abc":
        machine.add(request(name))
    first, second = machine.assign()
    assert (first.request.id, second.request.id, machine.waiting) == ("a", "b", 1)
    machine.adopted(first.attempt)
    assert not machine.assign()  # prefill units have room, the decode unit has not
    assert machine.output(Output(id=second.attempt, tokens=(1,))).id == "b"
    done = machine.output(Output(id=first.attempt, tokens=(7,), finish="length", cached_tokens=4))
    assert (done.id, done.tokens, done.cached_tokens) == ("a", (7,), 4)
    assert [job.request.id for job in machine.assign()] == ["c"]
    machine.check()


def test_the_least_loaded_unit_or_the_one_that_has_read_the_beginning():
    machine = dispatcher(prefill=3, decode=2, credits=4)
    prompts = [(1, 2, 3, 4, 5), (9, 9, 9, 9, 9), (8, 8), (1, 2, 3, 4, 6), (8, 8)]
    for number, prompt in enumerate(prompts):
        machine.add(request(str(number), prompt))
    jobs = machine.assign()
    assert [job.prefill[-1] for job in jobs] == ["0", "1", "2", "0", "1"]
    assert [job.decode[-1] for job in jobs] == ["0", "1", "0", "1", "0"]


def test_a_lost_units_requests_go_on_at_another_of_its_kind():
    machine = dispatcher(decode=2)
    for name in "ab":
        machine.add(request(name))
    a, b = machine.assign()
    assert (a.decode, b.decode) == ("decode-0", "decode-1")
    machine.adopted(a.attempt)
    before = a.attempt
    machine.output(Output(id=before, tokens=(5,), cached_tokens=2))
    ended = machine.unit_lost("decode-0", "was killed")
    assert not ended.outputs and not ended.cancels
    assert machine.job_of(before) is None and machine.output(Output(id=before, tokens=(6,))) is None
    (again,) = machine.assign()
    assert (again.made, again.decode, again.request.id) == ([5], "decode-1", "a")
    assert again.for_units.id not in ("a", before)
    done = machine.output(Output(id=again.attempt, tokens=(6, 7), finish="length"))
    assert done.cached_tokens == 2  # what the first attempt said
    machine.check()


def test_requests_of_the_last_unit_of_a_kind_end_and_say_so():
    machine = dispatcher(credits=3)
    for name in "abcd":
        machine.add(request(name))
    a, b, c = machine.assign()
    machine.adopted(a.attempt)
    attempts = {job.request.id: job.attempt for job in (b, c)}
    ended = machine.unit_lost("prefill-0", "was killed by signal 9")
    assert {output.id: output.finish for output in ended.outputs} == {"b": "error", "c": "error"}
    assert "prefill-0 was killed by signal 9" in ended.outputs[0].error
    assert set(ended.cancels) == {("decode-0", attempt) for attempt in attempts.values()}
    assert machine.waiting == 1 and not machine.assign()  # d waits for the restart
    machine.unit_ready("prefill-0", Kind.PREFILL, 3)
    assert [job.request.id for job in machine.assign()] == ["d"]
    assert machine.output(Output(id=a.attempt, tokens=(1,))).tokens == (1,)


def test_who_has_begun_does_not_wait_for_a_restart():
    machine = dispatcher(decode=2, credits=1)
    for name in "abc":
        machine.add(request(name))
    (a,) = machine.assign()
    machine.adopted(a.attempt)
    (b,) = machine.assign()
    machine.adopted(b.attempt)
    assert not machine.unit_lost("decode-0", "was killed").outputs
    assert not machine.assign() and machine.waiting == 2  # a, which has begun, and c
    ended = machine.unit_lost("decode-1", "was killed")
    assert {output.id for output in ended.outputs} == {"a", "b"} and machine.waiting == 1
    machine.check()


def test_a_damaged_handover_is_read_again_and_not_for_ever():
    machine = dispatcher()
    machine.add(request("a"))
    attempts = set()
    for _ in range(MOST_ATTEMPTS):
        (job,) = machine.assign()
        attempts.add(job.attempt)
        ended = machine.not_handed_over(job.attempt, "another checksum")
    assert len(attempts) == MOST_ATTEMPTS and machine.retries == MOST_ATTEMPTS - 1
    (output,) = ended.outputs
    assert (output.id, output.finish) == ("a", "error") and "another checksum" in output.error
    assert not machine.assign() and not machine.waiting
    machine.check()


def test_after_a_failed_handover_another_decode_unit_is_preferred():
    machine = dispatcher(decode=2)
    machine.add(request("a"))
    (job,) = machine.assign()
    assert job.decode == "decode-0"
    machine.not_handed_over(job.attempt, "the connection has ended")
    assert [job.decode for job in machine.assign()] == ["decode-1"]
    machine.not_handed_over(job.attempt, "the connection has ended")
    machine.unit_lost("decode-0", "was killed")
    assert [job.decode for job in machine.assign()] == ["decode-1"]  # there is no other


def test_cancelled_where_it_is():
    machine = dispatcher(credits=1)
    for name in "ab":
        machine.add(request(name))
    (a,) = machine.assign()
    attempt = a.attempt
    assert machine.end("b", "cancelled").cancels == []
    ended = machine.end("a", "cancelled")
    assert ended.cancels == [("prefill-0", attempt), ("decode-0", attempt)]
    assert ended.outputs == [Output(id="a", finish="cancelled")]
    assert machine.end("a", "cancelled").outputs == [] and machine.cancelled == 2
    machine.add(request("a"))
    with pytest.raises(ValueError, match="request id is 'a', expected one that is not running"):
        machine.add(request("a"))


EVENTS = ["add", "adopt", "step", "fail", "lose", "ready", "cancel"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_request_ends_once_and_no_token_comes_twice(data):
    """Whatever units do: the answer of request n is n, n + 1, n + 2."""
    machine = dispatcher(prefill=2, decode=2)
    names = {Kind.PREFILL: ["prefill-0", "prefill-1"], Kind.DECODE: ["decode-0", "decode-1"]}
    finished, tokens, number = {}, {}, 0

    def note(outputs):
        for output in outputs:
            assert output.id not in finished
            tokens[output.id] = tokens.get(output.id, ()) + output.tokens
            if output.finish is not None:
                finished[output.id] = output.finish

    def step(job):
        made = int(job.request.id) + len(job.made)
        finish = "length" if len(job.made) == 2 else None
        note([machine.output(Output(id=job.attempt, tokens=(made,), finish=finish))])

    jobs = []
    for _ in range(data.draw(st.integers(1, 40))):
        live = [job for job in jobs if job.attempt and machine.job_of(job.attempt) is job]
        event = data.draw(st.sampled_from(EVENTS))
        if event == "add":
            machine.add(request(str(number)))
            number += 1
        elif event in ("lose", "ready"):
            kind = data.draw(st.sampled_from(list(Kind)))
            name = data.draw(st.sampled_from(names[kind]))
            if event == "lose":
                note(machine.unit_lost(name, "was lost").outputs)
            elif name not in machine.units(kind):
                machine.unit_ready(name, kind, 2)
        elif live:
            job = data.draw(st.sampled_from(live))
            if event == "adopt":
                machine.adopted(job.attempt)
            elif event == "fail":
                note(machine.not_handed_over(job.attempt, "reason").outputs)
            elif event == "cancel":
                note(machine.end(job.request.id, "cancelled").outputs)
            elif job.prefill is None:
                step(job)
        jobs += machine.assign()
        machine.check()
    note(machine.end_all("cancelled").outputs)
    assert set(finished) == {str(n) for n in range(number)}
    for name, made in tokens.items():
        assert made == tuple(range(int(name), int(name) + len(made)))
        assert finished[name] != "length" or len(made) == 3
