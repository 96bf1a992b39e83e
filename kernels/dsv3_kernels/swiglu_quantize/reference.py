"""SwiGLU, the routing weight and quantisation in one: the definition.

    a = gate / (1 + exp(-gate)) * up * weight      in FP32, from h = [gate ; up]
    a rounded once to h's dtype, then quantised as `quantize.reference` has it

Rows from `filled` on are not there: whatever h holds in them, a is zero.
Source: DeepSeek-V3 Technical Report §3.3 (SwiGLU's input is kept, its output computed again).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_kernels.quantize import reference


def swiglu_quantize(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch rows width"], Float[Array, "*batch rows width_tiles"]]:
    """a in E4M3 with an FP32 scale for each 1x128 tile."""
    return reference.quantize(activation(h, weights, filled), power_of_two=power_of_two)


def swiglu_quantize_transposed(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    filled: Int[Array, "*batch"] | None = None,
    *,
    power_of_two: bool = False,
) -> tuple[Float[Array, "*batch width rows"], Float[Array, "*batch width row_tiles"]]:
    """The transpose of a, in 1x128 tiles of its own."""
    a = jnp.swapaxes(activation(h, weights, filled), -1, -2)
    return reference.quantize(a, power_of_two=power_of_two)


def activation(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None,
    filled: Int[Array, "*batch"] | None,
) -> Float[Array, "*batch rows width"]:
    """silu(gate) * up * weight in h's dtype, zeros in the rows that are not there."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    a = silu(gate) * up
    if weights is not None:
        a *= weights.astype(jnp.float32)[..., None]
    return _where_filled(a, filled).astype(h.dtype)


def silu(gate: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """gate / (1 + exp(-gate)), of FP32."""
    return gate / (1 + jnp.exp(-gate))


def swiglu_backward(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None,
    d_a: Float[Array, "*batch rows width"],
    filled: Int[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch rows double_width"], Float[Array, "*batch rows"] | None]:
    """The gradients of h, in its dtype, and of `weights`, in FP32; roundings count as nothing."""
    gate, up = jnp.split(h.astype(jnp.float32), 2, axis=-1)
    (swish, slope), d_product, d_weights = silu_and_slope(gate), d_a.astype(jnp.float32), None
    if weights is not None:
        d_weights = jnp.sum(_where_filled(swish * up * d_product, filled), axis=-1)
        d_product *= weights.astype(jnp.float32)[..., None]
    d_h = d_product * up * slope, d_product * swish
    d_h = jnp.concatenate([_where_filled(part, filled) for part in d_h], axis=-1)
    return d_h.astype(h.dtype), d_weights


def silu_and_slope(
    gate: Float[Array, "*any"],
) -> tuple[Float[Array, "*any"], Float[Array, "*any"]]:
    """silu(gate) and its derivative, of FP32."""
    sigmoid = 1 / (1 + jnp.exp(-gate))
    swish = gate * sigmoid
    return swish, sigmoid + swish * (1 - sigmoid)


def _where_filled(
    x: Float[Array, "*batch rows columns"], filled: Int[Array, "*batch"] | None
) -> Float[Array, "*batch rows columns"]:
    if filled is None:
        return x
    is_there = jnp.arange(x.shape[-2]) < filled[..., None]
    return jnp.where(is_there[..., None], x, 0)
