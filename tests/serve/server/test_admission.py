"""Who gets in, by a clock that the test turns."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_jax.serve.server.admission import Admission, Bucket, Limits
from dsv3_jax.serve.server.errors import ApiError
from dsv3_jax.serve.server.keys import Key

HASH = "0" * 64


def admission(keys=(), **limits):
    return Admission(Limits(**{"slots": 4, "max_queue": 4, **limits}), keys, now=0.0)


def refused(admission, now, *, key=None, prompt=10, most=10, choices=1):
    with pytest.raises(ApiError) as caught:
        admission.admit(key, prompt, most, choices, now)
    return caught.value


def admit(admission, now, *, key=None, prompt=10, most=10, choices=1):
    return admission.admit(key, prompt, most, choices, now)


def finish(admission, ticket, now, tokens=1):
    admission.made(ticket, 0, tokens, now)
    admission.ended(ticket, 0, now)
    admission.settle(ticket, tokens, now)


@given(
    takes=st.lists(st.tuples(st.floats(0, 40), st.floats(0, 20)), max_size=30),
    per_minute=st.floats(20, 1000),
)
def test_a_bucket_never_gives_more_than_its_rate_and_a_minutes_store(takes, per_minute):
    bucket, now, taken = Bucket(per_minute, now=0.0), 0.0, 0.0
    for wait, amount in takes:
        now += wait
        amount = min(amount, per_minute)
        now += bucket.seconds_until(amount, now)
        assert bucket.seconds_until(amount, now) == pytest.approx(0, abs=1e-6)
        bucket.take(amount, now)
        taken += amount
        assert taken <= per_minute * (1 + now / 60) * (1 + 1e-9)


def test_what_was_not_used_comes_back_but_no_more_than_a_minutes():
    bucket = Bucket(60.0, now=0.0)
    bucket.take(60.0, 0.0)
    bucket.give(20.0, 0.0)
    assert bucket.seconds_until(30.0, 0.0) == 10
    bucket.give(1000.0, 0.0)
    assert bucket.seconds_until(60.0, 0.0) == 0
    bucket.take(60.0, 0.0)
    assert bucket.seconds_until(1.0, 0.0) == 1


def test_retry_after_of_a_request_budget_is_the_truth():
    gate = admission([Key(name="a", sha256=HASH, requests_per_minute=6.0)])
    for _ in range(6):
        finish(gate, admit(gate, 0.0, key="a"), 0.0)
    error = refused(gate, 0.0, key="a")
    assert (error.status, error.retry_after, error.reason) == (429, 10, "requests_per_minute")
    assert refused(gate, 9.0, key="a").retry_after == 1
    admit(gate, 10.0, key="a")
    admit(gate, 0.0, key="b")  # who has no budget is not bound by another's


def test_retry_after_of_a_token_budget_is_the_truth():
    gate = admission([Key(name="a", sha256=HASH, tokens_per_minute=600.0)])
    ticket = admit(gate, 0.0, key="a", prompt=100, most=500)
    error = refused(gate, 0.0, key="a", prompt=100, most=100)
    assert (error.retry_after, error.reason) == (20, "tokens_per_minute")
    assert refused(gate, 19.0, key="a", prompt=100, most=100).retry_after == 1
    finish(gate, ticket, 19.0, tokens=50)  # 450 of what was reserved comes back
    admit(gate, 19.0, key="a", prompt=100, most=500)


def test_a_request_refused_for_its_tokens_has_cost_no_request():
    key = Key(name="a", sha256=HASH, requests_per_minute=2.0, tokens_per_minute=100.0)
    gate = admission([key])
    admit(gate, 0.0, key="a", prompt=50, most=50)
    for _ in range(5):
        assert refused(gate, 0.0, key="a").reason == "tokens_per_minute"
    admit(gate, 60.0, key="a", prompt=50, most=50)


def test_a_prompt_over_the_whole_budget_is_a_400_and_a_long_answer_is_not():
    gate = admission([Key(name="a", sha256=HASH, tokens_per_minute=100.0)])
    error = refused(gate, 0.0, key="a", prompt=101)
    assert (error.status, error.param) == (400, "prompt")
    admit(gate, 0.0, key="a", prompt=50, most=10_000)


def test_the_queue_is_bound_by_choices():
    gate = admission(slots=2, max_queue=3)
    tickets = [admit(gate, 0.0, choices=2), admit(gate, 0.0, choices=3)]
    assert gate.in_flight == 5
    error = refused(gate, 1.0)
    assert (error.status, error.reason) == (429, "queue_full") and error.retry_after >= 1
    gate.made(tickets[0], 0, 1, 1.0)
    gate.ended(tickets[0], 0, 2.0)
    admit(gate, 2.0)
    error = refused(gate, 2.0, choices=6)
    assert (error.status, error.param) == (400, "n")  # it would never fit


def test_retry_after_of_a_full_queue_follows_how_fast_answers_end():
    gate = admission(slots=1, max_queue=0)
    now = 0.0
    for _ in range(6):  # one each 10 s
        ticket = admit(gate, now)
        now += 10
        finish(gate, ticket, now)
    admit(gate, now)
    assert refused(gate, now).retry_after == pytest.approx(10, abs=2)


def test_counts_return_to_nothing_however_a_choice_ends():
    gate = admission()
    ticket = admit(gate, 0.0, choices=3)
    gate.made(ticket, 1, 2, 0.5)
    assert (gate.waiting, gate.running) == (2, 1)
    for index in range(3):
        gate.ended(ticket, index, 1.0)
    assert (gate.waiting, gate.running, gate.in_flight) == (0, 0, 0)
    never_began = admit(gate, 2.0, prompt=500)
    gate.ended(never_began, 0, 3.0)
    assert gate.expected_ttft(10, 1, 3.0) == admission_like(gate)


def admission_like(gate):
    """The same after an answer that never waited behind those 500 tokens."""
    fresh = admission()
    ticket = admit(fresh, 0.0, choices=3)
    fresh.made(ticket, 1, 2, 0.5)
    return fresh.expected_ttft(10, 1, 3.0)


def test_draining_refuses_all_with_the_time_left():
    gate = admission()
    gate.drains_until = 30.0
    error = refused(gate, 12.5)
    assert (error.status, error.retry_after, error.reason) == (503, 18, "draining")


def simulate(gate, *, tokens_per_second, step_seconds, seconds, arrivals_per_second, prompt):
    """A machine that reads prompts one after another and decodes all running ones together.

    Its step takes `step_seconds` for each running answer. The times to first tokens and per token
    that admitted requests saw, and how many were refused.
    """
    now, queue, running, ttfts, tpots, refusals = 0.0, [], [], [], [], 0
    next_arrival, reading_until, step = 0.0, 0.0, 0.0
    while now < seconds:
        while next_arrival <= now:
            next_arrival += 1 / arrivals_per_second
            try:
                queue.append(gate.admit(None, prompt, 20, 1, now))
            except ApiError as error:
                assert error.status == 429 and error.retry_after >= 1
                refusals += 1
        while queue and reading_until <= now:
            reading_until = max(reading_until, now - step) + prompt / tokens_per_second
            ticket = queue.pop(0)
            running.append([ticket, 20, reading_until, None])
        step = max(step_seconds * len(running), 0.004)
        now += step
        for entry in list(running):
            ticket, left, starts, last = entry
            if starts > now:
                continue
            gate.made(ticket, 0, 1, now)
            if last is None:
                ttfts.append(now - ticket.admitted_at)
            else:
                tpots.append(now - last)
            entry[1], entry[3] = left - 1, now
            if entry[1] == 0:
                gate.ended(ticket, 0, now)
                running.remove(entry)
    return ttfts, tpots, refusals


def p95(values):
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


LOAD = dict(tokens_per_second=1000, step_seconds=0.004, seconds=30, prompt=100)


def test_a_target_for_the_first_token_is_kept_where_without_one_it_is_not():
    """150 % of what the machine reads arrives: without a target the queue grows without end."""
    load = {**LOAD, "arrivals_per_second": 15}
    free = simulate(admission(slots=64, max_queue=10_000), **load)
    kept = simulate(admission(slots=64, max_queue=10_000, ttft_seconds=1.0), **load)
    assert free[2] == 0 and p95(free[0]) > 5
    assert p95(kept[0]) <= 1.0 * 1.1  # quantiles are right to 9 %
    assert len(kept[0]) > 0.5 * 30 * 10  # and more than half of what the machine can do is done


def test_a_target_for_each_token_bounds_how_many_run():
    """4 ms a running answer: under 50 ms there may be 12."""
    load = {**LOAD, "tokens_per_second": 100_000, "arrivals_per_second": 25}
    free = simulate(admission(slots=64, max_queue=10_000), **load)
    kept = simulate(admission(slots=64, max_queue=10_000, tpot_seconds=0.05), **load)
    assert p95(free[1]) > 0.1
    assert p95(kept[1]) <= 0.05 * 1.1
    assert len(kept[0]) > 0.5 * 30 * 12.5  # 1 / 4 ms tokens a second can be made, 20 for each


def test_with_nothing_in_flight_a_request_is_always_admitted():
    gate = admission(ttft_seconds=0.1)
    finish(gate, admit(gate, 0.0, prompt=1000), 5.0)  # it took far longer
    ticket = admit(gate, 5.0, prompt=1000)
    error = refused(gate, 5.0)
    assert (error.reason, error.status) == ("slo_ttft", 429) and 1 <= error.retry_after <= 60
    finish(gate, ticket, 10.0)
    admit(gate, 10.0)
