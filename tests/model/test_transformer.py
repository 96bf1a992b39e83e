"""The whole model against the oracle and Hugging Face's golden files; scanning, remat, decode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.router import Routing
from dsv3_jax.model.transformer import Transformer, stack
from tests.model.weights import (
    arrays_of,
    build_transformer,
    hub_arrays,
    load_golden,
    model_config,
)
from tests.oracle import forward, loss_and_gradients, random_weights
from tests.oracle.cases import TWO_DEPTHS, V2_CHANGES, YARN, random_tokens, tiny_config
from tests.programs import count_equations, dot_flops, quick_jit
from tests.tolerances import (
    FLOAT32_GRADIENTS,
    FLOAT32_LOGITS,
    assert_close,
)

NO_MTP = {"num_nextn_predict_layers": 0}
SHORT_YARN = YARN | {"factor": 4, "original_max_position_embeddings": 8}
V2_LITE = V2_CHANGES | {"topk_method": "greedy", "norm_topk_prob": True, "n_group": 1}

# Each case, and what taken back must change the logits or it would test nothing.
CASES = {
    "v3": (tiny_config(), {"routed_scaling_factor": 1.0}),
    "two MTP depths": (tiny_config(**TWO_DEPTHS), {"topk_group": 4}),
    "yarn, three dense layers, eight groups": (
        tiny_config(
            num_hidden_layers=4,
            first_k_dense_replace=3,
            n_routed_experts=16,
            n_group=8,
            topk_group=3,
            num_experts_per_tok=5,
            rope_scaling=SHORT_YARN,
        ),
        {"rope_scaling": None},
    ),
    "v2: softmax, best expert of a group, two shared experts, no query latent, mscale 0.707": (
        tiny_config(**V2_CHANGES, num_experts_per_tok=3),
        {"topk_method": "greedy"},
    ),
    "v2 lite: no groups": (
        tiny_config(**V2_LITE, topk_group=1, first_k_dense_replace=0),
        {"norm_topk_prob": False},
    ),
    "no shared expert": (tiny_config(**NO_MTP, n_shared_experts=0), {"norm_topk_prob": False}),
    "all dense": (
        tiny_config(**NO_MTP, first_k_dense_replace=2, n_routed_experts=0),
        {"rms_norm_eps": 1e-1},
    ),
}
GOLDEN = ["direct_q", "three_dense", "two_shared", "unnormalised", "yarn_hub", "yarn_mscale"]


@quick_jit
def compute(model, rows, documents):
    """Everything a forward pass gives: hidden, logits, MTP logits, load, balance losses."""
    states = model.hidden_states(rows, documents)
    mtp_logits = [model.logits(hidden) for hidden in states.mtp]
    return states.main, model.logits(states.main), mtp_logits, states.load, states.balance_loss


def assert_equals_the_oracle(model, config, weights, rows, documents=None):
    """All of `compute`; the oracle's MTP logits end where targets end, k positions earlier."""
    inputs = None if documents is None else documents[:, :-1]
    expected = forward(config, weights, rows[:, :-1], inputs)
    given = None if documents is None else jnp.asarray(inputs)
    hidden, logits, mtp_logits, load, balance = compute(model, jnp.asarray(rows), given)
    assert_close(hidden, expected.hidden, FLOAT32_LOGITS)
    assert_close(logits, expected.logits, FLOAT32_LOGITS)
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(expected.logits, -1))
    assert logits.dtype == jnp.float32
    for depth, of_depth in enumerate(expected.mtp_logits, start=1):
        assert_close(mtp_logits[depth - 1][:, :-depth], of_depth, FLOAT32_LOGITS)
    assert len(mtp_logits) == len(expected.mtp_logits)
    routing = [expected.routing[layer] for layer in sorted(expected.routing)]
    assert len(load) == len(balance) == len(routing)
    for found_load, found_balance, of_layer in zip(load, balance, routing, strict=True):
        np.testing.assert_array_equal(found_load, of_layer.load)
        assert_close(found_balance, of_layer.balance_loss, FLOAT32_LOGITS)
    return expected


