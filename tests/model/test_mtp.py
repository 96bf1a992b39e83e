"""Multi-token prediction: the published formula, Hugging Face's module, and what is shared."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.model.transformer import Transformer
from tests.model.weights import arrays_of, build_transformer, load_golden, model_config
from tests.oracle import forward, random_weights
from tests.oracle.cases import TWO_DEPTHS, random_tokens, tiny_config
from tests.programs import quick_jit
from tests.tolerances import FLOAT32_LOGITS, assert_close

CONFIG = tiny_config(**TWO_DEPTHS)


@quick_jit
def mtp_logits(model, rows):
    return [model.logits(hidden) for hidden in model.hidden_states(rows).mtp]


@pytest.fixture(scope="module")
def weights():
    return random_weights(CONFIG, seed=3, std=0.3)


def test_embedding_comes_first_and_the_hidden_state_is_normed(weights):
    """With attention and experts silenced the block is the identity, so depth 1 has a formula."""
    silent = dict(weights)
    for name, value in weights.items():
        if name.startswith("model.layers.1.") and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            silent[name] = np.zeros_like(value)
    rows = random_tokens(CONFIG, 2, 10)
    model = build_transformer(model_config(CONFIG), silent)
    hidden = forward(CONFIG, silent, rows[:, :-1], mtp=False).hidden

    def norm(x, name):
        scale = silent[f"model.layers.1.{name}.weight"]
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale

    of_embedding, of_hidden = np.split(silent["model.layers.1.eh_proj.weight"], 2, axis=1)
    following = silent["model.embed_tokens.weight"][rows[:, 1:]]
    mixed = norm(following, "enorm") @ of_embedding.T + norm(hidden, "hnorm") @ of_hidden.T
    expected = norm(mixed, "shared_head.norm") @ silent["lm_head.weight"].T
    assert_close(mtp_logits(model, jnp.asarray(rows))[0], expected, FLOAT32_LOGITS)


def test_depth_k_reads_k_tokens_ahead_and_no_further(weights):
    """Position i of depth k sees tokens up to i + k: changing token 6 moves i >= 6 - k alone."""
    rows = random_tokens(CONFIG, 2, 10)
    changed = rows.copy()
    changed[:, 6] = (changed[:, 6] + 1) % CONFIG["vocab_size"]
    model = build_transformer(model_config(CONFIG), weights)
    one, other = (mtp_logits(model, jnp.asarray(batch)) for batch in (rows, changed))
    for depth in (1, 2):
        moved = np.abs(np.asarray(one[depth - 1]) - np.asarray(other[depth - 1])).max(axis=(0, 2))
        assert np.all(moved[: 6 - depth] < 1e-5), depth
        assert np.all(moved[6 - depth : 9 - depth] > 1e-3), depth


def test_logits_equal_hugging_face():
    """The last position has no target, but its logits are the same too."""
    config, weights, golden = load_golden("mtp")
    config = model_config(config, num_nextn_predict_layers=1)
    model = build_transformer(config, weights)
    (found,) = mtp_logits(model, jnp.asarray(golden["tokens"]))
    assert_close(found, golden["mtp_logits_float64"], FLOAT32_LOGITS)


def test_embedding_and_head_are_the_main_models():
    """A module has two norms, the joining matrix, a block and its last norm, stacked by depth."""
    config = model_config(CONFIG)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    shapes = {".".join(path): leaf.shape for path, leaf in arrays_of(nnx.state(model))}
    own = {n.removeprefix("mtp."): s for n, s in shapes.items() if n.startswith("mtp.")}
    outside_block = {name: shape for name, shape in own.items() if not name.startswith("block.")}
    assert outside_block == {
        "enorm.weight": (2, 12),
        "hnorm.weight": (2, 12),
        "eh_proj.weight": (2, 12, 24),
        "shared_head.norm.weight": (2, 12),
    }
    block = {n.removeprefix("block."): s[1:] for n, s in own.items() if n.startswith("block.")}
    main = {n: s[1:] for n, s in shapes.items() if n.startswith("moe_layers.")}
    assert block == {n.removeprefix("moe_layers."): s for n, s in main.items()}
