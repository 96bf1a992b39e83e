"""The scheduler as a state machine, driven by an engine that makes tokens up."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.serve.pages import PagePool
from dsv3_jax.serve.request import Request
from dsv3_jax.serve.scheduler import Scheduler

SIZE = 4
STOP = 7


def scheduler(slots=2, pages=6, devices=1, max_seq_len=20, keeps_prefixes=False) -> Scheduler:
    pools = [PagePool(pages, SIZE, keeps_prefixes=keeps_prefixes) for _ in range(devices)]
    return Scheduler(pools, slots, max_seq_len)


def request(name: str, prompt=5, max_tokens=4, stop=()) -> Request:
    tokens = tuple(range(10, 10 + prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Request(id=name, prompt=tokens, max_tokens=max_tokens, stop_tokens=stop)


def read_all(machine: Scheduler, tokens: int = 100) -> None:
    while any(plan := machine.chunks(tokens, 1)):
        for chunk in (chunk for chunks in plan for chunk in chunks):
            machine.was_read(chunk)


def test_a_prompt_is_read_up_to_its_last_token_in_chunks():
    machine = scheduler(max_seq_len=40, pages=10)
    machine.add(request("a", prompt=12))
    machine.admit()
    starts = []
    while machine.chunks(5, 1)[0]:
        (chunk,) = machine.chunks(5, 1)[0]
        starts.append((chunk.start, chunk.count))
        assert not machine.decoding(1)
        machine.was_read(chunk)
    assert starts == [(0, 5), (5, 5), (10, 1)]
    assert [s.request.id for s in machine.decoding(1)] == ["a"]


def test_first_come_first_served_and_slots_are_used_again():
    machine = scheduler()
    for name in "abc":
        machine.add(request(name, prompt=1, max_tokens=2))
    assert [s.request.id for s in machine.admit()] == ["a", "b"]
    first, _ = machine.decoding(1)
    assert machine.was_decoded(first, [1]).tokens == (1,)
    done = machine.was_decoded(first, [2])
    assert (done.finish, done.tokens) == ("length", (2,))
    assert [s.request.id for s in machine.admit()] == ["c"]
    assert machine.cancel("b")[0].finish == "cancelled" and not machine.cancel("b")
    machine.check()


def test_a_stop_token_ends_and_is_the_last_token():
    machine = scheduler()
    machine.add(request("a", prompt=1, max_tokens=9, stop=(STOP,)))
    machine.admit()
    (sequence,) = machine.decoding(3)
    output = machine.was_decoded(sequence, [1, STOP])
    assert (output.finish, output.tokens) == ("stop", (1, STOP))
    assert not machine.has_work and machine.pools[0].used == 0


def test_the_last_to_come_gives_its_pages_back_and_comes_again():
    machine = scheduler(slots=2, pages=5)
    machine.add(request("a", prompt=5, max_tokens=11))
    machine.add(request("b", prompt=3, max_tokens=17))
    machine.admit()
    read_all(machine)
    for token in range(6):
        for sequence in machine.decoding(1):
            machine.was_decoded(sequence, [token])
        machine.check()
        machine.admit()
    assert machine.preemptions == 1
    assert [s.request.id for s in machine.sequences] == ["a"]
    (waiting,) = machine.waiting
    assert waiting.request.id == "b" and waiting.made > 0 and waiting.cached == 0


def test_what_could_never_be_served_is_refused():
    machine = scheduler(pages=3, max_seq_len=100)
    with pytest.raises(
        ValueError, match="prompt tokens plus max_tokens is 13, expected at most 12"
    ):
        machine.check_request(request("a", prompt=5, max_tokens=8))
    machine.add(request("a"))
    with pytest.raises(ValueError, match="request id is 'a', expected one that is not running"):
        machine.add(request("a"))


def test_a_request_goes_to_the_device_that_knows_its_prompt():
    machine = scheduler(slots=2, devices=2, keeps_prefixes=True, pages=8)
    machine.add(request("a", prompt=9, max_tokens=1))
    machine.add(request("b", prompt=[1, 2, 3], max_tokens=1))
    machine.admit()
    assert {s.request.id: s.device for s in machine.sequences} == {"a": 0, "b": 1}
    read_all(machine)
    machine.add(request("c", prompt=9))
    (sequence,) = machine.admit()
    assert (sequence.device, sequence.found) == (0, 8)


@settings(max_examples=40)
@given(data=st.data())
def test_every_request_ends_once_with_all_its_tokens(data):
    """Whatever is admitted, preempted or cancelled in between, tokens come in order, none twice."""
    draw = data.draw
    machine = scheduler(
        slots=draw(st.integers(1, 3)),
        pages=draw(st.integers(5, 9)),
        devices=draw(st.integers(1, 2)),
        keeps_prefixes=draw(st.booleans()),
    )
    wanted, made, ended = {}, {}, {}
    for number in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        wanted[str(number)] = request(str(number), prompt, draw(st.integers(1, 10)))
        made[str(number)] = []
        machine.add(wanted[str(number)])

    def take(outputs):
        for output in outputs:
            made[output.id] += output.tokens
            if output.finish is not None:
                assert output.id not in ended
                ended[output.id] = output.finish

    while machine.has_work:
        if draw(st.integers(0, 9)) == 0:
            take(machine.cancel(draw(st.sampled_from(sorted(wanted)))))
        machine.admit()
        for chunk in (c for chunks in machine.chunks(3, 2) for c in chunks):
            assert chunk.count > 0
            machine.was_read(chunk)
        at_once = draw(st.integers(1, 3))
        for sequence in machine.decoding(at_once):
            left = sequence.request.max_tokens - sequence.made
            room = len(sequence.holding.pages) * SIZE
            assert room >= min(len(sequence.tokens) + at_once, sequence.limit)
            new = [sequence.made + i for i in range(min(at_once, left))]
            take(filter(None, [machine.was_decoded(sequence, new)]))
        machine.take_moves()
        machine.check()
    assert set(ended) == set(wanted)
    for name, tokens in made.items():
        assert tokens == list(range(len(tokens)))
        assert ended[name] == "cancelled" or len(tokens) == wanted[name].max_tokens
    assert all(pool.used == 0 for pool in machine.pools)
