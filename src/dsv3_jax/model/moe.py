"""The mixture-of-experts layer: router, routed experts, shared experts."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.expert_slots import ExpertSlots
from dsv3_jax.model.experts import Experts
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.router import (
    LoadStatistics,
    Router,
    Routing,
    expert_load,
    load_statistics,
)
from dsv3_jax.parallel.dispatch import Dispatcher, Sent
from dsv3_jax.parallel.exchange_plan import NO_EXPERT
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.quant.recipe import UNQUANTISED, Recipe


class MoE(nnx.Module):
    """y = shared(x) + sum_k g_k expert_k(x). `gate` may be any callable that returns a `Routing`.

    The shared experts are one MLP of `n_shared_experts` times the expert width. `slots`, where a
    server sets it, says where the experts are that it has placed by load.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        dispatcher: Dispatcher | None = None,
        recipe: Recipe = UNQUANTISED,
    ):
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shape = {"std": config.initializer_range, "dtype": dtype, "rngs": rngs}
        self.gate = Router(config, dtype=dtype, rngs=rngs)
        self.experts = Experts(
            config.n_routed_experts, hidden, width, **shape, dispatcher=dispatcher
        )
        if config.n_shared_experts:
            self.shared_experts = MLP(
                hidden, width * config.n_shared_experts, **shape, recipe=recipe
            )
        self.slots: ExpertSlots | None = nnx.data(None)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        valid: int | None = None,
        tape: Tape = AUTODIFF,
    ) -> tuple[Float[Array, "batch seq hidden"], LoadStatistics]:
        """The output and the load over the first `valid` positions (None: all) of each sequence."""
        routing, statistics = self.route(x, valid, tape)
        sent, parameters = self.dispatch(x, routing, tape)
        sent, shared = self.compute(x, sent, parameters, tape)
        return self.combine(sent, shared, parameters), statistics

    def serve(
        self, x: Float[Array, "batch seq hidden"], valid: Bool[Array, "batch seq"]
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, " experts"]]:
        """The output, and how many of the `valid` tokens went to each expert; the others go to
        none and come out as what the shared experts make of them."""
        with jax.named_scope("router"):
            routing = self.gate(x.reshape(-1, x.shape[-1]))
            experts = jnp.where(valid.reshape(-1, 1), routing.experts, NO_EXPERT)
            load = expert_load(experts, self.config.n_routed_experts)
            places = experts if self.slots is None else self.slots(experts)
        sent, parameters = self.dispatch(x, routing._replace(experts=places), AUTODIFF)
        sent, shared = self.compute(x, sent, parameters, AUTODIFF)
        return self.combine(sent, shared, parameters), load

    # The parts, between which a pipeline has another micro-batch's parts done

    def route(
        self, x: Float[Array, "batch seq hidden"], valid: int | None, tape: Tape
    ) -> tuple[Routing, LoadStatistics]:
        """Where the tokens go, and the load."""
        batch, seq, hidden = x.shape
        with jax.named_scope("router"):
            routing = self.gate(x.reshape(batch * seq, hidden))
            chosen = tape.keep("chosen_experts", routing.experts)
            routing = routing._replace(experts=chosen)
            return routing, load_statistics(
                routing, batch, seq if valid is None else valid, config=self.config
            )

    def dispatch(
        self, x: Float[Array, "batch seq hidden"], routing: Routing, tape: Tape
    ) -> tuple[Sent, Any]:
        """The rows that come to this device's experts, and the experts' parameters (what is trained
        of them)."""
        rows = x.reshape(-1, x.shape[-1])
        with jax.named_scope("routed_experts"), jax.named_scope("dispatch"):
            return self.experts.dispatch(rows, routing.experts, routing.weights, tape)

    def compute(
        self, x: Float[Array, "batch seq hidden"], sent: Sent, parameters: Any, tape: Tape
    ) -> tuple[Sent, Float[Array, "batch seq hidden"]]:
        """What the routed experts here make of what was sent, and the shared experts of `x`."""
        with jax.named_scope("routed_experts"):
            sent = self.experts.compute(sent, parameters, tape)
        if not self.config.n_shared_experts:
            return sent, jnp.zeros_like(x)
        with jax.named_scope("shared_experts"):
            return sent, self.shared_experts(x, tape)

    def combine(
        self, sent: Sent, shared: Float[Array, "batch seq hidden"], parameters: Any
    ) -> Float[Array, "batch seq hidden"]:
        """Routed and shared experts' sums for every token."""
        with jax.named_scope("routed_experts"), jax.named_scope("combine"):
            y = self.experts.combine(sent, parameters)
        return y.reshape(shared.shape) + shared
