"""Batched generation: equal to repeated full forwards, to the oracle and to Hugging Face."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dsv3_jax
from dsv3_jax.serve.generate import check_prompts, generate, stream
from dsv3_jax.serve.sampler import SamplingParams
from tests.model.weights import GOLDEN, build_transformer, load_golden, model_config
from tests.oracle import forward, greedy
from tests.programs import quick_jit
from tests.tolerances import BFLOAT16_LOGITS

GENERATED = load_file(GOLDEN / "generate" / "golden.safetensors")
NEW = 24
# Two that Hugging Face continued, and one that fills the cache of 48 to the last place.
PROMPTS = [
    GENERATED["prompt.0"].tolist(),
    GENERATED["prompt.1"].tolist(),
    [(7 * i * i + 3) % 64 for i in range(24)],
]


@pytest.fixture(scope="module")
def hub():
    """Config and weights of the golden YaRN checkpoint: a dense and a MoE layer, four groups."""
    config, weights, _ = load_golden("yarn_hub")
    return config, weights


@pytest.fixture(scope="module")
def model(hub):
    return build_transformer(model_config(hub[0]), hub[1])


@pytest.fixture(scope="module")
def batch(model):
    """The greedy continuations of the three prompts, made in one batch."""
    return generate(model, PROMPTS, NEW)


def test_greedy_equals_the_oracles(hub, batch):
    """Which recomputes the whole text for every token. No choice may be a close call."""
    for prompt, found in zip(PROMPTS, batch, strict=True):
        assert found == greedy(*hub, prompt, NEW)
        logits = forward(*hub, np.array([prompt + found])).logits[0, len(prompt) - 1 : -1]
        first, second = np.sort(logits, axis=-1)[:, -1], np.sort(logits, axis=-1)[:, -2]
        assert np.all(first - second > 1e-4)
    assert len({tuple(row) for row in batch}) == 3


def test_greedy_equals_repeated_full_forwards(model, batch):
    """The uncached model over the finished text would have chosen each token."""
    rows = np.zeros((3, 48), np.int32)
    for row, prompt, found in zip(rows, PROMPTS, batch, strict=True):
        row[: len(prompt) + NEW] = prompt + found
    logits = quick_jit(lambda model, rows: model(rows))(model, jnp.asarray(rows))
    for chosen, prompt, found in zip(np.argmax(logits, -1), PROMPTS, batch, strict=True):
        assert chosen[len(prompt) - 1 : len(prompt) + NEW - 1].tolist() == found


def test_greedy_equals_hugging_face(model, batch):
    """Each prompt ran alone there; the package's own door leads to the same function."""
    assert batch[:2] == [GENERATED[f"generated.{n}"].tolist() for n in (0, 1)]
    assert dsv3_jax.generate(model, PROMPTS, max_new_tokens=NEW) == batch


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(model, batch):
    assert generate(model, PROMPTS[1:2], NEW) == batch[1:2]


def joined(pieces):
    """The tokens of each row over all pieces."""
    return [[token for part in row for token in part] for row in zip(*pieces, strict=True)]


def test_streaming_gives_the_same_in_pieces(model, batch):
    """The first token by itself, then five of each prompt at a time."""
    pieces = list(stream(model, PROMPTS, NEW, SamplingParams(), steps=5))
    assert joined(pieces) == batch
    assert [len(piece[0]) for piece in pieces] == [1, 5, 5, 5, 5, 3]


def test_a_row_ends_with_any_of_several_end_tokens(hub, batch):
    ends = (batch[2][4], batch[0][2])
    expected = [row[: min(row.index(e) for e in ends if e in row) + 1] for row in batch]
    assert expected[0] == batch[0][:3] and expected[2] == batch[2][:5]
    model = build_transformer(model_config(hub[0], eos_token_id=ends), hub[1])
    assert generate(model, PROMPTS, NEW) == expected


