"""Choosing tokens: the filters against brute force over sorted lists, the draws by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv3_jax.serve.sampler import (
    RowParams,
    SamplingParams,
    keep_most_likely,
    keep_most_likely_rows,
    sample,
    sample_rows,
)

VOCAB = 9
DISTINCT = st.lists(st.integers(-60, 60), min_size=VOCAB, max_size=VOCAB, unique=True)
TYING = st.lists(st.integers(-3, 3), min_size=VOCAB, max_size=VOCAB)


def probabilities(logits):
    exponentials = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    return exponentials / exponentials.sum()


def brute_force(logits, top_k, top_p):
    """Token by token from the most likely on, while fewer than top_k and less mass than top_p.

    Also the distance of top_p from the nearest sum of masses: rounding decides where it is tiny.
    """
    order = sorted(range(VOCAB), key=lambda token: -logits[token])[: top_k or VOCAB]
    weights = probabilities([logits[token] for token in order])
    kept, mass, margin = set(), 0.0, 1.0
    for token, weight in zip(order, weights, strict=True):
        margin = min(margin, abs(mass - top_p))
        if top_p == 1 or mass < top_p:
            kept.add(token)
        mass += weight
    return kept, margin


def kept_tokens(logits, top_k, top_p):
    found = np.asarray(keep_most_likely(jnp.asarray([logits], jnp.float32), top_k, top_p))[0]
    kept = np.isfinite(found)
    np.testing.assert_array_equal(found[kept], np.asarray(logits, np.float32)[kept])
    assert np.all(found[~kept] == -np.inf)
    return set(np.flatnonzero(kept))


@given(
    logits=DISTINCT.map(lambda values: [v / 10 for v in values]),
    top_k=st.integers(0, VOCAB + 3),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
)
def test_filters_keep_what_brute_force_keeps(logits, top_k, top_p):
    expected, margin = brute_force(logits, top_k, top_p)
    assume(margin > 1e-5)
    assert kept_tokens(logits, top_k, top_p) == expected


SHARES = st.one_of(st.just(1.0), st.floats(0.01, 1.0))
ROWS = st.lists(
    st.tuples(DISTINCT, st.integers(0, VOCAB + 3), SHARES, st.sampled_from([0.0, 0.05, 0.5])),
    min_size=3,
    max_size=3,
)


def row_params(top_k, top_p, min_p, temperature=1.0, seed=0) -> RowParams:
    count = len(top_k)
    return RowParams(
        jnp.full((count,), temperature, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(min_p, jnp.float32),
        jax.random.split(jax.random.key(seed), count),
    )


@given(ROWS)
def test_each_row_has_its_own_filters(rows):
    """Brute force, then without what is less likely than min_p times the most likely."""
    logits = [[value / 10 for value in row[0]] for row in rows]
    found = keep_most_likely_rows(
        jnp.asarray(logits, jnp.float32), row_params(*zip(*(row[1:] for row in rows), strict=True))
    )
    for row, (_, top_k, top_p, min_p), of_row in zip(logits, rows, found, strict=True):
        kept, margin = brute_force(row, top_k, top_p)
        assume(margin > 1e-5)
        weights = probabilities(row)
        assume(np.min(np.abs(weights - min_p * weights.max())) > 1e-6)
        expected = {token for token in kept if weights[token] >= min_p * weights.max()}
        assert set(np.flatnonzero(np.isfinite(of_row))) == expected


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8)])
def test_rows_draw_what_a_batch_of_its_own_draws(top_k, top_p):
    """`sample` with the same key, which `generate` uses."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(40, VOCAB)), jnp.float32)
    rows = row_params([top_k] * 40, [top_p] * 40, [0.0] * 40, temperature=0.8, seed=4)
    made = jnp.arange(40, dtype=jnp.int32)
    params = SamplingParams(temperature=0.8, top_k=top_k, top_p=top_p)
    expected = sample(logits, jax.vmap(jax.random.fold_in)(rows.keys, made), params)
    np.testing.assert_array_equal(sample_rows(logits, made, rows), expected)


@given(logits=TYING, top_k=st.integers(1, VOCAB), top_p=st.floats(0.01, 0.99))
def test_equal_tokens_stay_or_go_together(logits, top_k, top_p):
    kept = kept_tokens(logits, top_k, top_p)
    least = min(logits[token] for token in kept)
    assert kept == {token for token in range(VOCAB) if logits[token] >= least}
    assert max(logits) in {logits[token] for token in kept}
    above = {token for token in kept if logits[token] > least}
    assert len(above) < top_k  # one rank fewer would have been too few


@given(logits=DISTINCT, top_p=st.floats(0.01, 1.0))
def test_the_nucleus_grows_with_top_p(logits, top_p):
    smaller, larger = kept_tokens(logits, 0, top_p / 2), kept_tokens(logits, 0, top_p)
    assert smaller <= larger
    assert probabilities(logits)[sorted(larger)].sum() >= top_p - 1e-5


def test_top_p_counts_the_mass_that_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7 and 3/7: top-p 0.5 then keeps the first alone."""
    logits = np.log([0.4, 0.3, 0.2, 0.1] + [1e-9] * 5)
    assert kept_tokens(logits, 2, 0.5) == {0}
    assert kept_tokens(logits, 0, 0.5) == {0, 1}


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def draw(logits, count, **params):
    rows = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    draws = np.asarray(sample(rows, keys(count), SamplingParams(**params)))
    assert draws.dtype == np.int32
    return np.bincount(draws, minlength=len(logits)) / count


def test_temperature_zero_takes_the_largest_whatever_the_filters():
    logits = jnp.asarray([[0.1, 3.0, 2.9], [5.0, 5.0, 1.0]])
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.1, seed=9)
    np.testing.assert_array_equal(sample(logits, keys(2), params), [1, 0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_the_softmax_at_this_temperature(temperature):
    logits = np.array([2.0, 1.0, 0.0, -1.0])
    found = draw(logits, 20_000, temperature=temperature)
    expected = probabilities(logits / temperature)
    error = 5 * np.sqrt(expected * (1 - expected) / 20_000)
    assert np.all(np.abs(found - expected) <= error)
    other = probabilities(logits / (1.3 * temperature))
    assert np.any(np.abs(found - other) > error)


def test_draws_stay_inside_the_filters_in_their_order():
    """Temperature first: at 4 the nucleus of 0.6 needs two of four tokens, at 1 only one."""
    logits = np.array([3.0, 1.5, 0.0, -1.0])
    assert (draw(logits, 2000, temperature=1.0, top_p=0.6) > 0).sum() == 1
    assert (draw(logits, 2000, temperature=4.0, top_p=0.6) > 0).sum() == 2
    assert (draw(logits, 2000, temperature=4.0, top_k=3) > 0).tolist() == [True] * 3 + [False]


def test_each_row_has_its_own_key():
    logits = jnp.zeros((64, 50))
    params = SamplingParams(temperature=1.0)
    one, same, other = (np.asarray(sample(logits, keys(64, s), params)) for s in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert len(np.unique(one)) > 20 and np.mean(one == other) < 0.2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"))),
        ("top_k", -1),
        *(("top_p", value) for value in (0.0, 1.5, float("nan"))),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} is {value}, expected [^\n]+$"):
        SamplingParams(**{field: value})
