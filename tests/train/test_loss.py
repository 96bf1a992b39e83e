"""Every term of the loss and every tensor's gradient, against the oracle and Hugging Face."""

from collections.abc import Callable, Iterator

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import DataConfig, RunConfig, TrainConfig
from dsv3_jax.train import loss as loss_module
from dsv3_jax.train.loss import Losses, chunked_cross_entropy, evaluation_sums, training_loss
from dsv3_jax.train.state import split_model
from tests import oracle
from tests.oracle.cases import TWO_DEPTHS, V2_CHANGES, YARN, random_tokens, tiny_config
from tests.tolerances import FLOAT32_GRADIENTS
from tests.train.models import (
    hub_tensors,
    load_golden,
    model_config,
    model_of,
    oracle_fields,
    relative_error,
)

LOSSES = 1e-5
QUICK_GOLDEN = ("odd_sizes", "yarn_hub")
MORE_GOLDEN = ("direct_q", "three_dense", "two_shared", "unnormalised", "yarn_mscale")
GOLDEN_CASES = [*QUICK_GOLDEN, *(pytest.param(n, marks=pytest.mark.slow) for n in MORE_GOLDEN)]
# Oracle config, with or without documents, what backward recomputes.
ORACLE_CASES = {
    "v3": (tiny_config(), False, "selective"),
    "yarn, documents": (tiny_config(rope_scaling=YARN), True, "none"),
    "v2": (tiny_config(**V2_CHANGES), False, "none"),
    "two MTP depths, documents": (tiny_config(**TWO_DEPTHS), True, "full"),
    "dense": (
        tiny_config(
            first_k_dense_replace=2,
            n_routed_experts=0,
            num_nextn_predict_layers=0,
            q_lora_rank=None,
        ),
        False,
        "none",
    ),
}


def run_config(model, seq_len: int, **train) -> RunConfig:
    data = DataConfig(source="tokens", paths=("rows.npy",), seq_len=seq_len)
    return RunConfig(model=model, data=data, train=TrainConfig(**train))


