"""The whole model: embedding, dense layers, MoE layers, final norm, head, MTP modules."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import RECOMPUTE, Block
from dsv3_jax.model.cache import NewTokens, Pool
from dsv3_jax.model.linear import Embedding, Linear, linear
from dsv3_jax.model.mtp import MultiTokenPredictor
from dsv3_jax.model.norm import RMSNorm
from dsv3_jax.model.rope import Rotary, rotary
from dsv3_jax.model.router import LoadStatistics
from dsv3_jax.parallel.dispatch import Dispatcher
from dsv3_jax.parallel.inference import BY_TOKEN, on_mesh, token_shards, weight_specs
from dsv3_jax.parallel.tape import AUTODIFF
from dsv3_jax.quant.recipe import UNQUANTISED, Recipe

GATHERED = "gathered_weights"
"""Name, for checkpoint policies, of weights that are gathered again in backward."""


class HiddenStates(NamedTuple):
    """Normed hidden states, ready for the head, and the load of every routed layer."""

    main: Float[Array, "batch seq hidden"]
    mtp: tuple[Float[Array, "batch seq hidden"], ...]
    """One for each MTP depth k; its last k positions have no target."""
    load: Float[Array, "routed_layers experts"]
    """Tokens to each expert: main model's MoE layers in order, then the MTP modules."""
    balance_loss: Float[Array, " routed_layers"]


