"""Routings from even to adversarial."""

import numpy as np

KINDS = ("uniform", "skewed", "same experts", "two sets", "few experts")


def draw_routing(tokens: int, top_k: int, experts: int, kind: str, seed: int) -> np.ndarray:
    """Distinct experts of every token, int [tokens, top_k], the load as uneven as `kind` says."""
    random = np.random.default_rng(seed)
    preference = random.gumbel(size=(tokens, experts))
    if kind == "skewed":
        preference += 3 * random.standard_normal(experts)
    elif kind == "same experts":
        preference[:] = preference[0]
    elif kind == "two sets":
        preference[: tokens // 2], preference[tokens // 2 :] = preference[0], preference[-1]
    elif kind == "few experts":  # one more than a token needs; the others get nothing
        preference[:, random.permutation(experts)[top_k + 1 :]] = -np.inf
    return np.argsort(-preference, axis=-1)[:, :top_k]