def random_documents(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Documents of five tokens on average, so that rows have different numbers of targets."""
    begins = np.random.default_rng(seed).random(shape) < 0.2
    return np.cumsum(begins, axis=1)


def make_gradient(config: RunConfig, tensors: dict[str, np.ndarray], balance_weight: float):
    """`f(rows, documents, mtp_weight)` -> (Losses, load, gradients by hub name), compiled once."""
    graph, params, bias = split_model(model_of(config, tensors))

    @jax.jit
    def differentiate(params, rows, documents, predictions, mtp_weight):
        def loss_of(params):
            return training_loss(
                nnx.merge(graph, params, bias),
                rows,
                documents,
                predictions=predictions,
                sequences=jnp.float32(rows.shape[0]),
                mtp_weight=mtp_weight,
                balance_weight=balance_weight,
            )

        return jax.grad(loss_of, has_aux=True)(params)

    def gradient(rows, documents=None, mtp_weight=0.0) -> tuple[Losses, np.ndarray, dict]:
        count = rows[:, 1:].size
        if documents is not None:
            count = np.sum(documents[:, 1:] == documents[:, :-1])
            documents = jnp.asarray(documents, jnp.int32)
        found, (losses, load) = differentiate(
            params,
            jnp.asarray(rows, jnp.int32),
            documents,
            jnp.float32(count),
            jnp.float32(mtp_weight),
        )
        return losses, np.asarray(load), hub_tensors(config.model, found)

    return gradient


def assert_same_gradients(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    wrong = {name: relative_error(found[name], expected[name]) for name in expected}
    wrong = {name: error for name, error in wrong.items() if not error <= FLOAT32_GRADIENTS}
    assert not wrong


def assert_same_losses(found: Losses, load: np.ndarray, expected: oracle.Losses) -> None:
    terms = (expected.loss, expected.main, expected.mtp, expected.balance)
    assert [float(value) for value in found] == pytest.approx(terms, rel=LOSSES)
    expected_load = [expected.load_by_layer[layer] for layer in sorted(expected.load_by_layer)]
    np.testing.assert_array_equal(load, np.array(expected_load).reshape(load.shape))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "dense" else n for n in ORACLE_CASES]
)
def test_terms_and_gradients_equal_the_oracles(name):
    """A balance weight of 0.5, five thousand times the published one, so that its part shows."""
    fields, has_documents, remat = ORACLE_CASES[name]
    tensors = oracle.random_weights(fields, seed=3, std=0.3)
    rows = random_tokens(fields, 3, 14)
    documents = random_documents(rows.shape, seed=1) if has_documents else None
    config = run_config(model_config(fields), 13, remat=remat)
    gradient = make_gradient(config, tensors, balance_weight=0.5)
    losses, load, found = gradient(rows, documents, 0.3)
    expected, gradients = oracle.loss_and_gradients(fields, tensors, rows, 0.3, 0.5, documents)
    assert_same_losses(losses, load, expected)
    assert_same_gradients(found, gradients)
    if fields["num_nextn_predict_layers"]:  # negative control: the MTP weight matters
        *_, other = gradient(rows, documents, 0.2)
        with pytest.raises(AssertionError):
            assert_same_gradients(other, gradients)


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_gradients_equal_hugging_faces(name):
    """One document a row is no document at all. With several, the oracle says what is right."""
    model, tensors, golden = load_golden(name)
    rows = golden["tokens"]
    gradient = make_gradient(run_config(model, rows.shape[1] - 1), tensors, balance_weight=0.0)
    losses, load, found = gradient(rows, np.zeros_like(rows))
    assert float(losses.loss) == pytest.approx(float(golden["loss_float64"]), rel=LOSSES)
    for layer, counts in enumerate(load, start=model.num_dense_layers):
        chosen = golden[f"top_k_index.{layer}"].ravel()
        np.testing.assert_array_equal(counts, np.bincount(chosen, minlength=len(counts)))
    assert_same_gradients(found, with_prefix(golden, "grad."))

    documents = random_documents(rows.shape, seed=2)
    fields = oracle_fields(name)
    tensors = {key: value.astype(np.float64) for key, value in tensors.items()}
    expected, gradients = oracle.loss_and_gradients(fields, tensors, rows, 0.0, 0.0, documents)
    losses, load, found = gradient(rows, documents)
    assert_same_losses(losses, load, expected)
    assert_same_gradients(found, gradients)


def with_prefix(golden: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): value.astype(np.float64)
        for name, value in golden.items()
        if name.startswith(prefix)
    }


def test_mtp_loss_and_gradients_equal_hugging_faces():
    """It divides by the T - 1 targets there are, the report (equation 24) and we by T."""
    model, tensors, golden = load_golden("mtp", num_nextn_predict_layers=1)
    rows = golden["tokens"]
    length = rows.shape[1] - 1
    gradient = make_gradient(run_config(model, length), tensors, balance_weight=0.0)
    losses, _, both = gradient(rows, mtp_weight=1.0)
    _, _, main = gradient(rows, mtp_weight=0.0)
    factor = length / (length - 1)
    expected = float(golden["mtp_loss_float64"])
    assert float(losses.mtp_loss) * factor == pytest.approx(expected, rel=LOSSES)
    mtp = {name: factor * (both[name] - main[name]) for name in both}
    gradients = with_prefix(golden, "mtp_grad.")
    missing = mtp.keys() - gradients.keys()
    assert all(not mtp.pop(name).any() for name in missing)
    assert_same_gradients(mtp, gradients)


def reference_cross_entropy(hidden, head, targets, weights):
    """Sum, nll, d_hidden, d_head in float64."""
    logits = hidden @ head.T
    logits -= logits.max(axis=1, keepdims=True)
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(targets))
    nll = -log_probs[rows, targets]
    d_logits = np.exp(log_probs)
    d_logits[rows, targets] -= 1
    d_logits *= weights[:, None]
    return nll @ weights, nll, d_logits @ head, d_logits.T @ hidden


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 21, 24])
def test_cross_entropy_for_any_number_of_tokens(monkeypatch, tokens):
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 8)
    generator = np.random.default_rng(tokens)
    hidden, head = generator.normal(size=(tokens, 6)), generator.normal(size=(11, 6))
    targets = generator.integers(0, 11, tokens)
    weights = generator.random(tokens) * (generator.random(tokens) < 0.6)
    expected = reference_cross_entropy(hidden, head, targets, weights)
    hidden, head, weights = (jnp.asarray(a, jnp.float32) for a in (hidden, head, weights))
    targets = jnp.asarray(targets, jnp.int32)

    def scaled(hidden, head):
        total, nll = chunked_cross_entropy(hidden, head, targets, weights)
        return 3.0 * total, nll

    plain, nll = chunked_cross_entropy(hidden, head, targets, weights)
    (total, nll_again), gradients = jax.value_and_grad(scaled, (0, 1), has_aux=True)(hidden, head)
    assert nll.shape == nll_again.shape == (tokens,)
    np.testing.assert_array_equal(nll, nll_again)
    np.testing.assert_allclose(plain, expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total, 3 * expected[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(nll, expected[1], rtol=1e-5)
    for found, truth in zip(gradients, expected[2:], strict=True):
        assert relative_error(np.asarray(found), 3 * truth) < 1e-6
    assert not np.asarray(gradients[0])[np.asarray(weights) == 0].any()


def test_huge_logits_do_not_overflow():
    """A sure and right prediction costs nothing, a sure and wrong one the logits' distance."""
    hidden = jnp.array([[1e15], [1e15]], jnp.float32)
    head = jnp.array([[1e15], [-1e15], [0.0]], jnp.float32)
    targets, weights = jnp.array([0, 2], jnp.int32), jnp.ones(2, jnp.float32)
    (_, nll), gradient = jax.value_and_grad(chunked_cross_entropy, 1, has_aux=True)(
        hidden, head, targets, weights
    )
    np.testing.assert_allclose(nll, [0.0, 1e30], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[1e15], [0.0], [-1e15]], rtol=1e-6)


