"""The SwiGLU feed-forward network of dense layers and shared experts."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_jax.model.linear import Linear
from dsv3_jax.parallel.tape import AUTODIFF, Tape


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)), three bias-free matrices."""

    def __init__(
        self, hidden: int, intermediate: int, *, std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        shape = {"std": std, "dtype": dtype, "rngs": rngs}
        self.gate_proj = Linear(hidden, intermediate, **shape)
        self.up_proj = Linear(hidden, intermediate, **shape)
        self.down_proj = Linear(intermediate, hidden, **shape)

    def __call__(
        self, x: Float[Array, "*batch hidden"], tape: Tape = AUTODIFF
    ) -> Float[Array, "*batch hidden"]:
        gate = tape.keep("mlp_gate", self.gate_proj(x, tape, "gate_proj"))
        up = tape.keep("mlp_up", self.up_proj(x, tape, "up_proj"))
        return self.down_proj(jax.nn.silu(gate) * up, tape, "mlp_down_proj")