class Transformer(nnx.Module):
    """DeepSeek-V3 with Hugging Face's parameter names.

    Layers of one kind are stacked: every array of `dense_layers` and `moe_layers` has the layer as
    its first dim, of `mtp` the depth. They are scanned, so that compile time does not grow with
    depth, or unrolled with `scan_layers=False`. `remat` is one of none, selective, full; full keeps
    the tensors that `keep` names.
    `dispatcher` brings tokens to the experts of other devices, inside shard_map. `recipe` says
    which products are in FP8; the experts' are the dispatcher's.

    Raises ValueError for an unknown `remat`.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        keep: tuple[str, ...] = (),
        scan_layers: bool = True,
        dispatcher: Dispatcher | None = None,
        recipe: Recipe = UNQUANTISED,
    ):
        if remat not in RECOMPUTE:
            raise ValueError(f"remat is {remat!r}, expected one of {', '.join(RECOMPUTE)}")
        recompute = RECOMPUTE[remat]
        if keep and remat == "full":
            policy = jax.checkpoint_policies.save_only_these_names(*keep)
            recompute = recompute._replace(block=partial(jax.checkpoint, policy=policy))
        shared = {"dtype": dtype, "recompute": recompute, "dispatcher": dispatcher}
        shared["recipe"] = recipe
        weights = {"std": config.initializer_range, "dtype": dtype, "rngs": rngs}

        def block(routed: bool) -> Callable[[nnx.Rngs], Block]:
            return lambda rngs: Block(config, routed=routed, rngs=rngs, **shared)

        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, **weights)
        if config.num_dense_layers:
            self.dense_layers = stack(config.num_dense_layers, block(False), rngs)
        if config.num_moe_layers:
            self.moe_layers = stack(config.num_moe_layers, block(True), rngs)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, **weights)
        if config.num_nextn_predict_layers:
            self.mtp = stack(
                config.num_nextn_predict_layers,
                lambda rngs: MultiTokenPredictor(config, rngs=rngs, **shared),
                rngs,
            )
        self.config = config
        self.scan_layers = scan_layers
        self.recompute_block = recompute.block
        self.tape = AUTODIFF  # what every layer is called with
        self.files_from: str | None = None  # the directory whose tokenizer files belong to it
        # Of (stack, one layer's weights in shards): the weights. None where they are whole already.
        self.gather_layer: Callable[[str, nnx.State], nnx.State] | None = None
        self.mesh: Mesh | None = None  # over which it is spread for inference (spread.py)

    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq vocab"]:
        """Next-token logits in FP32; of a model on a mesh, each device's of its own sequences."""
        if self.mesh is None:
            return self.logits(self.main_hidden(tokens)[0])
        return _call_on_mesh(self, tokens)

    def embed(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq hidden"]:
        """Token embeddings in the dtype of the layers.

        Training keeps the table itself in FP32: the gradients of a frequent token's many places
        are added up in the table's dtype, and BF16 stops counting at 256.
        """
        return self.embed_tokens(tokens).astype(self.lm_head.weight[...].dtype)

    def logits(self, hidden: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq vocab"]:
        """The head's FP32 logits of normed hidden states (`HiddenStates.main` or `.mtp`)."""
        return linear(hidden, self.lm_head.weight[...], jnp.float32)

    def hidden_states(
        self,
        rows: Int[Array, "batch seq_and_one"],
        documents: Int[Array, "batch seq"] | None = None,
    ) -> HiddenStates:
        """Everything a loss needs, from rows of seq + 1 tokens.

        The main model reads the first seq tokens; the MTP module of depth k also the token k ahead
        of each (0 stands in where the row has ended, at positions that have no target).
        """
        tokens = rows[:, :-1]
        seq = tokens.shape[1]
        hidden, _, statistics = self.main_hidden(tokens, documents)
        main, mtp = hidden, []
        if self.config.num_nextn_predict_layers:
            angles = self._angles(seq)
            graph, state = nnx.split(self.mtp)
            for depth in range(1, self.config.num_nextn_predict_layers + 1):
                ahead = jnp.pad(rows[:, depth:], ((0, 0), (0, depth - 1)))
                weights = jax.tree.map(lambda leaf, i=depth - 1: leaf[i], state)
                hidden, of_depth = self._on_layer(
                    lambda module, *arguments, d=depth: module(
                        *arguments, documents, seq - d, self.tape
                    ),
                    "mtp",
                    graph,
                    weights,
                    (hidden, self.embed(ahead), angles),
                )
                mtp.append(hidden)
                statistics.append(jax.tree.map(lambda leaf: leaf[None], of_depth))
        if not statistics:
            empty = jnp.zeros((0,), jnp.float32)
            return HiddenStates(main, tuple(mtp), empty.reshape(0, 0), empty)
        load, balance = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *statistics)
        return HiddenStates(main, tuple(mtp), load, balance)

    def main_hidden(
        self,
        tokens: Int[Array, "batch seq"],
        documents: Int[Array, "batch seq"] | None = None,
    ) -> tuple[
        Float[Array, "batch seq hidden"],
        Float[Array, "layers batch seq latent"],
        list[LoadStatistics],
    ]:
        """Normed hidden states, the latents of every layer, and the load of the MoE layers."""
        angles = self._angles(tokens.shape[1])
        with jax.named_scope("embedding"):
            x = self.embed(tokens)

        def step(block: Block, x, _):
            run = self.recompute_block(partial(block, tape=self.tape))
            x, latent, statistics = run(x, angles, documents)
            return x, (latent, statistics)

        latents, statistics = [], []
        for name, count in self._stacks():
            x, (latent, of_stack) = self._run(step, name, count, x, None)
            latents.append(latent)
            if of_stack is not None:
                statistics.append(of_stack)
        with jax.named_scope("final_norm"):
            return self.norm(x), jnp.concatenate(latents), statistics

    def decode(
        self,
        tokens: Int[Array, "batch queries"],
        positions: Int[Array, "batch queries"],
        cache: Float[Array, "layers batch cached latent"],
        layers: list[Block] | None = None,
    ) -> tuple[Float[Array, "batch queries hidden"], Float[Array, "layers batch cached latent"]]:
        """Normed hidden states of new tokens at `positions`, and the cache with them added.

        `layers` (from `unstacked_layers`) are run one by one; None scans the stacks, which reads
        each weight through a copy on CPU but needs no second set of weights.
        """
        angles = rotary(self.config, positions)
        x = self.embed(tokens)
        if layers is not None:
            for index, layer in enumerate(layers):
                x, of_layer = layer.decode(x, angles, cache[index], positions)
                cache = cache.at[index].set(of_layer)
            return self.norm(x), cache

        def step(block: Block, x, cache_of_layer):
            return block.decode(x, angles, cache_of_layer, positions)

        first, caches = 0, []
        for name, count in self._stacks():
            x, updated = self._run(step, name, count, x, cache[first : first + count])
            caches.append(updated)
            first += count
        return self.norm(x), jnp.concatenate(caches)

    def extend(
        self,
        tokens: Int[Array, "batch queries"],
        pool: Pool,
        new: NewTokens,
        layers: list[Block] | None = None,
    ) -> tuple[
        Float[Array, "batch queries hidden"], Pool, Float[Array, "moe_layers experts"] | None
    ]:
        """Normed hidden states of new tokens of some requests, the paged cache with them added, and
        how many of them went to each expert (None without MoE layers).

        `layers` as in `decode`. The pool has the main model's layers first, then the MTP modules'.
        """
        angles, pages = rotary(self.config, new.positions), self.pages_per_layer(pool)
        x, loads = self.embed(tokens), []
        if layers is not None:
            for index, layer in enumerate(layers):
                x, pool, load = layer.extend(x, angles, pool, new, index * pages)
                loads += [] if load is None else [load[None]]
        else:

            def step(block: Block, carry, first_page):
                x, pool, load = block.extend(carry[0], angles, carry[1], new, first_page)
                return (x, pool), load

            first = 0
            for name, count in self._stacks():
                first_pages = (first + jnp.arange(count)) * pages
                (x, pool), load = self._run(step, name, count, (x, pool), first_pages)
                loads += [] if load is None else [load]
                first += count
        return self.norm(x), pool, jnp.concatenate(loads) if loads else None

    def extend_mtp(
        self,
        hidden: Float[Array, "batch queries hidden"],
        next_tokens: Int[Array, "batch queries"],
        pool: Pool,
        new: NewTokens,
        module: MultiTokenPredictor | None = None,
    ) -> tuple[Float[Array, "batch queries hidden"], Pool]:
        """The first MTP module's hidden states, of which the head makes guesses two tokens ahead,
        from the main model's and the tokens one ahead; its cache is extended as the model's is."""
        module = self.layers("mtp")[0] if module is None else module
        first_page = self.config.num_hidden_layers * self.pages_per_layer(pool)
        angles = rotary(self.config, new.positions)
        return module.extend(hidden, self.embed(next_tokens), angles, pool, new, first_page)

    @property
    def cached_layers(self) -> int:
        """Layers that have pages in the cache: the main model's and the first MTP module's."""
        return self.config.num_hidden_layers + min(self.config.num_nextn_predict_layers, 1)

    def pages_per_layer(self, pool: Pool) -> int:
        """Pages of each layer in the cache."""
        return pool.shape[0] // self.cached_layers

    def unstacked_layers(self) -> list[Block]:
        """The main model's layers in order, each with its own arrays (a second set of weights)."""
        return [layer for name, _ in self._stacks() for layer in self.layers(name)]

    def layers(self, name: str) -> list:
        """The modules of a stack, one by one, with whole weights."""
        graph, state = nnx.split(getattr(self, name))
        count = jax.tree.leaves(state)[0].shape[0]
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(count)]
        if self.gather_layer is not None:
            layers = [_gathered(self.gather_layer, name, layer) for layer in layers]
        return [nnx.merge(graph, layer) for layer in layers]

    def _stacks(self) -> list[tuple[str, int]]:
        """The stacks in order of execution, with their numbers of layers."""
        counts = {
            "dense_layers": self.config.num_dense_layers,
            "moe_layers": self.config.num_moe_layers,
        }
        return [(name, count) for name, count in counts.items() if count]

    def _run(self, step: Callable, name: str, count: int, x, per_layer):
        """`step(block, x, item)` through a stack; the second results stacked by layer."""
        graph, state = nnx.split(getattr(self, name))

        def body(x, scanned):
            layer, item = scanned
            return self._on_layer(step, name, graph, layer, (x, item))

        unroll = 1 if self.scan_layers else True
        return jax.lax.scan(body, x, (state, per_layer), length=count, unroll=unroll)

    def _on_layer(self, function: Callable, name: str, graph, weights: nnx.State, arguments):
        """`function(module, *arguments)` of one layer's module, its weights gathered if need be,
        then and again in backward."""
        gather = self.gather_layer
        if gather is None:
            return function(nnx.merge(graph, weights), *arguments)

        def gathered(weights, arguments):
            return function(nnx.merge(graph, _gathered(gather, name, weights)), *arguments)

        policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
        return jax.checkpoint(gathered, policy=policy)(weights, arguments)

    def _angles(self, seq: int) -> Rotary:
        """Rotary angles of positions 0 to seq - 1, one row that serves the whole batch."""
        return rotary(self.config, jnp.arange(seq)[None])


def stack(count: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose arrays have a new first dim, each with its own random numbers.

    >>> routers = stack(58, lambda rngs: Router(config, dtype=jnp.float32, rngs=rngs), nnx.Rngs(0))
    """
    return nnx.vmap(make, in_axes=0, out_axes=0)(rngs.split(count))


@jax.jit
def _call_on_mesh(
    model: Transformer, tokens: Int[Array, "batch seq"]
) -> Float[Array, "batch seq vocab"]:
    """The batch is filled up to a multiple of the devices."""

    def logits(model: Transformer, tokens: Array) -> Array:
        return model.logits(model.main_hidden(tokens)[0])

    batch, mesh = tokens.shape[0], model.mesh
    assert mesh is not None
    filled = jnp.pad(tokens, ((0, -batch % token_shards(mesh)), (0, 0)))
    specs = weight_specs(model)
    return on_mesh(logits, mesh, (specs, BY_TOKEN), BY_TOKEN)(model, filled)[:batch]


def _gathered(gather: Callable, name: str, layer: nnx.State) -> nnx.State:
    """The weights gathered; selection biases are whole everywhere."""
    params, rest = nnx.split_state(layer, nnx.Param, ...)
    return nnx.merge_state(gather(name, params), rest)
