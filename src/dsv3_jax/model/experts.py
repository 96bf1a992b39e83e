"""The routed experts: exact for any routing, without a product over all experts.

The slots of a `DispatchPlan` are computed as one batched product; overflow blocks in a loop that
runs as often as the routing needs (with a custom VJP: its length is known only at run time).
Backward keeps the input of SwiGLU and gathers and computes the rest again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig, ParallelConfig
from dsv3_jax.model.linear import normal, product_of
from dsv3_jax.model.router import Routing
from dsv3_jax.parallel.dispatch import (
    Dispatcher,
    Exchange,
    Sent,
    join_weights,
    split_weights,
)
from dsv3_jax.parallel.dispatch_plan import (
    DispatchPlan,
    choose_capacity,
    overflow_block,
    overflow_pairs,
    plan_dispatch,
)
from dsv3_jax.parallel.tape import AUTODIFF, Tape
from dsv3_jax.parallel.wire import AS_IS, PACKINGS, UNCHANGED, Wire, pass_through
from dsv3_jax.quant.formats import PLAIN, Codec
from dsv3_jax.quant.matmul import SwigluProduct, WeightedInput, stacked_product
from dsv3_jax.quant.recipe import UNQUANTISED, Recipe
from dsv3_jax.quant.scaled_array import ScaledArray, joined, trained, untrained
from dsv3_kernels.permute.op import permute, unpermute
from dsv3_kernels.permute.plan import NOTHING


class Experts(nnx.Module):
    """E SwiGLU networks; `gate_up_proj` [E, 2, F, D] holds gate then up, `down_proj` [E, D, F].

    Inside shard_map the arrays hold this device's experts and `dispatcher` brings the tokens.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        dispatcher: Dispatcher | None = None,
    ):
        self.gate_up_proj = nnx.Param(
            normal(rngs, (num_experts, 2, intermediate, hidden), std, dtype)
        )
        self.down_proj = nnx.Param(normal(rngs, (num_experts, hidden, intermediate), std, dtype))
        self.dispatcher = LocalDispatcher() if dispatcher is None else dispatcher

    def __call__(
        self, x: Float[Array, "tokens hidden"], routing: Routing, tape: Tape = AUTODIFF
    ) -> Float[Array, "tokens hidden"]:
        """sum_k weight_k * expert_k(x) for every token."""
        sent, of_trained = self.dispatch(x, routing.experts, routing.weights, tape)
        return self.combine(self.compute(sent, of_trained, tape), of_trained)

    def dispatch(
        self,
        x: Float[Array, "tokens hidden"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        tape: Tape = AUTODIFF,
    ) -> tuple[Sent, Any]:
        """The first of the dispatcher's three parts; with what is trained of the parameters."""
        parts = x, experts, weights.astype(x.dtype), self._parameters()
        sent, parameters = self.dispatcher.dispatch(*parts, tape)
        return sent, trained(parameters)

    def compute(self, sent: Sent, of_trained: Any, tape: Tape) -> Sent:
        """The second."""
        parameters = joined(untrained(self._parameters()), of_trained)
        return self.dispatcher.compute(sent, parameters, tape)

    def combine(self, sent: Sent, of_trained: Any) -> Float[Array, "tokens hidden"]:
        """The third."""
        parameters = joined(untrained(self._parameters()), of_trained)
        return self.dispatcher.combine(sent, parameters)

    def _parameters(self) -> "ExpertParameters":
        gate_up = jax.tree.map(
            lambda part: part.reshape(part.shape[0], -1, part.shape[-1]), self.gate_up_proj[...]
        )
        return ExpertParameters(gate_up, self.down_proj[...])


class ExpertParameters(NamedTuple):
    """All experts' weights, arrays or in FP8."""

    gate_up: Float[Array, "experts double_width hidden"] | ScaledArray
    down: Float[Array, "experts hidden width"] | ScaledArray


@dataclass(frozen=True)
class ExpertProducts:
    """An expert's two products, of single matrices or stacked ones (with the arguments that
    `QuantisedProduct` has for those), and how its rows and the input of SwiGLU wait for backward.

    `down` is of that input and the rows' weights, as `SwigluProduct` is.
    """

    gate_up: Callable[..., Array]
    down: Callable[..., Array]
    rows_codec: Codec = PLAIN
    up_codec: Codec = PLAIN


def expert_products(recipe: Recipe) -> ExpertProducts:
    """Those of `recipe`."""
    rule = recipe.rules.get("down_proj")
    if rule is not None and SwigluProduct.can_follow(rule):
        down = SwigluProduct(rule)
    else:
        down = AfterSwiglu(product_of(recipe, "down_proj", _multiply))
    return ExpertProducts(
        product_of(recipe, "gate_up_proj", _multiply),
        down,
        recipe.codec("expert_rows"),
        recipe.codec("expert_up"),
    )


def _multiply(x: Array, weight: Any, **of_rows: Any) -> Array:
    """x W^T, by matrix where they are stacked."""
    return x @ weight.T if weight.ndim == 2 else stacked_product(x, weight, **of_rows)


@dataclass(frozen=True)
class AfterSwiglu:
    """(swiglu(h) * weights) W^T for x = (h, weights) by a product that knows nothing of SwiGLU."""

    product: Callable[..., Array]

    def __call__(self, x: WeightedInput, weight: Any, **of_rows: Any) -> Array:
        h, weights = x
        return self.product(swiglu(h) * weights[..., None], weight, **of_rows)


PLAIN_PRODUCTS = expert_products(UNQUANTISED)


@dataclass(frozen=True)
class LocalDispatcher:
    """Computes with the experts that are here; a pair with a negative expert counts as nothing.

    A `Dispatcher` that sends nothing, though it rounds as `wire` does, and the `ExpertFunction` of
    one that does.
    """

    products: ExpertProducts = PLAIN_PRODUCTS
    wire: Wire = UNCHANGED

    def dispatch(self, x, experts, weights, parameters, tape=AUTODIFF):
        del tape
        rows = join_weights(x, weights)
        extra = weights.shape[-1]
        rows = pass_through(self.wire.dispatch, self.wire.combine, extra, rows)
        return Sent(rows, experts), parameters

    def compute(self, sent, parameters, tape=AUTODIFF):
        x, weights = split_weights(sent.rows, sent.experts)
        done = self(x, sent.experts, weights, parameters, x.shape[0], tape)
        return sent._replace(rows=done)

    def combine(self, sent, parameters):
        del parameters
        return pass_through(self.wire.combine, self.wire.dispatch, 0, sent.rows)

    def __call__(self, x, experts, weights, parameters, tokens, tape=AUTODIFF, is_further=False):
        num_experts, top_k = parameters.down.shape[0], weights.shape[1]
        if weights.size < num_experts:
            weights = jnp.where(experts < 0, 0, weights)
            return _expert_by_expert(self.products, x, experts, weights, parameters)
        # In a further round nothing but overflow blocks, which compute what is there and no more.
        capacity = choose_capacity(tokens, top_k, num_experts, x.shape[0]) * (not is_further)
        plan = plan_dispatch(experts, num_experts, capacity)
        fixed, operands = untrained(parameters), (x, weights, trained(parameters))
        out = jnp.zeros_like(x)
        if capacity < x.shape[0]:
            out, operands = _overflow(self.products, capacity, operands, fixed, plan)
        if capacity:
            x, weights, of_trained = operands
            expected = tokens * top_k // num_experts
            slots = partial(_slots, self.products, expected, tape)
            slots = tape.recomputed(slots, but=("expert_up",))
            out += slots(x, weights, joined(fixed, of_trained), plan)
        return out


def make_dispatcher(
    model: ModelConfig,
    parallel: ParallelConfig,
    recipe: Recipe = UNQUANTISED,
    wire: Wire = UNCHANGED,
) -> Dispatcher:
    """How tokens come to the experts of a mesh: not at all, in one exchange, or in two hops."""
    local = LocalDispatcher(expert_products(recipe), wire)
    return spread_dispatcher(local, model, parallel, model.n_routed_experts)


def spread_dispatcher(
    local: LocalDispatcher, model: ModelConfig, parallel: ParallelConfig, slots: int
) -> Dispatcher:
    """What `local` does on the mesh, whose devices hold `slots` experts, replicas included."""
    node, gpu = parallel.node, parallel.gpu
    products, wire, here = local.products, local.wire, slots // (node * gpu)
    # Distinct nodes of a token, and of those experts that are on one node, distinct GPUs, for
    # uniform choices (the restricted one: DeepSeek-V3, 8 of 256 in 4 of 8 groups, 3.6 nodes).
    top_k, grouped = model.num_experts_per_tok, model.n_group % node == 0
    reachable = min(node, model.topk_group) if grouped else node
    nodes = _distinct(reachable, float(top_k))
    gpus = _distinct(gpu, top_k / nodes)

    def exchange(axes, peers, experts_per_peer, rows_a_token, agree_on, inner):
        return Exchange(
            axes,
            peers,
            experts_per_peer,
            rows_a_token,
            parallel.capacity_factor,
            agree_on,
            inner,
            wire,
            AS_IS if products.rows_codec is PLAIN else PACKINGS["fp8"],
        )

    if node * gpu == 1:
        return local
    used = tuple(axis for axis in ("node", "gpu") if getattr(parallel, axis) > 1)
    if len(used) == 1 or parallel.dispatcher == "flat":
        return exchange(used, node * gpu, here, nodes * gpus / (node * gpu), used, local)
    inside = exchange(("gpu",), gpu, here, nodes * gpus / gpu, ("gpu",), local)
    return exchange(("node",), node, here * gpu, nodes / node, used, inside)


def _distinct(places: int, draws: float) -> float:
    """Expected number of distinct places that `draws` uniform choices hit."""
    return places * (1 - math.pow(1 - 1 / places, draws)) if places > 1 else 1.0


def swiglu(h: Float[Array, "*rows double_width"]) -> Float[Array, "*rows width"]:
    """silu(gate) * up of [gate ; up]."""
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _expert_by_expert(
    products: ExpertProducts,
    x: Float[Array, "tokens hidden"],
    experts: Int[Array, "tokens top_k"],
    weights: Float[Array, "tokens top_k"],
    parameters: ExpertParameters,
) -> Float[Array, "tokens hidden"]:
    """The routed sum for fewer pairs than experts: pair by pair, reading only what is needed.

    A loop of known length, so it has a gradient without a custom rule.
    """
    top_k = weights.shape[1]

    def add_pair(out, pair):
        token, expert = pair // top_k, experts.reshape(-1)[pair]
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        y = _one_expert(products, row, jnp.ones((1,), x.dtype), _of_expert(parameters, expert))
        return out.at[token].add(weights.reshape(-1)[pair] * y[0]), None

    return jax.lax.scan(add_pair, jnp.zeros_like(x), jnp.arange(weights.size))[0]


def _one_expert(
    products: ExpertProducts,
    rows: Float[Array, "rows hidden"],
    weights: Float[Array, " rows"],
    of_expert: Any,
) -> Float[Array, "rows hidden"]:
    """weight * expert(x) for each row; `of_expert` are one expert's matrices."""
    return products.down((products.gate_up(rows, of_expert.gate_up), weights), of_expert.down)


def _of_expert(tree: Any, expert: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda part: part[expert], tree)


Operands = tuple[Float[Array, "tokens hidden"], Float[Array, "tokens top_k"], ExpertParameters]
"""x, routing weights, and what is trained of the parameters."""


def _slots(
    products: ExpertProducts,
    expected: int,
    tape: Tape,
    x: Float[Array, "tokens hidden"],
    weights: Float[Array, "tokens top_k"],
    parameters: ExpertParameters,
    plan: DispatchPlan,
) -> Float[Array, "tokens hidden"]:
    """What the slots contribute, of which each expert is likely to fill `expected`.

    Weights are applied before `down`, so that their gradient needs no expert's output.
    """
    filled = jnp.minimum(plan.group_size, plan.slot_pair.shape[1])
    tables = plan.slot_token, plan.pair_slot

    def finish(h, slot_weights, down, filled):
        product = partial(products.down, filled=filled, expected=expected)
        return tape.linear("down_proj", product, (h, slot_weights), down)

    rows = tape.keep("expert_rows", permute(x, *tables), products.rows_codec)
    product = partial(products.gate_up, filled=filled, expected=expected)
    h = tape.linear("gate_up_proj", product, rows, parameters.gate_up)
    rest = _slot_weights(weights, plan), parameters.down, filled
    slots = tape.from_kept(("expert_up",), products.up_codec, finish, h, *rest)
    return unpermute(slots, None, *tables)


@jax.custom_vjp
def _slot_weights(
    weights: Float[Array, "tokens top_k"], plan: DispatchPlan
) -> Float[Array, "experts capacity"]:
    """Each slot's routing weight, 0 where it is empty."""
    return jnp.where(plan.slot_pair == NOTHING, 0, weights.reshape(-1)[plan.slot_pair])


def _pair_gradients(
    plan: DispatchPlan, d_slots: Float[Array, "experts capacity"]
) -> Float[Array, "tokens top_k"]:
    return jnp.where(plan.pair_slot == NOTHING, 0, d_slots.reshape(-1)[plan.pair_slot])


_slot_weights.defvjp(
    lambda weights, plan: (_slot_weights(weights, plan), plan),
    lambda plan, d_slots: (_pair_gradients(plan, d_slots), None),
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _overflow(
    products: ExpertProducts, capacity: int, operands: Operands, fixed: Any, plan: DispatchPlan
) -> tuple[Float[Array, "tokens hidden"], Operands]:
    """What the overflow blocks contribute, and the operands for whoever else needs them.

    Passed on like this they bring the others' gradients here in backward, to which the blocks add
    theirs in place. `fixed` is what is not trained of the parameters.
    """
    x, weights, of_trained = operands
    block, parameters = overflow_block(x.shape[0]), joined(fixed, of_trained)

    def add_block(index, out):
        expert, token, weight, _, _ = _overflow_rows(plan, index, capacity, block, weights)
        of_expert = _of_expert(parameters, expert)
        return out.at[token].add(_one_expert(products, x[token], weight, of_expert))

    out = jax.lax.fori_loop(0, plan.block_end[-1], add_block, jnp.zeros_like(x))
    return out, operands


def _overflow_rows(plan, index, capacity, block, weights):
    """A block's expert, its tokens, their weights (0 for none), its pairs, and which are real."""
    expert, pairs, real = overflow_pairs(plan, index, capacity, block)
    weight = jnp.where(real, weights.reshape(-1)[pairs], 0)
    return expert, pairs // weights.shape[1], weight, pairs, real


def _overflow_forward(products, capacity, operands, fixed, plan):
    return _overflow(products, capacity, operands, fixed, plan), (operands, fixed, plan)


def _overflow_backward(products, capacity, residuals, gradients):
    (x, weights, of_trained), fixed, plan = residuals
    d_out, (d_x, d_weights, d_trained) = gradients
    block = overflow_block(x.shape[0])

    def add_block(index, gradients):
        d_x, d_pairs, d_trained = gradients
        expert, token, weight, pairs, real = _overflow_rows(plan, index, capacity, block, weights)

        def of_block(rows, weight, of_trained):
            own = joined(_of_expert(fixed, expert), of_trained)
            return _one_expert(products, rows, weight, own)

        pull = jax.vjp(of_block, x[token], weight, _of_expert(of_trained, expert))[1]
        d_rows, d_weight, d_own = pull(d_out[token])
        return (
            d_x.at[token].add(d_rows),
            d_pairs.at[pairs].add(jnp.where(real, d_weight, 0)),
            jax.tree.map(lambda total, own: total.at[expert].add(own), d_trained, d_own),
        )

    start = (d_x, d_weights.reshape(-1), d_trained)
    d_x, d_pairs, d_trained = jax.lax.fori_loop(0, plan.block_end[-1], add_block, start)
    return (d_x, d_pairs.reshape(weights.shape), d_trained), None, None


_overflow.defvjp(_overflow_forward, _overflow_backward)
