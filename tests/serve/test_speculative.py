"""Whether guessing goes on: decided by measured seconds and shares, tried again now and then."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.serve.sampler import RowParams, sample_rows
from dsv3_jax.serve.speculative import TRIAL_EVERY, TRIAL_STEPS, Payoff


def run(payoff: Payoff, with_guesses: float, without: float, share: float, steps: int) -> int:
    """Steps of `steps` that were made with guesses, in calls of 4."""
    used = 0
    for _ in range(steps // 4):
        is_on = payoff.is_on
        right = round(100 * share) if is_on else 0
        payoff.add(is_on, with_guesses if is_on else without, 100 * is_on, right, 4)
        used += 4 * is_on
    return used


def test_it_goes_on_where_it_pays_and_stops_where_it_does_not():
    """1.8 tokens a step in 1.5 times the time pay, 1.3 do not."""
    pays = run(Payoff(), 1.5, 1.0, 0.8, 1000)
    assert pays == 1000 - TRIAL_STEPS
    does_not = run(Payoff(), 1.5, 1.0, 0.3, 1000)
    assert does_not == TRIAL_STEPS


def test_one_late_call_decides_nothing():
    payoff = Payoff()
    payoff.add(True, 50.0, 100, 80, 4)
    assert run(payoff, 1.5, 1.0, 0.8, 1000) > 900


def test_the_loser_is_tried_again():
    payoff = Payoff()
    run(payoff, 1.5, 1.0, 0.1, 500)
    assert not payoff.is_on
    assert run(payoff, 1.1, 1.0, 0.9, 20 * TRIAL_EVERY) > 10 * TRIAL_EVERY


def test_guesses_share_the_noise_and_leave_the_distribution_alone():
    """Tokens are drawn from the target alone; a guess of a near distribution is mostly the token.

    100,000 draws of 8 tokens: frequencies within 5 standard deviations of the probabilities. With
    noise of its own a guess would be right as often as two independent draws agree.
    """
    count = 100_000
    rng = np.random.default_rng(0)
    target = rng.normal(size=8).astype(np.float32)
    draft = target + 0.3 * rng.normal(size=8).astype(np.float32)
    ones = jnp.ones((count,), jnp.float32)
    zeros = jnp.zeros((count,), jnp.int32)
    rows = RowParams(ones, zeros, ones, 0 * ones, jax.random.split(jax.random.key(1), count))

    def draw(logits):
        tiled = jnp.broadcast_to(jnp.asarray(logits), (count, 8))
        return np.asarray(sample_rows(tiled, zeros + 3, rows))

    tokens, guesses = draw(target), draw(draft)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (target.astype(float), draft.astype(float)))
    frequency = np.bincount(tokens, minlength=8) / count
    assert np.all(np.abs(frequency - p) < 5 * np.sqrt(p * (1 - p) / count))
    right = np.mean(tokens == guesses)
    overlap = np.minimum(p, q).sum()  # no coupling is right more often
    assert float(p @ q) + 0.2 < right <= overlap + 0.01
    assert right > overlap / (2 - overlap) - 0.01  # of sharing exponential noise: Daliri 2024, §3
