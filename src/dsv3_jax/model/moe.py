"""The mixture-of-experts layer: router, routed experts, shared experts."""

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.experts import Experts
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.router import LoadStatistics, Router, load_statistics
from dsv3_jax.parallel.dispatch import ExpertFunction
from dsv3_jax.parallel.tape import AUTODIFF, Tape


class MoE(nnx.Module):
    """y = shared(x) + sum_k g_k expert_k(x). `gate` may be any callable that returns a `Routing`.

    The shared experts are one MLP of `n_shared_experts` times the expert width.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        dispatcher: ExpertFunction | None = None,
    ):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shape = {"std": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.gate = Router(config, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            config.n_routed_experts, hidden, width, **shape, dispatcher=dispatcher
        )
        if config.n_shared_experts:
            self.shared_experts = MLP(hidden, width * config.n_shared_experts, **shape)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        valid: int | None = None,
        tape: Tape = AUTODIFF,
    ) -> tuple[Float[Array, "batch seq hidden"], LoadStatistics]:
        """The output and the load over the first `valid` positions (None: all) of each sequence."""
        batch, seq, hidden = x.shape
        rows = x.reshape(batch * seq, hidden)
        with jax.named_scope("router"):
            routing = self.gate(rows)
            chosen = tape.keep("chosen_experts", routing.experts)
            routing = routing._replace(experts=chosen)
            statistics = load_statistics(
                routing, batch, seq if valid is None else valid, config=self.config
            )
        with jax.named_scope("routed_experts"):
            y = self.experts(rows, routing, tape).reshape(x.shape)
        if self.config.n_shared_experts:
            with jax.named_scope("shared_experts"):
                y = y + self.shared_experts(x, tape)
        return y, statistics
