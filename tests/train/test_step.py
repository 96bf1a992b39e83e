"""Whole optimizer steps: 50 of PyTorch's, accumulation, ramp, bias update, BF16, refusal of NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    PrecisionConfig,
    RunConfig,
    TrainConfig,
)
from dsv3_jax.train.layout import compute_params
from dsv3_jax.train.state import TrainState
from dsv3_jax.train.step import make_train_step
from tests import oracle
from tests.oracle.cases import random_tokens, tiny_config
from tests.tolerances import FLOAT32_GRADIENTS
from tests.train.models import (
    hub_tensors,
    load_golden,
    model_config,
    relative_error,
    settings,
    state_of,
)

BIAS = "e_score_correction_bias"
NO_CLIP = 1e9


def run_config(model: ModelConfig, seq_len: int, *, accumulation=1, recipe="fp32", **optimizer):
    return RunConfig(
        model=model,
        data=DataConfig(source="tokens", paths=("rows.npy",), seq_len=seq_len),
        train=TrainConfig(batch_size=8, accumulation=accumulation),
        optimizer=OptimizerConfig(**optimizer),
        loss=LossConfig(balance_weight=0.01),
        precision=PrecisionConfig(recipe=recipe),
    )


def in_parts(rows: np.ndarray, parts: int) -> jax.Array:
    return jnp.asarray(rows.reshape(parts, -1, rows.shape[1]), jnp.int32)


def test_fifty_steps_equal_pytorchs():
    """Losses, gradient norms before clipping, and the weights at the end; the bias stays."""
    model, tensors, golden = load_golden("adamw")
    rows = golden["tokens"]
    config = run_config(model, rows.shape[2] - 1)
    config = dataclasses.replace(config, loss=LossConfig(balance_weight=0.0))
    layout, state = state_of(config, tensors)
    step = make_train_step(layout)
    losses, norms = [], []
    for batch in rows:
        state, report = step(state, in_parts(batch, 1), None, settings(learning_rate=1e-3))
        losses.append(float(report.losses.loss))
        norms.append(float(report.gradient_norm.total))
    assert int(state.step) == 50
    np.testing.assert_allclose(losses, golden["losses_float64"], rtol=1e-5)
    np.testing.assert_allclose(norms, golden["gradient_norms_float64"], rtol=1e-4)
    assert min(norms) > 1  # so every step was clipped
    expected = {n.removeprefix("final."): v for n, v in golden.items() if n.startswith("final.")}
    final = hub_tensors(model, state.params)
    assert final.keys() == expected.keys()
    for name, value in final.items():
        assert relative_error(value, expected[name].astype(np.float64)) < 1e-4, name
    for name, bias in hub_tensors(model, state.selection_bias).items():
        np.testing.assert_array_equal(bias, tensors[name])


FIELDS = tiny_config()
ROWS = random_tokens(FIELDS, 8, 12)
DOCUMENTS = np.cumsum(np.random.default_rng(0).random(ROWS.shape) < 0.25, axis=1)
RATE = 0.125


PARTS = run_config(model_config(FIELDS), 11, accumulation=4, clip_norm=NO_CLIP)
TENSORS = oracle.random_weights(FIELDS, seed=6, std=0.3)


@pytest.fixture(scope="module")
def step():
    """A step of four parts of two rows; with documents and without it compiles twice."""
    layout, _ = state_of(PARTS, TENSORS)
    return make_train_step(layout)


def run_parts(step, state: TrainState, micro_batches=4, documents=None):
    """The state after a step at learning rate 0, and its report."""
    return step(
        state,
        in_parts(ROWS, 4),
        None if documents is None else in_parts(documents, 4),
        settings(micro_batches=micro_batches, mtp_weight=0.3, bias_update_rate=RATE),
    )


@pytest.mark.parametrize("micro_batches", [4, 3, 1])
@pytest.mark.parametrize(
    "documents",
    [
        pytest.param(None, id="plain", marks=pytest.mark.slow),
        pytest.param(DOCUMENTS, id="documents"),
    ],
)
def test_parts_add_up_to_the_batch_they_make(step, documents, micro_batches):
    """Losses, gradients and load are those of the used parts' rows at once, whatever the others.

    The bias moves by the load of all of them together, the learning rate's zero leaves the rest.
    """
    state, report = run_parts(step, state_of(PARTS, TENSORS)[1], micro_batches, documents)
    used = slice(0, 2 * micro_batches)
    if documents is not None:
        documents = documents[used]
        counts = (documents[:, 1:] == documents[:, :-1]).reshape(micro_batches, -1).sum(axis=1)
        assert len(set(counts)) > 1 or micro_batches == 1  # the parts do not weigh the same
    expected, gradients = oracle.loss_and_gradients(
        FIELDS, TENSORS, ROWS[used], 0.3, 0.01, documents
    )
    terms = (expected.loss, expected.main, expected.mtp, expected.balance)
    assert [float(value) for value in report.losses] == pytest.approx(terms, rel=1e-5)
    np.testing.assert_array_equal(report.load, [expected.load_by_layer[i] for i in (1, 2)])
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    assert float(report.gradient_norm.total) == pytest.approx(norm, rel=1e-5)
    first = hub_tensors(PARTS.model, state.moments.first)
    assert first.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = relative_error(first[name] / 0.1, gradient)  # m = 0.1 g after a step
        assert error < FLOAT32_GRADIENTS, name

    after = hub_tensors(PARTS.model, state.params, state.selection_bias)
    for layer, load in expected.load_by_layer.items():  # an MoE layer and the MTP module
        name = f"model.layers.{layer}.mlp.gate.{BIAS}"
        moved = oracle.update_selection_bias(TENSORS[name], load, RATE)
        np.testing.assert_allclose(after.pop(name), moved, atol=1e-7)
    for name, value in after.items():
        np.testing.assert_array_equal(value, TENSORS[name])


def with_weights(state: TrainState, **changes) -> TrainState:
    """The state with `path=function of the array` applied; a path's names are joined by __."""
    names = {tuple(path.split("__")): change for path, change in changes.items()}

    def change(path, leaf):
        keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        return names.pop(keys)(leaf) if keys in names else leaf

    changed = state._replace(params=jax.tree.map_with_path(change, state.params))
    assert not names
    return changed


