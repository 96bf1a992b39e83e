"""Which experts a token goes to, with what weight, and the balance loss.

*Source*: B eq. 12-20 and the released gate's code. The selection bias steers the choice only; the
weights of the chosen experts come from the plain affinities.
"""

import numpy as np

from . import tape
from .attention import linear

TOP2_SUM, MAXIMUM = 2, 1  # how many of a group's best experts its score adds up


def affinities(config: dict, weights: dict, prefix: str, x) -> tape.Tensor:
    """Scores s of every expert, [..., E]: sigmoid (V3) or softmax (V2) of x times the gate."""
    logits = linear(x, weights[f"{prefix}.gate.weight"])
    scoring = {"sigmoid": tape.sigmoid, "softmax": tape.softmax}
    return scoring[config.get("scoring_func", "sigmoid")](logits)


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` largest of the last dim, largest first; the lower index wins ties."""
    return np.argsort(-values, axis=-1, kind="stable")[..., :count]


def choose(config: dict, scores: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Chosen experts, int [..., num_experts_per_tok], best first.

    `noaux_tc` (V3) ranks s + bias and keeps the `topk_group` groups whose two best add up
    highest; `group_limited_greedy` (V2) keeps those with the best single expert and knows no
    bias; `greedy` ranks all experts. Other groups' experts count as minus infinity.
    """
    method = config.get("topk_method", "noaux_tc")
    ranked = scores
    if method == "noaux_tc":
        assert bias is not None, "noaux_tc selects with e_score_correction_bias"
        ranked = _only_best_groups(config, scores + bias, TOP2_SUM)
    elif method == "group_limited_greedy":
        ranked = _only_best_groups(config, scores, MAXIMUM)
    elif method != "greedy":
        raise ValueError(f"topk_method is {method!r}, known: noaux_tc group_limited_greedy greedy")
    return best(ranked, config["num_experts_per_tok"])


def _only_best_groups(config: dict, ranked: np.ndarray, summed: int) -> np.ndarray:
    """`ranked` with minus infinity outside each token's `topk_group` best groups."""
    groups, kept = config["n_group"], config["topk_group"]
    grouped = ranked.reshape(*ranked.shape[:-1], groups, -1)
    assert kept * grouped.shape[-1] >= config["num_experts_per_tok"], "too few experts kept"
    group_scores = np.sort(grouped, axis=-1)[..., -summed:].sum(axis=-1)
    keep = np.zeros(group_scores.shape, dtype=bool)
    np.put_along_axis(keep, best(group_scores, kept), True, axis=-1)
    return np.where(keep[..., None], grouped, -np.inf).reshape(ranked.shape)


def combine_weights(config: dict, scores: tape.Tensor, choices: np.ndarray) -> tape.Tensor:
    """Weights of the chosen experts, same shape as `choices`, from scores without bias."""
    tokens = tuple(np.expand_dims(np.indices(choices.shape[:-1]), -1))
    chosen = scores[(*tokens, choices)]
    if config["norm_topk_prob"]:
        chosen = chosen / (tape.total(chosen, axis=-1, keepdims=True) + 1e-20)
    return chosen * config["routed_scaling_factor"]


def balance_loss(config: dict, scores: tape.Tensor) -> tape.Tensor:
    """Mean over rows of sum_i f_i P_i, without the factor alpha, for scores [B, S, E].

    f_i = E / (K S) * (tokens with i among their K largest s): raw scores, no bias, no groups, no
    gradient. P_i = mean over the row's tokens of s_i / sum_j s_j. *Source*: B eq. 17-20.
    All scores equal gives 1 whoever wins the ties: sum_i f_i = E and every P_i = 1 / E.
    """
    rows, length, experts = scores.shape
    per_token = config["num_experts_per_tok"]
    frequency = np.zeros((rows, experts))
    row = np.arange(rows)[:, None, None]
    np.add.at(frequency, (row, best(scores.value, per_token)), experts / (per_token * length))
    share = scores / tape.total(scores, axis=-1, keepdims=True)
    return tape.total(frequency * tape.mean(share, axis=1)) / rows
