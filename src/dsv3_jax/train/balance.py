"""Auxiliary-loss-free balance: the selection bias follows the load.

Source: DeepSeek-V3 Technical Report §2.1.2; Wang et al., arXiv 2408.15664.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def update_selection_bias(
    bias: Float[Array, "*layers experts"],
    load: Float[Array, "*layers experts"],
    rate: Float[Array, ""],
) -> Float[Array, "*layers experts"]:
    """The bias after a step: up by `rate` for experts below the mean load, down for those above.

    `load` counts the tokens of the whole batch. The report does not define overload; the mean is
    the usual reading. An expert at exactly the mean keeps its bias.
    """
    mean = jnp.mean(load, axis=-1, keepdims=True)
    return bias + rate * jnp.sign(mean - load)


def max_over_mean(load: Float[Array, "layers experts"]) -> Float[Array, ""]:
    """The busiest expert's load over the mean, the worst layer's; 1 is perfect balance."""
    return jnp.max(jnp.max(load, axis=-1) / jnp.mean(load, axis=-1))
