"""Where a loss or gradient first stopped being finite."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.rope import rotary
from dsv3_jax.model.transformer import Transformer


class NonFiniteError(ArithmeticError):
    """A loss or gradient was NaN or infinite; the message names step, layer and checkpoint."""


def first_non_finite(
    config: ModelConfig,
    params: nnx.State,
    broken: Bool[np.ndarray, " places"],
    squares: nnx.State,
) -> str:
    """The place to look first: a weight, else an activation, else a gradient.

    `broken` says of each of `activation_places` whether `broken_activations` found it so. `squares`
    holds each tensor's sum of squared gradients. Backward runs from the head down, so of the
    gradients the last layer's is the first that went wrong.
    """
    weights = [name for name, leaf in _named(params) if not _finite(leaf)]
    if weights:
        return f"weight {weights[0]}"
    if broken.any():
        return f"activations after {activation_places(config)[int(broken.argmax())]}"
    gradients = [name for name, leaf in _named(squares) if not _finite(leaf)]
    if gradients:
        return f"gradient of {gradients[-1]}"
    return "the loss alone: weights, activations and gradients are finite one by one"


def activation_places(config: ModelConfig) -> list[str]:
    """Names of what `broken_activations` looks at, in order of execution."""
    layers = [f"layer {index}" for index in range(config.num_hidden_layers)]
    modules = [f"mtp[{index}]" for index in range(config.num_nextn_predict_layers)]
    return ["embed_tokens", *layers, "lm_head", *modules]


def broken_activations(
    model: Transformer, rows: Int[Array, "batch seq_and_one"]
) -> Bool[Array, " places"]:
    """Whether the output of each of `activation_places` is not finite for these rows."""
    tokens = rows[:, :-1]
    angles = rotary(model.config, jnp.arange(tokens.shape[1])[None])
    outputs = [[model.embed(tokens)]]
    for layer in model.unstacked_layers():
        outputs.append([layer(outputs[-1][0], angles)[0]])
    hidden = model.norm(outputs[-1][0])
    outputs.append([model.logits(hidden)])
    modules = model.layers("mtp") if model.config.num_nextn_predict_layers else []
    for depth, module in enumerate(modules, start=1):
        embedded = model.embed(jnp.pad(rows[:, depth:], ((0, 0), (0, depth - 1))))
        hidden = module(hidden, embedded, angles, None, tokens.shape[1] - depth)[0]
        outputs.append([hidden, model.logits(hidden)])
    finite = [[jnp.all(jnp.isfinite(array)) for array in arrays] for arrays in outputs]
    return ~jnp.stack([jnp.all(jnp.stack(of_place)) for of_place in finite])


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
    return bool(jnp.all(jnp.isfinite(array)))  # by JAX: shards may lie on other hosts