@pytest.mark.parametrize("name", CASES)
def test_everything_equals_the_oracle(name):
    config, change = CASES[name]
    weights, rows = random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 22)
    model = build_transformer(model_config(config), weights)
    expected = assert_equals_the_oracle(model, config, weights, rows)
    other = forward(config | change, weights, rows[:, :-1])
    with pytest.raises(AssertionError, match="off by"):
        assert_close(other.logits, expected.logits, 1e3 * FLOAT32_LOGITS)


def test_documents_of_a_row_do_not_see_each_other():
    config = CASES["two MTP depths"][0] | {"rope_scaling": SHORT_YARN}
    weights, rows = random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 22)
    documents = np.array([[0] * 22, [4] * 7 + [5] * 1 + [9] * 14])
    model = build_transformer(model_config(config), weights)
    packed = assert_equals_the_oracle(model, config, weights, rows, documents)
    together = forward(config, weights, rows[:, :-1])
    with pytest.raises(AssertionError, match="off by"):
        assert_close(packed.logits, together.logits, 1e3 * FLOAT32_LOGITS)


@pytest.mark.parametrize(
    "name", ["odd_sizes", *(pytest.param(name, marks=pytest.mark.slow) for name in GOLDEN)]
)
def test_logits_equal_hugging_face(name):
    """The bar: at most 2e-4 of the largest logit, argmax equal. Routing is compared by its load.

    tests/export compares all cases in every run, as read from their files.
    """
    config, weights, golden = load_golden(name)
    model = build_transformer(model_config(config), weights)
    _, logits, _, load, _ = compute(model, jnp.asarray(golden["tokens"]), None)
    expected = golden["logits_float64"]
    assert_close(logits, expected, FLOAT32_LOGITS)
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(expected, -1))
    first = config["first_k_dense_replace"]
    for layer, found in enumerate(load, start=first):
        chosen = golden[f"top_k_index.{layer}"]
        np.testing.assert_array_equal(found, np.bincount(chosen.ravel(), minlength=len(found)))


DEEP = tiny_config(num_hidden_layers=3)  # one dense layer, two MoE layers, one MTP module
MTP_WEIGHT, BALANCE_WEIGHT = 0.3, 0.5


def loss_of(params, bias, graph, rows):
    """The report's loss (eq. 17-25), written out over whole logits."""
    states = nnx.merge(graph, params, bias).hidden_states(rows)
    model = nnx.merge(graph, params, bias)
    count = rows[:, 1:].size

    def mean_nll(hidden, distance):
        targets = rows[:, distance:]
        log_probs = jax.nn.log_softmax(model.logits(hidden)[:, : targets.shape[1]])
        return -jnp.sum(jnp.take_along_axis(log_probs, targets[..., None], axis=-1)) / count

    mtp = [mean_nll(hidden, depth + 1) for depth, hidden in enumerate(states.mtp, start=1)]
    total = mean_nll(states.main, 1) + BALANCE_WEIGHT * jnp.sum(states.balance_loss)
    return total + MTP_WEIGHT * sum(mtp) / max(len(mtp), 1)


value_and_gradients = quick_jit(jax.value_and_grad(loss_of), static_argnums=2)


def parts_of(config, weights, **options):
    graph, *arrays = nnx.split(
        build_transformer(model_config(config), weights, **options), nnx.Param, ...
    )
    return *arrays, graph


@pytest.mark.parametrize(
    ("scan_layers", "remat", "depths"),
    [(False, "none", 0), (True, "selective", 1), (True, "full", 0)],
)
def test_gradients_equal_the_oracle_however_they_are_computed(scan_layers, remat, depths):
    """Every tensor of every layer, the shared embedding and head included."""
    config = DEEP | {"num_nextn_predict_layers": depths}
    weights, rows = random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 13)
    losses, expected = loss_and_gradients(config, weights, rows, MTP_WEIGHT, BALANCE_WEIGHT)
    parts = parts_of(config, weights, scan_layers=scan_layers, remat=remat)
    loss, gradients = value_and_gradients(*parts, jnp.asarray(rows))
    assert float(loss) == pytest.approx(losses.loss, rel=1e-6)
    found = hub_arrays(model_config(config), gradients)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, FLOAT32_GRADIENTS, name)


