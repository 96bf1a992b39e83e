"""Multi-head latent attention, expanded (training, prefill) and absorbed (decode).

Keys and values of a token are up-projections of one latent c_KV of `kv_lora_rank` values; one
rotary key k_R of `qk_rope_head_dim` values is shared by all heads. Only [c_KV ; k_R] is cached.

    expanded   k = [W_UK c_KV ; k_R], v = W_UV c_KV, then ordinary causal attention
    absorbed   score = (W_UK^T q_nope) . c_KV + q_rope . k_R,  out = W_UV (probs . c_KV)

Both give the same numbers; the absorbed form never expands the cache.
Source: DeepSeek-V3 Technical Report §2.1.1 (equations 1-11).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.cache import NewTokens, Pool, packed, unpacked, write
from dsv3_jax.model.chunked_attention import attend_to_prompt
from dsv3_jax.model.linear import Linear, plain, product_of
from dsv3_jax.model.norm import LATENT_NORM_EPS, RMSNorm
from dsv3_jax.model.rope import Rotary, rotate, softmax_scale
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.quant.recipe import Recipe
from dsv3_kernels.mla_decode.op import mla_decode, mla_decode_rows
from dsv3_kernels.mla_prefill.op import mla_prefill, with_gradients
from dsv3_kernels.target import is_hopper

KERNEL_QUERIES = 4
"""New tokens of a request that the Hopper kernel of the absorbed form takes."""


class MultiHeadLatentAttention(nnx.Module):
    """MLA with Hugging Face's parameter names. `q_lora_rank=None` has one `q_proj`.

    `recompute` wraps the part from latents to head outputs: identity, or `jax.checkpoint` to redo
    the up-projections in backward instead of keeping q, k and v.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        recompute: Callable[[Callable], Callable],
        recipe: Recipe,
    ):
        heads, std = config.num_attention_heads, config.initializer_range

        def linear(name: str, in_dim: int, out_dim: int) -> Linear:
            product = product_of(recipe, name)
            return Linear(in_dim, out_dim, std=std, dtype=dtype, rngs=rngs, product=product)

        if config.q_lora_rank is None:
            self.q_proj = linear("q_proj", config.hidden_size, heads * config.qk_head_dim)
        else:
            self.q_a_proj = linear("q_a_proj", config.hidden_size, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS, dtype=dtype)
            self.q_b_proj = linear("q_proj", config.q_lora_rank, heads * config.qk_head_dim)
        latent_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = linear("kv_a_proj_with_mqa", config.hidden_size, latent_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=LATENT_NORM_EPS, dtype=dtype)
        up_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = linear("kv_b_proj", config.kv_lora_rank, up_dim)
        self.o_proj = linear("o_proj", heads * config.v_head_dim, config.hidden_size)
        self.output_codec = recipe.codec("attention_output")
        self.config = config
        self.scale = softmax_scale(config)
        self.recompute = recompute

    def __call__(
        self,
        x: Float[Array, "batch seq hidden"],
        rotary: Rotary,
        documents: Int[Array, "batch seq"] | None = None,
        tape: Tape = AUTODIFF,
    ) -> tuple[Float[Array, "batch seq hidden"], Float[Array, "batch seq latent"]]:
        """Expanded form over whole sequences: the output, and the latents a cache would hold."""
        latent = self.compress(x, rotary, tape)
        attend = self.recompute(partial(self._attend_expanded, tape=tape))
        attended = attend(self._query_input(x, tape), latent, rotary, documents)
        return self.o_proj(attended, tape, "o_proj"), latent

    def compress(
        self, x: Float[Array, "batch seq hidden"], rotary: Rotary, tape: Tape = AUTODIFF
    ) -> Float[Array, "batch seq latent"]:
        """[c_KV ; k_R] of each token: the latent after its norm, the shared key after RoPE."""
        rank = self.config.kv_lora_rank
        c_and_k = tape.keep("kv_latent", self.kv_a_proj_with_mqa(x, tape, "kv_a_proj_with_mqa"))
        c_kv = self.kv_a_layernorm(c_and_k[..., :rank])
        return jnp.concatenate([c_kv, rotate(c_and_k[..., rank:], rotary)], axis=-1)

    def decode(
        self,
        x: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        cache: Float[Array, "batch cached latent"],
        positions: Int[Array, "batch queries"],
    ) -> Float[Array, "batch queries hidden"]:
        """Absorbed form: each query attends to the cache at indices 0 to its own position.

        The cache already holds the queries' own latents (from `compress`); their positions follow
        one another.
        """
        lengths, v_dim = positions[:, -1] + 1, self.config.kv_lora_rank

        def attend(q: Float[Array, "batch queries heads latent"]):
            return mla_decode_rows(q, cache, lengths, self.scale, v_dim=v_dim)[0]

        return self._absorbed(x, rotary, attend)

    def extend(
        self,
        x: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        pool: Pool,
        new: NewTokens,
        first_page: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch queries hidden"], Pool]:
        """New tokens of some requests attend to all of their cached tokens, themselves included:
        the output, and the pool with their latents in the layer's pages from `first_page` on."""
        v_dim = self.config.kv_lora_rank
        latents = self.compress(x, rotary)
        pool = write(pool, latents, new, first_page, v_dim)
        new = new._replace(table=new.table + first_page)
        if x.shape[1] > (KERNEL_QUERIES if is_hopper() else self._break_even):
            as_cached = unpacked(packed(latents, pool.dtype, v_dim), x.dtype, v_dim)
            return self._attend_chunk(x, rotary, as_cached, pool, new), pool

        def attend(q: Float[Array, "batch queries heads latent"]):
            return mla_decode(q, pool, new.table, new.lengths, self.scale, v_dim=v_dim)[0]

        return self._absorbed(x, rotary, attend), pool

    @property
    def _break_even(self) -> int:
        """New tokens of a request beyond which expanding a cached token costs less FLOPs than
        attending to it unexpanded: 170 for DeepSeek-V3."""
        c = self.config
        expanded_dim = c.qk_nope_head_dim + c.v_head_dim
        more_a_pair = 2 * c.kv_lora_rank - expanded_dim
        return c.kv_lora_rank * expanded_dim // more_a_pair if more_a_pair > 0 else 2**31

    def _absorbed(
        self, x: Float[Array, "batch queries hidden"], rotary: Rotary, attend: Callable
    ) -> Float[Array, "batch queries hidden"]:
        """`attend` takes the queries as the cache's rows are, and gives their mixed latents."""
        c, heads = self.config, self.config.num_attention_heads
        q_nope, q_rope = self._queries(self._query_input(x), rotary)
        up = plain(self.kv_b_proj.weight[...], x.dtype).reshape(heads, -1, c.kv_lora_rank)
        w_uk, w_uv = up[:, : c.qk_nope_head_dim], up[:, c.qk_nope_head_dim :]
        q_latent = jnp.concatenate([jnp.einsum("bqhn,hnr->bqhr", q_nope, w_uk), q_rope], axis=-1)
        out = jnp.einsum("bqhr,hvr->bqhv", attend(q_latent), w_uv)
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def _attend_chunk(
        self,
        x: Float[Array, "batch queries hidden"],
        rotary: Rotary,
        latents: Float[Array, "batch queries latent"],
        pool: Pool,
        new: NewTokens,
    ) -> Float[Array, "batch queries hidden"]:
        """The expanded form, for many new tokens."""
        heads, rank = self.config.num_attention_heads, self.config.kv_lora_rank

        def expand(latents: Float[Array, "batch tokens rank"]):
            return self.kv_b_proj(latents).reshape(*latents.shape[:2], heads, -1)

        q = jnp.concatenate(self._queries(self._query_input(x), rotary), axis=-1)
        sizes = {"scale": self.scale, "latent_dim": rank}
        out = attend_to_prompt(q, latents, expand, pool, new, **sizes)
        return self.o_proj(out.reshape(*x.shape[:2], -1))

    def _query_input(
        self, x: Float[Array, "batch seq hidden"], tape: Tape = AUTODIFF
    ) -> Float[Array, "batch seq width"]:
        """What the queries' up-projection reads: the normed query latent, or x itself."""
        if self.config.q_lora_rank is None:
            return x
        return self.q_a_layernorm(tape.keep("q_latent", self.q_a_proj(x, tape, "q_a_proj")))

    def _queries(
        self,
        query_input: Float[Array, "batch seq width"],
        rotary: Rotary,
        tape: Tape = AUTODIFF,
    ) -> tuple[Float[Array, "batch seq heads nope"], Float[Array, "batch seq heads rope"]]:
        """q_C and rotated q_R of every head."""
        c = self.config
        project = self.q_proj if c.q_lora_rank is None else self.q_b_proj
        q = tape.keep("queries", project(query_input, tape, "q_proj"))
        q = q.reshape(*query_input.shape[:2], -1, c.qk_head_dim)
        return q[..., : c.qk_nope_head_dim], rotate(q[..., c.qk_nope_head_dim :], rotary)

    def _attend_expanded(
        self,
        query_input: Float[Array, "batch seq width"],
        latent: Float[Array, "batch seq latent"],
        rotary: Rotary,
        documents: Int[Array, "batch seq"] | None,
        tape: Tape,
    ) -> Float[Array, "batch seq values"]:
        """The heads' outputs side by side, before o_proj."""
        rank, heads = self.config.kv_lora_rank, (*latent.shape[:2], self.config.num_attention_heads)
        q = jnp.concatenate(self._queries(query_input, rotary, tape), axis=-1)
        kv = tape.keep("keys_values", self.kv_b_proj(latent[..., :rank], tape, "kv_b_proj"))
        inputs = q, kv.reshape(*heads, -1), latent[..., rank:]
        out, lse = mla_prefill(*jax.lax.stop_gradient(inputs), self.scale, documents)
        # Named apart from what they are made of: backward needs them, but not to make them again.
        name, codec = "attention_output", self.output_codec
        out = tape.keep(name, out.reshape(*heads[:2], -1), codec)
        kept = tape.for_backward(name, out, codec).reshape(*heads, -1)
        lse = tape.keep("attention_lse", lse)
        attended = with_gradients(
            out.reshape(*heads, -1), *inputs, kept, lse, self.scale, documents
        )
        return attended.reshape(*heads[:2], -1)
