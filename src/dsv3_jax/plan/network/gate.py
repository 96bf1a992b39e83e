"""Which experts tokens choose under node-limited routing, and what nodes and GPUs that touches.

A token's experts are the best K of those in the best M groups of experts, a group's score being the
sum of its two best (DeepSeek-V3 Technical Report eq. 12-16, §2.1.2). Scores of a balanced router
are taken as independent and uniform. Only the best few of a group matter, so they are drawn as what
they are: the best of n uniform scores is u^(1/n), the next that times u^(1/(n-1)), and so on.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from dsv3_jax.config.checks import require
from dsv3_jax.plan.network.topology import GPUS_PER_NODE

Experts = Int[np.ndarray, "tokens top_k"]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The shape of a node-limited gate; the defaults are DeepSeek-V3's."""

    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    scores_of_group: int = 2
    """How many of a group's best scores are added; DeepEP's test takes the best alone."""

    def __post_init__(self):
        experts, groups = self.n_routed_experts, self.n_group
        require(experts > 0, "n_routed_experts", experts, "at least 1")
        rule = f"a divisor of n_routed_experts = {experts}"
        require(groups > 0 and experts % groups == 0, "n_group", groups, rule)
        require(1 <= self.topk_group <= groups, "topk_group", self.topk_group, f"1 to {groups}")
        reachable = self.topk_group * self.group_size
        top_k, rule = (
            self.num_experts_per_tok,
            f"1 to {reachable}, the experts of topk_group groups",
        )
        require(1 <= top_k <= reachable, "num_experts_per_tok", top_k, rule)
        rule = f"1 to {self.group_size}, the experts of a group"
        require(
            1 <= self.scores_of_group <= self.group_size,
            "scores_of_group",
            self.scores_of_group,
            rule,
        )

    @property
    def group_size(self) -> int:
        return self.n_routed_experts // self.n_group


def sample_experts(gate: Gate, tokens: int, rng: np.random.Generator) -> Experts:
    """The experts of each of `tokens` tokens, distinct, in no order."""
    size = gate.group_size
    most = min(gate.num_experts_per_tok, size)
    depth = max(most, gate.scores_of_group)
    draws = rng.random((tokens, gate.n_group, gate.scores_of_group), dtype=np.float32)
    best = _descending(draws, size, np.float32(1))
    group = np.argpartition(-best.sum(axis=2), gate.topk_group - 1, axis=1)[:, : gate.topk_group]
    best = np.take_along_axis(best, group[:, :, None], axis=1)
    more = rng.random((tokens, gate.topk_group, depth - gate.scores_of_group), dtype=np.float32)
    rest = _descending(more, size - gate.scores_of_group, best[:, :, -1:])
    scores = np.concatenate([best, rest], axis=2)[:, :, :most].reshape(tokens, -1)
    chosen = np.argpartition(-scores, gate.num_experts_per_tok - 1, axis=1)
    chosen = chosen[:, : gate.num_experts_per_tok]
    return _name_members(np.take_along_axis(group, chosen // most, axis=1), size, rng)


def _name_members(
    group: Int[np.ndarray, "tokens top_k"], size: int, rng: np.random.Generator
) -> Experts:
    """Different experts of the given groups, every choice as likely: drawn until none is twice."""
    experts = np.zeros_like(group)
    todo = np.arange(len(group))
    while todo.size:
        drawn = group[todo] * size + rng.integers(size, size=group[todo].shape)
        experts[todo] = drawn
        drawn.sort(axis=1)
        todo = todo[(drawn[:, 1:] == drawn[:, :-1]).any(axis=1)]
    return experts


def _descending(
    draws: Float[np.ndarray, "*batch n"], size: int, below: np.float32 | np.ndarray
) -> Float[np.ndarray, "*batch n"]:
    """The best of `size` uniform scores under `below`, best first."""
    powers = (1 / np.arange(size, size - draws.shape[-1], -1)).astype(np.float32)
    return np.cumprod(draws**powers, axis=-1) * below


def gpus_touched(
    experts: Experts, n_routed_experts: int, gpus: int
) -> Bool[np.ndarray, "tokens gpus"]:
    """The GPUs each token has an expert on, of `gpus` that split the experts evenly, in order."""
    rule = f"numbers from 0 to {n_routed_experts - 1}"
    lowest, highest = int(experts.min(initial=0)), int(experts.max(initial=0))
    require(lowest >= 0, "experts", lowest, rule)
    require(highest < n_routed_experts, "experts", highest, rule)
    touched = np.zeros((len(experts), gpus), dtype=bool)
    touched[np.arange(len(experts))[:, None], experts // (n_routed_experts // gpus)] = True
    return touched


def nodes_touched(touched: Bool[np.ndarray, "tokens gpus"]) -> Bool[np.ndarray, "tokens nodes"]:
    """The nodes of eight GPUs each token has an expert on."""
    return touched.reshape(len(touched), -1, GPUS_PER_NODE).any(axis=2)