def arrays_of(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.core.ShapedArray]:
    """Every array of a program, of the programs inside it too."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "shape"):
                yield variable.aval
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def largest_rows_of_logits(function: Callable, *arguments) -> int:
    """Of all arrays with a dim of the vocabulary's 101 and none of the 12 hidden, the most rows."""
    program = jax.make_jaxpr(function)(*arguments)
    logits = (a for a in arrays_of(program.jaxpr) if 101 in a.shape and 12 not in a.shape)
    return max(array.size // 101 for array in logits)


def test_logits_exist_a_chunk_at_a_time(monkeypatch):
    """256 predictions, MTP's included, in chunks of 16: no array holds more rows of logits."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 16)
    fields = tiny_config(vocab_size=101)
    config = run_config(model_config(fields), 32)
    model = model_of(config, oracle.random_weights(fields, seed=0))
    graph, params, bias = split_model(model)
    rows = jnp.zeros((4, 33), jnp.int32)

    def loss_of(params, documents):
        scalars = dict(predictions=jnp.float32(128), sequences=jnp.float32(4))
        return training_loss(
            nnx.merge(graph, params, bias),
            rows,
            documents,
            **scalars,
            mtp_weight=jnp.float32(0.3),
            balance_weight=1e-4,
        )

    differentiate = jax.value_and_grad(loss_of, has_aux=True)
    assert largest_rows_of_logits(differentiate, params, None) == 16
    assert largest_rows_of_logits(differentiate, params, rows) == 16
    sums = lambda rows: evaluation_sums(model, rows, None, jnp.zeros(101, jnp.int32))  # noqa: E731
    assert largest_rows_of_logits(sums, rows) == 16
    assert largest_rows_of_logits(model, rows) == 4 * 33  # the same search finds plain logits


@pytest.mark.parametrize("has_documents", [False, True])
def test_evaluation_counts_nats_targets_and_bytes(has_documents):
    fields = tiny_config()
    tensors = oracle.random_weights(fields, seed=4, std=0.3)
    rows = random_tokens(fields, 3, 10)
    documents = random_documents(rows.shape, seed=3) if has_documents else None
    sizes = np.random.default_rng(0).integers(0, 9, fields["vocab_size"])
    model = model_of(run_config(model_config(fields), 9), tensors)
    nll, count, size = evaluation_sums(
        model,
        jnp.asarray(rows, jnp.int32),
        None if documents is None else jnp.asarray(documents, jnp.int32),
        jnp.asarray(sizes, jnp.int32),
    )
    counted = np.ones((3, 9), bool)
    if documents is not None:
        counted = documents[:, 1:] == documents[:, :-1]
    expected = oracle.compute_losses(fields, tensors, rows, 0.0, 0.0, documents).main
    assert float(count) == counted.sum()
    assert float(nll / count) == pytest.approx(expected, rel=LOSSES)
    assert float(size) == sizes[rows[:, 1:]][counted].sum()
