"""How much is read at a time: by hand."""

from dsv3_jax.serve.pace import Pace

SMALL, LARGE, WIDE = (1, 16), (1, 64), (4, 16)


def paced() -> Pace:
    """Reading takes 4 ms for 16 tokens, 8 for 64, 9 for four times 16; decoding takes 10 ms."""
    pace = Pace([SMALL, LARGE, WIDE])
    for shape, seconds in ((SMALL, 0.004), (LARGE, 0.008), (WIDE, 0.009)):
        pace.was_read(shape, seconds)
    pace.was_decoded(0.010)
    return pace


def test_the_shape_that_reads_most():
    pace = paced()
    assert pace.choose([[100]], decoding=0) == LARGE
    assert pace.choose([[10]], decoding=0) == SMALL
    assert pace.choose([[16, 16, 16, 16]], decoding=0) == WIDE
    assert pace.choose([[16], [16]], decoding=0) == SMALL  # of two devices, one row each


def test_others_do_not_wait_longer_than_for_a_step():
    pace = paced()
    pace.was_decoded(0.005)  # 10 ms falls to 9
    pace.was_decoded(0.005)
    assert pace.choose([[100]], decoding=3) == LARGE
    for _ in range(20):
        pace.was_decoded(0.005)
    assert pace.choose([[100]], decoding=3) == SMALL
    # Two that decode wait for eight prompts.
    assert pace.choose([[16, 16, 16, 16, 16, 16, 16, 16]], decoding=2) == WIDE
    for _ in range(40):
        pace.was_decoded(0.001)
    assert pace.choose([[100]], decoding=3) == SMALL  # none is as short: the shortest


def test_one_stall_does_not_rule_a_shape_out_for_good():
    pace, calls = paced(), 0
    pace.was_read(LARGE, 1.0)
    assert pace.choose([[100]], decoding=1) == SMALL
    while pace.choose([[100]], decoding=1) == SMALL:
        pace.was_read(SMALL, 0.004)
        calls += 1
        assert calls < 300
    assert pace.choose([[100]], decoding=1) == LARGE
