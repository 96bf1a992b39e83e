"""The SwiGLU feed-forward network of dense layers and shared experts."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_jax.model.linear import Linear, product_of
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.quant.recipe import Recipe


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), three bias-free matrices."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        recipe: Recipe,
    ):
        def linear(name: str, in_dim: int, out_dim: int) -> Linear:
            product = product_of(recipe, name)
            return Linear(in_dim, out_dim, std=std, dtype=dtype, rngs=rngs, product=product)

        self.gate_proj = linear("gate_proj", hidden, intermediate)
        self.up_proj = linear("up_proj", hidden, intermediate)
        self.down_proj = linear("mlp_down_proj", intermediate, hidden)
        self.codec = recipe.codec("mlp_gate")

    def __call__(
        self, x: Float[Array, "*batch hidden"], tape: Tape = AUTODIFF
    ) -> Float[Array, "*batch hidden"]:
        def finish(gate, up, weight):
            product = self.down_proj.product
            return tape.linear("mlp_down_proj", product, jax.nn.silu(gate) * up, weight)

        gate, up = self.gate_proj(x, tape, "gate_proj"), self.up_proj(x, tape, "up_proj")
        names, weight = ("mlp_gate", "mlp_up"), self.down_proj.weight[...]
        return tape.from_kept(names, self.codec, finish, gate, up, weight)
