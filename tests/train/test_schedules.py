"""The published points of every schedule (DeepSeek-V3 Technical Report §4.2), to the step."""

import itertools
import math

import pytest

from dsv3_jax.config import LossConfig, OptimizerConfig, TrainConfig
from dsv3_jax.train.schedules import plan_run

BILLION = 10**9
TOTAL = 14_800 * BILLION
SEQ = 8 * 4096  # eight times the published length: an eighth of the steps
SEQUENCES = 15360


@pytest.fixture(scope="module")
def published():
    """14,800 steps of a billion tokens each: step n + 1 comes after n billion."""
    train = TrainConfig(steps=14_800, batch_size=8)
    return plan_run(train, OptimizerConfig(), LossConfig(), parts=1)


def after(plans, billions: float):
    """The plan of the first step that has seen so many billion tokens."""
    plan = plans[round(billions)]
    assert plan.sequences_before == round(billions) * 8
    return plan


@pytest.mark.parametrize(
    ("billions", "rate"),
    [
        (2_000, 2.2e-4),
        (9_999, 2.2e-4),
        (10_000, 2.2e-4),  # the cosine begins at its top
        (10_000 + 4_300 / 2, (2.2e-4 + 2.2e-5) / 2),
        (14_299, 2.2e-5),
        (14_300, 2.2e-5),
        (14_632, 2.2e-5),
        (14_633, 7.3e-6),
        (14_799, 7.3e-6),
    ],
)
def test_learning_rate_at_the_published_points(published, billions, rate):
    assert after(published, billions).learning_rate == pytest.approx(rate, rel=1e-5)


def test_the_cosine_falls_from_ten_to_fourteen_point_three_trillion(published):
    rates = [plan.learning_rate for plan in published]
    assert rates[2000:10_001] == [2.2e-4] * 8001
    assert all(a > b for a, b in itertools.pairwise(rates[10_000:14_301]))
    for share in (0.1, 0.25, 0.4, 0.8):
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * math.cos(math.pi * share / 2) ** 2
        assert rates[10_000 + round(4300 * share)] == pytest.approx(expected, rel=1e-9)
    assert len(set(rates[14_300:14_633])) == 1 and len(set(rates[14_633:])) == 1


def test_warm_up_is_linear_over_2000_steps(published):
    for step in (1, 2, 500, 1999, 2000):
        assert published[step - 1].step == step
        assert published[step - 1].learning_rate == pytest.approx(2.2e-4 * step / 2000)


def test_constant_schedule_stays_at_its_peak():
    config = OptimizerConfig(schedule="constant", peak_learning_rate=1e-3, warmup_steps=4)
    plans = plan_run(TrainConfig(steps=8), config, LossConfig(), parts=1)
    rates = [plan.learning_rate for plan in plans]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, *[1e-3] * 5])
    config = OptimizerConfig(schedule="constant", peak_learning_rate=1e-3, warmup_steps=0)
    (plan,) = plan_run(TrainConfig(steps=1), config, LossConfig(), parts=1)
    assert plan.learning_rate == 1e-3


def test_mtp_weight_falls_at_ten_trillion(published):
    assert [plan.mtp_weight for plan in published] == [0.3] * 10_000 + [0.1] * 4_800


def test_bias_update_stops_for_the_last_half_trillion(published):
    assert [plan.bias_update_rate for plan in published] == [0.001] * 14_300 + [0.0] * 500


def test_weights_that_are_set_stay():
    loss = LossConfig(mtp_weight=0.0, bias_update_rate=0.02)
    plans = plan_run(TrainConfig(steps=50), OptimizerConfig(), loss, parts=1)
    assert {(plan.mtp_weight, plan.bias_update_rate) for plan in plans} == {(0.0, 0.02)}


def test_without_a_ramp_every_step_has_the_whole_batch():
    train = TrainConfig(steps=5, batch_size=12)
    plans = plan_run(train, OptimizerConfig(), LossConfig(), parts=3)
    assert [(plan.micro_batches, plan.sequences_before) for plan in plans] == [
        (3, 12 * step) for step in range(5)
    ]


def ramp_steps(total_sequences: float) -> tuple[float, float]:
    """Steps of the ramp and of the whole run: dn/ds = 1/b(s) for b linear in the sequences s."""
    first, until = 3072, total_sequences * 469 / 14_800
    ramp = until / (SEQUENCES - first) * math.log(SEQUENCES / first)
    return ramp, ramp + (total_sequences - until) / SEQUENCES


@pytest.fixture(scope="module")
def ramped():
    """The published run with its batch ramp, in parts of one sequence."""
    steps = round(ramp_steps(TOTAL / SEQ)[1])
    train = TrainConfig(steps=steps, batch_size=SEQUENCES)
    return plan_run(train, OptimizerConfig(batch_ramp=True), LossConfig(), parts=SEQUENCES)


def test_the_ramp_begins_at_3072_and_is_full_at_469_billion_tokens(ramped):
    sizes = [plan.micro_batches for plan in ramped]
    assert sizes[0] == 3072
    assert sizes == sorted(sizes)
    full = next(plan for plan in ramped if plan.micro_batches == SEQUENCES)
    assert full.sequences_before * SEQ == pytest.approx(469 * BILLION, abs=SEQUENCES * SEQ)
    assert full.step == pytest.approx(ramp_steps(TOTAL / SEQ)[0], rel=0.003)
    half = next(plan for plan in ramped if plan.sequences_before * SEQ >= 469 * BILLION / 2)
    assert half.micro_batches == pytest.approx((3072 + SEQUENCES) / 2, rel=1e-3)


def test_the_whole_ramped_run_sees_14_8_trillion_tokens(ramped):
    last = ramped[-1]
    seen = last.sequences_before + last.micro_batches
    assert seen * SEQ == pytest.approx(TOTAL, abs=3 * SEQUENCES * SEQ)
    running = 0
    for plan in ramped:
        assert plan.sequences_before == running
        running += plan.micro_batches


@pytest.mark.parametrize(
    ("billions", "field", "before", "now"),
    [
        (10_000, "mtp_weight", 0.3, 0.1),
        (14_300, "bias_update_rate", 0.001, 0.0),
        (14_633, "learning_rate", 2.2e-5, 7.3e-6),
    ],
)
def test_phases_of_a_ramped_run_follow_its_tokens(ramped, billions, field, before, now):
    late = [plan for plan in ramped if plan.sequences_before * SEQ > 5_000 * BILLION]
    values = [getattr(plan, field) for plan in late]
    first = next(i for i, value in enumerate(values) if value == pytest.approx(now, rel=1e-6))
    assert values[first - 1] == pytest.approx(before)
    assert late[first].sequences_before * SEQ == pytest.approx(
        billions * BILLION, abs=2 * SEQUENCES * SEQ
    )


def test_a_ramp_never_goes_below_one_part():
    train = TrainConfig(steps=40, batch_size=4)
    plans = plan_run(train, OptimizerConfig(batch_ramp=True), LossConfig(), parts=2)
    assert {plan.micro_batches for plan in plans} == {1, 2}
