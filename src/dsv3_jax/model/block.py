"""Transformer blocks: attention and a feed-forward part, each behind an RMSNorm."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MultiHeadLatentAttention
from dsv3_jax.model.cache import NewTokens, Pool
from dsv3_jax.model.mlp import MLP
from dsv3_jax.model.moe import MoE
from dsv3_jax.model.norm import RMSNorm
from dsv3_jax.model.rope import Rotary
from dsv3_jax.model.router import LoadStatistics, Routing
from dsv3_jax.parallel.dispatch import Dispatcher, Sent
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.quant.recipe import Recipe


class Recompute(NamedTuple):
    """What backward computes again; each field wraps a function (identity or jax.checkpoint)."""

    norm: Callable[[Callable], Callable]
    up_projection: Callable[[Callable], Callable]
    block: Callable[[Callable], Callable]


def _keep(function: Callable) -> Callable:
    return function


_UP_PROJECTIONS = partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names("attention_output", "attention_lse"),
)
RECOMPUTE = {
    "none": Recompute(_keep, _keep, _keep),
    "selective": Recompute(jax.checkpoint, _UP_PROJECTIONS, _keep),
    "full": Recompute(_keep, _keep, jax.checkpoint),
}
"""By `train.remat`. `selective` is the published choice: every RMSNorm and the MLA up-projections,
whose attention is not computed again."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with a dense MLP or a MoE."""

    mlp: Any
    """A MoE where the block is routed, else an MLP."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        routed: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        recompute: Recompute,
        dispatcher: Dispatcher | None,
        recipe: Recipe,
    ):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = MultiHeadLatentAttention(
            config, dtype=dtype, rngs=rngs, recompute=recompute.up_projection, recipe=recipe
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        if routed:
            self.mlp = MoE(config, dtype=dtype, rngs=rngs, dispatcher=dispatcher, recipe=recipe)
        else:
            self.mlp = MLP(
                config.hidden_size,
                config.intermediate_size,
                std=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
                recipe=recipe,
            )
        self.routed = routed
        self.recompute_norm = recompute.norm

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rotary: Rotary,
        documents: Int[Array, "batch seq"] | None = None,
        valid: int | None = None,
        tape: Tape = AUTODIFF,
    ) -> tuple[
        Float[Array, "batch seq hidden"], Float[Array, "batch seq latent"], LoadStatistics | None
    ]:
        """The output, the latents a cache would hold, and (MoE only) the load."""
        state = self.attend(x, rotary, documents, valid, tape)
        state = self.combine(self.compute(self.dispatch(state, tape), tape))
        assert state.latent is not None  # attend made it
        return state.x, state.latent, state.statistics

    # The parts, between which a pipeline has another micro-batch's parts done. All transfers of a
    # MoE block are in `dispatch` and `combine`.

    def attend(
        self,
        x: Float[Array, "batch seq hidden"],
        rotary: Rotary,
        documents: Int[Array, "batch seq"] | None,
        valid: int | None,
        tape: Tape,
    ) -> "BlockState":
        """Attention, and what is to be sent to the experts."""
        with jax.named_scope("attention"):
            normed = self.recompute_norm(self.input_layernorm)(x)
            attended, latent = self.self_attn(normed, rotary, documents, tape)
            x = tape.keep("attention_residual", x + attended)
        normed = self.recompute_norm(self.post_attention_layernorm)(x)
        routing, statistics = self.mlp.route(normed, valid, tape) if self.routed else (None, None)
        if routing is not None:
            routing = routing._replace(scores=None)
        return BlockState(x, normed, latent, statistics, routing)

    def dispatch(self, state: "BlockState", tape: Tape) -> "BlockState":
        """The rows that come to this device's experts."""
        if not self.routed:
            return state
        sent, parameters = self.mlp.dispatch(state.normed, state.routing, tape)
        return state._replace(sent=sent, parameters=parameters, routing=None)

    def compute(self, state: "BlockState", tape: Tape) -> "BlockState":
        """What the experts, or the MLP, make of them."""
        if self.routed:
            parts = state.normed, state.sent, state.parameters
            sent, shared = self.mlp.compute(*parts, tape)
            return state._replace(sent=sent, normed=shared)
        with jax.named_scope("dense_mlp"):
            return state._replace(normed=self.mlp(state.normed, tape))

    def combine(self, state: "BlockState") -> "BlockState":
        """The block's output `x`."""
        y = state.normed
        assert y is not None  # compute made it
        if self.routed:
            y = self.mlp.combine(state.sent, y, state.parameters)
        return BlockState(state.x + y, None, state.latent, state.statistics)

    def decode(
        self,
        x: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        cache: Float[Array, "batch cached latent"],
        positions: Int[Array, "batch queries"],
    ) -> tuple[Float[Array, "batch queries hidden"], Float[Array, "batch cached latent"]]:
        """The output for new tokens at `positions`, and the cache with their latents written."""
        normed = self.input_layernorm(x)
        latent = self.self_attn.compress(normed, rotary)
        rows = jnp.arange(x.shape[0])[:, None]
        cache = cache.at[rows, positions].set(latent.astype(cache.dtype))
        x = x + self.self_attn.decode(normed, rotary, cache, positions)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed)[0] if self.routed else self.mlp(normed)), cache

    def extend(
        self,
        x: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        pool: Pool,
        new: NewTokens,
        first_page: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch queries hidden"], Pool, Float[Array, " experts"] | None]:
        """The output for new tokens of some requests, the pool with their latents, and (MoE only)
        how many of them went to each expert."""
        with jax.named_scope("attention"):
            normed = self.input_layernorm(x)
            attended, pool = self.self_attn.extend(normed, rotary, pool, new, first_page)
        x = x + attended
        normed = self.post_attention_layernorm(x)
        if not self.routed:
            with jax.named_scope("dense_mlp"):
                return x + self.mlp(normed), pool, None
        y, load = self.mlp.serve(normed, new.valid)
        return x + y, pool, load


class BlockState(NamedTuple):
    """What one part of a block hands to the next; None where it has none."""

    x: Float[Array, "batch seq hidden"]
    """The residual stream."""
    normed: Float[Array, "batch seq hidden"] | None
    """What the feed-forward part reads; after `compute` what the MLP or the shared experts made."""
    latent: Float[Array, "batch seq latent"] | None
    """What a cache would hold."""
    statistics: LoadStatistics | None
    routing: Routing | None = None
    sent: Sent | None = None
    parameters: Any = None
    """The experts' own, as `Dispatcher.dispatch` gives them back."""
