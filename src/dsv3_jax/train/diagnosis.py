"""Where a loss or gradient first stopped being finite."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from dsv3_jax.model.rope import rotary
from dsv3_jax.model.transformer import Transformer, unstack


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the message names step, layer and checkpoint."""


def first_non_finite(
    model: Transformer, rows: Int[Array, "batch seq_and_one"], squares: nnx.State
) -> str:
    """The place to look first: a weight, else an activation, else a gradient.

    `squares` holds each tensor's sum of squared gradients. Backward runs from the head down, so of
    the gradients the last layer's is the first that went wrong.
    """
    weights = [name for name, leaf in _named(nnx.state(model, nnx.Param)) if not _finite(leaf)]
    if weights:
        return f"weight {weights[0]}"
    activation = _first_activation(model, rows)
    if activation is not None:
        return f"activations after {activation}"
    gradients = [name for name, leaf in _named(squares) if not _finite(leaf)]
    if gradients:
        return f"gradient of {gradients[-1]}"
    return "the loss alone: weights, activations and gradients are finite one by one"


def _first_activation(model: Transformer, rows: Int[Array, "batch seq_and_one"]) -> str | None:
    """Runs the model layer by layer; the first module with a non-finite output."""
    tokens = rows[:, :-1]
    angles = rotary(model.config, jnp.arange(tokens.shape[1])[None])
    x = model.embed(tokens)
    if not _finite(x):
        return "embed_tokens"
    layers = []
    if model.config.num_dense_layers:
        layers += unstack(model.dense_layers)
    if model.config.num_moe_layers:
        layers += unstack(model.moe_layers)
    for index, layer in enumerate(layers):
        x = layer(x, angles)[0]
        if not _finite(x):
            return f"layer {index}"
    hidden = model.norm(x)
    if not _finite(model.logits(hidden)):
        return "lm_head"
    modules = unstack(model.mtp) if model.config.num_nextn_predict_layers else []
    for depth, module in enumerate(modules, start=1):
        embedded = model.embed(jnp.pad(rows[:, depth:], ((0, 0), (0, depth - 1))))
        hidden = module(hidden, embedded, angles, None, tokens.shape[1] - depth)[0]
        if not (_finite(hidden) and _finite(model.logits(hidden))):
            return f"mtp[{depth - 1}]"
    return None


def _named(tree: nnx.State) -> list[tuple[str, jax.Array]]:
    """(name, array) in order of execution, stacked tensors layer by layer."""
    order = {"embed_tokens": 0, "dense_layers": 1, "moe_layers": 2, "norm": 3, "mtp": 4}
    named = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
        stacked = keys[0] in ("dense_layers", "moe_layers", "mtp")
        for layer, part in enumerate(leaf) if stacked else [(0, leaf)]:
            name = f"{keys[0]}[{layer}]." + ".".join(keys[1:]) if stacked else ".".join(keys)
            named.append((order.get(keys[0], 5), layer, name, part))
    named.sort(key=lambda entry: entry[:3])
    return [(name, part) for _, _, name, part in named]


def _finite(array: jax.Array) -> bool:
    return bool(np.all(np.isfinite(np.asarray(array, np.float32))))
