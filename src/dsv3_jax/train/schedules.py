"""What changes over a run: learning rate, batch, MTP weight, bias update rate.

The published run's points are shares of its 14.8T tokens, so that a run of any length goes through
the same phases. Plain Python: a run's whole schedule can be read before it starts.

Source: DeepSeek-V3 Technical Report §4.2 and §2.2.
"""

import math
from dataclasses import dataclass

from dsv3_jax.config import LossConfig, OptimizerConfig, TrainConfig

PUBLISHED_TOKENS = 14.8e12
CONSTANT_UNTIL = 10e12 / PUBLISHED_TOKENS
COSINE_UNTIL = 14.3e12 / PUBLISHED_TOKENS
TENTH_UNTIL = (14.3e12 + 333e9) / PUBLISHED_TOKENS
FINAL_SHARE_OF_PEAK = 7.3e-6 / 2.2e-4
MTP_WEIGHTS = (0.3, 0.1)
MTP_CHANGES_AT = 10e12 / PUBLISHED_TOKENS
BIAS_UPDATE_RATE = 0.001
BIAS_FREEZES_AT = 14.3e12 / PUBLISHED_TOKENS
RAMP_UNTIL = 469e9 / PUBLISHED_TOKENS
RAMP_START = 3072 / 15360
"""The first batch as a share of the full one. The report gives no shape: linear in tokens here."""


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one step uses. `sequences_before` counts what earlier steps have seen."""

    step: int
    micro_batches: int
    sequences_before: int
    learning_rate: float
    mtp_weight: float
    bias_update_rate: float


def learning_rate(config: OptimizerConfig, step: int, progress: float) -> float:
    """The rate of step `step` (from 1) after the share `progress` of the run's tokens.

    Warm-up is linear over `warmup_steps`: step 1 has 1/warmup_steps of the peak.
    """
    peak = config.peak_learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.schedule == "constant" or progress < CONSTANT_UNTIL:
        return peak
    if progress < COSINE_UNTIL:
        angle = math.pi * (progress - CONSTANT_UNTIL) / (COSINE_UNTIL - CONSTANT_UNTIL)
        return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(angle)))
    return peak * (0.1 if progress < TENTH_UNTIL else FINAL_SHARE_OF_PEAK)


def mtp_weight(config: LossConfig, progress: float) -> float:
    """lambda: as set, or 0.3 and from 10T of 14.8T tokens on 0.1."""
    if config.mtp_weight is not None:
        return config.mtp_weight
    return MTP_WEIGHTS[0] if progress < MTP_CHANGES_AT else MTP_WEIGHTS[1]


def bias_update_rate(config: LossConfig, progress: float) -> float:
    """gamma: as set, or 0.001 and for the last 0.5T of 14.8T tokens 0."""
    if config.bias_update_rate is not None:
        return config.bias_update_rate
    return BIAS_UPDATE_RATE if progress < BIAS_FREEZES_AT else 0.0


def micro_batches(parts: int, progress: float) -> int:
    """How many of a full batch's `parts` a ramping batch has after the share `progress`."""
    share = RAMP_START + (1 - RAMP_START) * min(progress / RAMP_UNTIL, 1.0)
    return max(1, round(parts * share))


def plan_run(
    train: TrainConfig, optimizer: OptimizerConfig, loss: LossConfig, parts: int
) -> list[StepPlan]:
    """The plan of every step, in order, a full batch being computed in `parts`.

    With a batch ramp a run of `steps` steps sees fewer sequences than steps * batch_size. A batch
    that grows linearly in tokens from b to B over the share r of the tokens takes
    r ln(B/b) / (1 - b/B) / B steps for that share, which gives the total that shares refer to.
    """
    part = train.batch_size // parts
    total = float(train.steps * train.batch_size)
    if optimizer.batch_ramp:
        stretch = math.log(1 / RAMP_START) / (1 - RAMP_START) - 1
        total /= 1 + RAMP_UNTIL * stretch
    plans, seen = [], 0
    for step in range(1, train.steps + 1):
        progress = seen / total
        count = micro_batches(parts, progress) if optimizer.batch_ramp else parts
        plans.append(
            StepPlan(
                step=step,
                micro_batches=count,
                sequences_before=seen,
                learning_rate=learning_rate(optimizer, step, progress),
                mtp_weight=mtp_weight(loss, progress),
                bias_update_rate=bias_update_rate(loss, progress),
            )
        )
        seen += count * part
    return plans
