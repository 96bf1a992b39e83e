"""Multi-token prediction: a module of depth k predicts the token k + 1 ahead.

Source: DeepSeek-V3 Technical Report §2.2. The released weights concatenate [embedding ; hidden]
(equation 21 prints the reverse) and take the main model's hidden state after its final norm.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import Block, Recompute
from dsv3_jax.model.cache import NewTokens, Pool
from dsv3_jax.model.linear import Linear
from dsv3_jax.model.norm import RMSNorm
from dsv3_jax.model.rope import Rotary
from dsv3_jax.model.router import LoadStatistics
from dsv3_jax.parallel.dispatch import Dispatcher
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.quant.recipe import Recipe


class SharedHead(nnx.Module):
    """The norm before the output head, which is the main model's own."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike):
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class MultiTokenPredictor(nnx.Module):
    """norm(block(M_k [enorm(embedding) ; hnorm(hidden)])); embedding and head are shared."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        recompute: Recompute,
        dispatcher: Dispatcher | None,
        recipe: Recipe,
    ):
        hidden = config.hidden_size
        norm = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.enorm = RMSNorm(hidden, **norm)
        self.hnorm = RMSNorm(hidden, **norm)
        self.eh_proj = Linear(
            2 * hidden, hidden, std=config.initializer_range, dtype=dtype, rngs=rngs
        )
        self.block = Block(
            config,
            routed=True,
            dtype=dtype,
            rngs=rngs,
            recompute=recompute,
            dispatcher=dispatcher,
            recipe=recipe,
        )
        self.shared_head = SharedHead(config, dtype=dtype)

    def __call__(
        self,
        hidden: Float[Array, "batch seq hidden"],
        embedded: Float[Array, "batch seq hidden"],
        rotary: Rotary,
        documents: Int[Array, "batch seq"] | None,
        valid: int,
        tape: Tape = AUTODIFF,
    ) -> tuple[Float[Array, "batch seq hidden"], LoadStatistics]:
        """This depth's hidden states (normed, ready for the head) and its load.

        `embedded` is the embedding of the token k ahead of each position.
        """
        with jax.named_scope("mtp"):
            x = self.join(hidden, embedded, tape)
            x, _, statistics = self.block(x, rotary, documents, valid, tape)
            assert statistics is not None  # the block is routed
            return self.shared_head.norm(x), statistics

    def extend(
        self,
        hidden: Float[Array, "batch queries hidden"],
        embedded: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        pool: Pool,
        new: NewTokens,
        first_page: int,
    ) -> tuple[Float[Array, "batch queries hidden"], Pool]:
        """The same for new tokens of some requests, whose earlier ones are in the paged cache."""
        with jax.named_scope("mtp"):
            x = self.join(hidden, embedded, AUTODIFF)
            x, pool, _ = self.block.extend(x, rotary, pool, new, first_page)
            return self.shared_head.norm(x), pool

    def join(
        self,
        hidden: Float[Array, "batch seq hidden"],
        embedded: Float[Array, "batch seq hidden"],
        tape: Tape,
    ) -> Float[Array, "batch seq hidden"]:
        """What the block reads."""
        joined = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        return self.eh_proj(joined, tape, "eh_proj")