def test_remat_computes_again_what_it_says():
    """selective: norms and MLA up-projections, whose attention is kept; full: every block."""
    weights, rows = random_weights(DEEP, seed=3), random_tokens(DEEP, 2, 13)
    flops = {}
    for remat in ("none", "selective", "full"):
        *arrays, graph = parts_of(DEEP, weights, remat=remat)
        traced = jax.make_jaxpr(jax.grad(loss_of), static_argnums=2)(
            *arrays, graph, jnp.asarray(rows)
        )
        flops[remat] = dot_flops(traced, while_trips=0)
    tokens, heads = 2 * 12, 2
    up = 7 * heads * 10 + 5 * heads * (4 + 3)  # q_b_proj, kv_b_proj
    blocks = 3 + 1
    assert flops["selective"] - flops["none"] == blocks * 2 * tokens * up
    assert flops["selective"] < flops["full"] < 4 / 3 * flops["none"]
    with pytest.raises(ValueError, match="remat is 'some', expected one of none, selective, full"):
        parts_of(DEEP, weights, remat="some")


def program_size(layers: int, scan_layers: bool) -> tuple[int, int]:
    """Equations of the traced forward pass, and lines of the program given to XLA."""
    config = model_config(DEEP | {"num_hidden_layers": layers, "first_k_dense_replace": 2} | NO_MTP)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), scan_layers=scan_layers))
    traced = compute.trace(model, jax.ShapeDtypeStruct((2, 9), jnp.int32), None)
    return count_equations(traced.jaxpr), traced.lower().as_text().count("\n")


def test_the_program_does_not_grow_with_depth():
    assert program_size(5, scan_layers=True) == program_size(20, scan_layers=True)
    few, many = (program_size(layers, scan_layers=False)[1] for layers in (5, 20))
    assert many > 2 * few  # unrolled, by choice


@quick_jit
def decode(model, tokens, positions, cache):
    hidden, cache = model.decode(tokens, positions, cache)
    return model.logits(hidden), cache


main_hidden = quick_jit(lambda model, tokens: model.main_hidden(tokens)[:2])


@pytest.fixture(scope="module")
def decoder():
    """A model with both kinds of layers, its tokens, and the oracle's logits of them."""
    config = DEEP | NO_MTP | {"rope_scaling": SHORT_YARN}
    weights, tokens = random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 17)
    expected = forward(config, weights, tokens)
    return build_transformer(model_config(config), weights), tokens, expected.logits


def test_decoding_one_by_one_equals_the_expanded_forward(decoder):
    """The logits of every position, and at the end the same latents in the cache."""
    model, tokens, expected = decoder
    cache = jnp.full((3, 2, 20, 5 + 6), 7.0)
    for position in range(17):
        here = jnp.full((2, 1), position)
        logits, cache = decode(model, jnp.asarray(tokens[:, position : position + 1]), here, cache)
        assert_close(logits[:, 0], expected[:, position], FLOAT32_LOGITS)
    _, latents = main_hidden(model, jnp.asarray(tokens))
    assert_close(cache[:, :, :17], latents, FLOAT32_LOGITS)
    np.testing.assert_array_equal(cache[:, :, 17:], 7.0)


def test_decoding_several_tokens_after_a_prefill_rows_apart(decoder):
    """Row 0 goes on from position 6, row 1 from 11; three tokens at once, layers unstacked."""
    model, tokens, expected = decoder
    _, latents = main_hidden(model, jnp.asarray(tokens))
    positions = np.array([[6, 7, 8], [11, 12, 13]])
    filled = np.arange(17)[:, None] < positions[:, :1, None]
    cache = jnp.asarray(np.where(filled, latents, 0.0))
    rows = np.arange(2)[:, None]
    given = jnp.asarray(tokens[rows, positions]), jnp.asarray(positions), cache
    logits, _ = decode(model, *given)
    assert_close(logits, expected[rows, positions], FLOAT32_LOGITS)