def test_a_row_ends_with_the_end_token_and_the_others_go_on(hub, batch):
    """The end token is the fifth of row 2, and comes later in the other rows."""
    end = batch[2][4]
    expected = [row[: row.index(end) + 1] for row in batch]
    assert [len(row) for row in expected] == [16, 10, 5]
    model = build_transformer(model_config(hub[0], eos_token_id=end), hub[1])
    pieces = list(stream(model, PROMPTS, NEW, SamplingParams(), steps=4))
    assert joined(pieces) == expected
    assert len(pieces) == 5 and all(piece[2] == [] for piece in pieces[2:])
    pieces = list(stream(model, PROMPTS[2:] * 3, NEW, SamplingParams(), steps=4))
    assert joined(pieces) == [expected[2]] * 3
    assert len(pieces) == 2  # then all rows had ended, and so did the work
    almost_there = PROMPTS[1] + batch[1][:9]
    pieces = stream(model, [almost_there, *PROMPTS[1:]], NEW, SamplingParams(), steps=4)
    assert joined(pieces) == [[end], *expected[1:]]


def test_sampled_rows_depend_on_seed_and_place_alone(model):
    """The same prompt three times: three texts; the same again; the first of them alone, too."""
    prompts = PROMPTS[2:] * 3
    one, same, other = (
        generate(model, prompts, NEW, temperature=1.5, seed=seed) for seed in (1, 1, 2)
    )
    assert len({tuple(row) for row in one}) == 3
    assert same == one
    assert all(a != b for a, b in zip(one, other, strict=True))
    beside_others = generate(model, [PROMPTS[2], *PROMPTS[:2]], NEW, temperature=1.5, seed=1)
    assert beside_others[0] == one[0]
    assert generate(model, prompts[:1], 1, temperature=1.5, seed=1) == [one[0][:1]]


def test_another_seed_compiles_nothing(model):
    names = []

    def record(name, *_, **__):
        names.append(name)

    generate(model, PROMPTS, NEW, temperature=1.5, seed=1)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        generate(model, PROMPTS, NEW, temperature=1.5, seed=3)
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert not [name for name in names if "backend_compile" in name]


def test_sampling_from_the_likeliest_alone_is_greedy(model, batch):
    found = generate(model, PROMPTS, 1, temperature=1.5, seed=3, top_k=1)
    assert found == [row[:1] for row in batch]


def test_every_choice_reaches_the_sampler(model, monkeypatch):
    def record(*arguments, steps):
        given.append(arguments)
        yield [[7], [8]]

    given = []
    monkeypatch.setattr(importlib.import_module("dsv3_jax.serve.generate"), "stream", record)
    choices = dict(temperature=0.7, top_p=0.9, seed=5, top_k=3)
    assert generate(model, [[1], [2]], 9, **choices) == [[7], [8]]
    assert given == [(model, [[1], [2]], 9, SamplingParams(**choices))]


def test_nothing_to_do_gives_nothing(model):
    assert generate(model, [], 5) == []
    assert generate(model, [[1], [2, 3]], 0) == [[], []]


def test_a_bfloat16_model_generates(hub):
    """Each token is the oracle's best, or as good but for rounding."""
    config, weights = hub
    model = build_transformer(model_config(config), weights, dtype=jnp.bfloat16)
    found = generate(model, PROMPTS, NEW)
    for prompt, row in zip(PROMPTS, found, strict=True):
        logits = forward(config, weights, np.array([prompt + row])).logits[0, len(prompt) - 1 : -1]
        chosen = np.take_along_axis(logits, np.array(row)[:, None], axis=-1)[:, 0]
        behind = logits.max(axis=-1) - chosen
        assert np.mean(behind < BFLOAT16_LOGITS * np.abs(logits).max()) > 0.9


@pytest.mark.parametrize(
    ("prompts", "new", "message"),
    [
        ([[1], []], 4, r"prompts\[1\] is \[\], expected at least one token"),
        ([[1, 64]], 4, r"prompts\[0\]: token is 64, expected a token from 0 to 63"),
        ([[1], [2, -1]], 4, r"prompts\[1\]: token is -1, expected a token from 0 to 63"),
        ([[1] * 60], 5, r"prompts\[0\]: its length plus max_new_tokens is 65, .* = 64"),
        ([[1]], -1, r"max_new_tokens is -1, expected a number of at least 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_named(model, prompts, new, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        generate(model, prompts, new)
    check_prompts(model, [[0] * 60, [63]], 4)  # at the limits
