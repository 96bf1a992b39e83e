"""The router: which experts a token goes to, with what weight, and how even the load is.

Source: DeepSeek-V3 Technical Report §2.1.2 (equations 12-20); DeepSeek's inference/model.py, Gate.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.linear import normal


class SelectionBias(nnx.Variable):
    """`e_score_correction_bias`: a variable of its own type, so that no optimizer touches it."""


class Routing(NamedTuple):
    """A token's experts, their weights, and all its scores, for T tokens, E experts, top K."""

    experts: Int[Array, "tokens top_k"]
    weights: Float[Array, "tokens top_k"]
    scores: Float[Array, "tokens experts"]


class LoadStatistics(NamedTuple):
    """What the balance of one layer's experts is judged by."""

    load: Float[Array, " experts"]
    """Tokens sent to each expert (counts)."""
    balance_loss: Float[Array, ""]
    """Sequence-wise balance loss without its factor alpha, mean over the sequences."""


class Router(nnx.Module):
    """Scores in FP32; selection by score plus bias within the best groups; weights without bias.

    `scoring_func` sigmoid or softmax. `topk_method` says what selects: `noaux_tc` (bias added, a
    group scores the sum of its two best), `group_limited_greedy` (no bias, a group scores its
    best) or `greedy` (no bias, no groups). Groups that are not kept are masked with -inf.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, hidden = config.n_routed_experts, config.hidden_size
        self.weight = nnx.Param(normal(rngs, (experts, hidden), config.initializer_range, dtype))
        if config.has_selection_bias:
            self.e_score_correction_bias = SelectionBias(jnp.zeros((experts,), jnp.float32))
        self.config = config

    def __call__(self, x: Float[Array, "tokens hidden"]) -> Routing:
        c = self.config
        logits = jax.lax.dot_general(
            x.astype(jnp.float32),
            self.weight[...].astype(jnp.float32),
            (((1,), (1,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        sigmoid = c.scoring_func == "sigmoid"
        scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
        choice = jax.lax.stop_gradient(scores)
        if c.has_selection_bias:
            choice = choice + self.e_score_correction_bias[...]
        experts = select_experts(choice, config=c)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if c.norm_topk_prob:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
        return Routing(experts, weights * c.routed_scaling_factor, scores)


def select_experts(
    choice: Float[Array, "tokens experts"], *, config: ModelConfig
) -> Int[Array, "tokens top_k"]:
    """The indices of the top K of `choice` among the experts of the kept groups."""
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        grouped = choice.reshape(-1, config.n_group, choice.shape[-1] // config.n_group)
        best = 2 if config.topk_method == "noaux_tc" else 1
        group_scores = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
        kept = jax.lax.top_k(group_scores, config.topk_group)[1]
        is_kept = jnp.any(kept[:, :, None] == jnp.arange(config.n_group), axis=1)
        choice = jnp.where(is_kept[:, :, None], grouped, -jnp.inf).reshape(choice.shape)
    return jax.lax.top_k(choice, config.num_experts_per_tok)[1]


def load_statistics(
    routing: Routing, batch: int, valid: int, *, config: ModelConfig
) -> LoadStatistics:
    """Load and sequence-wise balance loss of `batch` sequences of equal length.

    Only the first `valid` positions of each sequence count (an MTP module of depth k has no target
    for its last k). With f_i = E/(K T) * #{t : s_i,t among the K largest of the raw scores} and P_i
    the mean of s_i,t / sum_j s_j,t, the loss of a sequence is sum_i f_i P_i; it is 1 when scores
    are uniform. f is counted, so the gradient flows through P alone.

    Source: DeepSeek-V3 Technical Report equations 17-20.
    """
    n, k = config.n_routed_experts, config.num_experts_per_tok
    experts = routing.experts.reshape(batch, -1, k)[:, :valid]
    load = jnp.sum(_counts(experts, n), axis=0)
    scores = routing.scores.reshape(batch, -1, n)[:, :valid]
    raw_choice = jax.lax.top_k(jax.lax.stop_gradient(scores), k)[1]
    f = _counts(raw_choice, n) * (n / (k * valid))
    p = jnp.mean(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=1)
    return LoadStatistics(load, jnp.mean(jnp.sum(f * p, axis=-1)))


def expert_load(experts: Int[Array, "tokens top_k"], num_experts: int) -> Float[Array, " experts"]:
    """How often each expert was chosen; a negative number is none."""
    return _counts(experts[None], num_experts)[0]


def _counts(
    experts: Int[Array, "batch seq top_k"], num_experts: int
) -> Float[Array, "batch experts"]:
    """How often each expert was chosen in each sequence."""
    chosen = experts[..., None] == jnp.arange(num_experts)
    return jnp.sum(chosen, axis=(1, 2), dtype=jnp.float32)