def test_padding_and_later_tokens_change_nothing_earlier(decoder):
    """60 equal tokens of padding all ask for the same experts; no real token is dropped."""
    model, tokens, expected = decoder
    padded = np.pad(tokens, ((0, 0), (0, 60)), constant_values=3)
    hidden, _ = main_hidden(model, jnp.asarray(padded))
    assert_close(model.logits(hidden)[:, :17], expected, FLOAT32_LOGITS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_model_gives_float32_logits(dtype):
    """And float32 statistics and biases; hidden states and cached latents are in its own dtype.

    tests/serve compares what a bfloat16 model generates with the oracle.
    """
    config = model_config(tiny_config())
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    for path, leaf in arrays_of(nnx.state(model)):
        is_bias = path[-1] == "e_score_correction_bias"
        assert leaf.dtype == ("float32" if is_bias else dtype), path
    rows = jax.ShapeDtypeStruct((2, 13), jnp.int32)
    hidden, logits, mtp_logits, load, balance = jax.eval_shape(compute, model, rows, None)
    assert hidden.dtype == dtype
    assert {a.dtype.name for a in (logits, *mtp_logits, load, balance)} == {"float32"}
    hidden, latents = jax.eval_shape(main_hidden, model, rows)
    assert hidden.dtype == latents.dtype == dtype
    assert [a.dtype for a in jax.eval_shape(decode, model, rows, rows, latents)] == [
        jnp.float32,
        latents.dtype,
    ]


class HashRouter(nnx.Module):
    """A user's router: the token's own expert by its first channel's sign, and a learned second."""

    def __init__(self, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.full((3,), 0.5))

    def __call__(self, x):
        first = jnp.where(x[:, 0] > 0, 0, 1)
        weights = jnp.stack([jnp.ones(x.shape[0]), jnp.full(x.shape[0], self.gain[...][0])], axis=1)
        scores = jnp.full((x.shape[0], 8), 0.5)
        return Routing(jnp.stack([first, first + 4], axis=1), weights, scores)


def test_a_users_router_replaces_ours_in_every_layer():
    config = tiny_config(**NO_MTP, first_k_dense_replace=0)
    weights, rows = random_weights(config, seed=3, std=0.3), random_tokens(config, 2, 13)
    model = build_transformer(model_config(config), weights)
    model.moe_layers.mlp.gate = stack(2, HashRouter, nnx.Rngs(1))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def value(params):
        states = nnx.merge(graph, params, rest).hidden_states(jnp.asarray(rows))
        return jnp.sum(states.main**2), states.load

    gradient, load = quick_jit(jax.grad(value, has_aux=True))(params)
    assert load.shape == (2, 8)
    np.testing.assert_array_equal(load[:, [2, 3, 6, 7]], 0)
    np.testing.assert_array_equal(load[:, :2], load[:, 4:6])
    np.testing.assert_array_equal(load[:, :2].sum(axis=1), 2 * 12)
    gain = gradient["moe_layers"]["mlp"]["gate"]["gain"][...]
    assert np.all(np.abs(gain[:, 0]) > 1e-6) and np.all(gain[:, 1:] == 0)


def test_initial_weights_follow_the_seed():
    """N(0, 0.006) as published, every layer its own draw; norms are one and biases zero."""
    changes = {"first_k_dense_replace": 0, "hidden_size": 64, "q_lora_rank": None}
    config = model_config(tiny_config(**NO_MTP, **changes))
    make = quick_jit(lambda key: nnx.state(Transformer(config, rngs=nnx.Rngs(key))))
    one, same, other = (dict(arrays_of(make(jax.random.key(seed)))) for seed in (0, 0, 1))
    for path, array in one.items():
        np.testing.assert_array_equal(array, same[path])
        if any("norm" in name for name in path):
            np.testing.assert_array_equal(array, 1)
        elif path[-1] == "e_score_correction_bias":
            np.testing.assert_array_equal(array, 0)
        else:
            assert float(jnp.std(array)) == pytest.approx(0.006, rel=0.2), path
            assert not np.any(np.asarray(array) == np.asarray(other[path])), path
    layers = one["moe_layers", "mlp", "experts", "down_proj"]
    assert not np.any(np.asarray(layers[0]) == np.asarray(layers[1]))
