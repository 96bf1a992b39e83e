"""How much is read and decoded at a time: by hand."""

import pytest

from dsv3_jax.serve.pace import CALL_SECONDS, FIRST_STEPS, FULL_CALL_SECONDS, READ_SHARE, Pace

SMALL, LARGE, WIDE = (1, 16), (1, 64), (4, 16)


def leave(pace: Pace, seconds: float) -> None:
    """Decodes for so long that there are so many seconds to read in."""
    pace.was_decoded("any", 4, seconds / READ_SHARE)


def paced() -> Pace:
    """Reading takes 4 ms for 16 tokens, 8 for 64, 9 for four times 16; there are 10 ms for that."""
    pace = Pace([SMALL, LARGE, WIDE])
    for shape, seconds in ((SMALL, 0.004), (LARGE, 0.008), (WIDE, 0.009)):
        pace.was_read(shape, seconds)
    leave(pace, 0.010)
    return pace


def test_the_shape_that_reads_most():
    pace = paced()
    assert pace.choose([[100]], decoding=0) == LARGE
    assert pace.choose([[10]], decoding=0) == SMALL
    assert pace.choose([[16, 16, 16, 16]], decoding=0) == WIDE
    assert pace.choose([[16], [16]], decoding=0) == SMALL  # of two devices, one row each


def test_others_do_not_wait_longer_than_for_a_step():
    pace = paced()
    leave(pace, 0.005)  # 10 ms falls to 9
    leave(pace, 0.005)
    assert pace.choose([[100]], decoding=3) == LARGE
    for _ in range(20):
        leave(pace, 0.005)
    assert pace.choose([[100]], decoding=3) == SMALL
    # Two that decode wait for eight prompts.
    assert pace.choose([[16, 16, 16, 16, 16, 16, 16, 16]], decoding=2) == WIDE
    for _ in range(40):
        leave(pace, 0.001)
    assert pace.choose([[100]], decoding=3) == SMALL  # none is as short: the shortest


def test_a_second_call_is_for_more_prompts_than_decode():
    pace = paced()
    assert pace.choose([[16] * 4], decoding=2, spent=0.009) == WIDE  # 20 ms for two
    assert pace.choose([[16] * 4], decoding=2, spent=0.012) == SMALL
    assert pace.choose([[16] * 4], decoding=2, spent=0.017) is None
    assert pace.choose([[16] * 4], decoding=4, spent=0.001) is None
    # Nobody waits for it, and before it others may arrive.
    assert pace.choose([[16] * 4], decoding=0, spent=0.001) is None


def test_one_stall_does_not_rule_a_shape_out_for_good():
    pace, calls = paced(), 0
    pace.was_read(LARGE, 1.0)
    assert pace.choose([[100]], decoding=1) == SMALL
    while pace.choose([[100]], decoding=1) == SMALL:
        pace.was_read(SMALL, 0.004)
        calls += 1
        assert calls < 300
    assert pace.choose([[100]], decoding=1) == LARGE


@pytest.mark.parametrize(("is_full", "seconds"), [(False, CALL_SECONDS), (True, FULL_CALL_SECONDS)])
def test_a_call_has_the_steps_that_there_is_time_for(is_full, seconds):
    pace = Pace([SMALL])
    assert pace.steps("any", 100, is_full) == FIRST_STEPS  # not measured yet
    for _ in range(10):
        pace.steps("any", 100, is_full)
    pace.was_decoded("any", 10, seconds)
    assert pace.steps("any", 100, is_full) in (9, 10)  # as floats divide
    assert pace.steps("any", 7, is_full) == 7
    assert pace.steps("another", 100, is_full) == FIRST_STEPS
    for _ in range(20):
        pace.was_decoded("any", 1, seconds)
    assert pace.steps("any", 100, is_full) == FIRST_STEPS  # no fewer
    assert pace.steps("any", 2, is_full) == 2


def test_after_an_arrival_calls_are_short_where_more_could_be_let_in():
    pace = Pace([SMALL])
    pace.was_decoded("any", 100, 0.001)
    pace.has_arrived()
    assert [pace.steps("any", 20, is_full=False) for _ in range(4)] == [4, 8, 16, 20]
    pace.has_arrived()
    assert pace.steps("any", 20, is_full=True) == 20