POISONS = {
    "a NaN weight": dict(norm__weight=lambda w: w.at[3].set(jnp.nan)),
    "an infinite activation": dict(dense_layers__mlp__gate_proj__weight=lambda w: w * 3e38),
    "a gradient alone": dict(norm__weight=lambda w: w * 1e25, lm_head__weight=lambda w: w * 1e-25),
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_step_that_is_not_finite_changes_nothing(step, poison):
    state = with_weights(state_of(PARTS, TENSORS)[1], **POISONS[poison])
    before = jax.tree.map(np.array, state)
    after, report = run_parts(step, state, documents=DOCUMENTS)
    assert not bool(report.finite)
    assert np.isfinite(report.losses.loss) == (poison == "a gradient alone")
    assert not np.isfinite(report.gradient_norm.total)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    for found, expected in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert np.asarray(found).tobytes() == expected.tobytes()


def test_a_finite_step_changes_the_state(step):
    after, report = run_parts(step, state_of(PARTS, TENSORS)[1], documents=DOCUMENTS)
    assert bool(report.finite) and int(after.step) == 1


BF16 = run_config(model_config(FIELDS), 11, recipe="bf16", moment_dtype="bfloat16")


@pytest.fixture(scope="module")
def bf16():
    """A step in BF16 at a learning rate far below BF16's resolution: (before, after, report)."""
    tensors = oracle.random_weights(FIELDS, seed=6, std=0.3)
    layout, state = state_of(BF16, tensors)
    before = jax.tree.map(np.array, state)
    after, report = make_train_step(layout)(
        state, in_parts(ROWS, 1), None, settings(learning_rate=1e-6, mtp_weight=0.3)
    )
    return tensors, before, after, report


def test_bf16_loss_and_gradients_are_close_to_float64s(bf16):
    tensors, _, after, report = bf16
    expected, gradients = oracle.loss_and_gradients(FIELDS, tensors, ROWS, 0.3, 0.01)
    error = abs(float(report.losses.loss) / expected.loss - 1)
    assert 1e-6 < error < 5e-3  # not exact: it does compute in BF16
    found = hub_tensors(BF16.model, after.moments.first)
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    scale = 0.1 * min(1.0, 1 / norm)
    whole = np.concatenate([(found[name] / scale).ravel() for name in gradients])
    truth = np.concatenate([gradient.ravel() for gradient in gradients.values()])
    assert relative_error(whole, truth) < 0.05


def test_bf16_keeps_float32_master_weights_and_moments_as_set(bf16):
    tensors, before, after, _ = bf16
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(after.moments)} == {jnp.dtype(jnp.bfloat16)}
    old = hub_tensors(BF16.model, before.params)
    for name, new in hub_tensors(BF16.model, after.params).items():
        moved = np.abs(new - old[name])
        assert 0 < moved.max() < 3e-6, name  # BF16 would lose 1e-6 beside weights of 0.3
    for name, bias in hub_tensors(BF16.model, after.selection_bias).items():
        np.testing.assert_array_equal(bias, tensors[name])  # the update rate was 0


def test_bf16_adds_up_the_gradient_of_a_frequent_token_in_float32():
    """Of 4,096 equal terms a BF16 sum keeps 256."""
    layout, state = state_of(BF16, TENSORS)
    tokens = jnp.full((8, 512), 5, jnp.int32)

    @jax.jit
    def gradient(params):
        def total(params):
            model = nnx.merge(layout.graph, compute_params(params, "bf16"), state.selection_bias)
            return jnp.sum(model.embed_tokens(tokens).astype(jnp.float32))

        return jax.grad(total)(params)

    found = hub_tensors(BF16.model, gradient(state.params))["model.embed_tokens.weight"]
    expected = np.zeros((23, 12))
    expected[5] = 4096
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_what_bf16_computes_in():
    """Embedding, norms and routers in float32, the rest in BF16; in fp32 all in float32."""
    _, state = state_of(BF16, oracle.random_weights(FIELDS, seed=0))
    for recipe, other in (("bf16", jnp.bfloat16), ("fp32", jnp.float32)):
        cast = compute_params(state.params, recipe)
        dtypes = {}
        for path, leaf in jax.tree.leaves_with_path(cast):
            names = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
            dtypes["/".join(map(str, names))] = leaf.dtype
        kept = {n for n in dtypes if "gate/" in n or "norm" in n or "embed" in n}
        # embedding; dense, MoE, MTP block; enorm, hnorm, shared_head.norm
        assert len(kept) == 1 + 5 + 5 + 5 + 3
        assert {dtypes[name] for name in kept} == {jnp.dtype(jnp.float32)}
        assert {dtypes[name] for name in dtypes.keys() - kept} == {jnp.dtype(other)}
    biases = {leaf.dtype for leaf in jax.tree.leaves(state.selection_bias)}
    assert biases == {jnp.dtype(jnp.float32)}
