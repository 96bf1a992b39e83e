"""Losses, gradients and updates of DeepSeek-V3 pre-training.

*Source*: B §2.1.2 (balance), §2.2 (multi-token prediction), §4.2 (AdamW, clipping, bias update).
"""

from dataclasses import dataclass

import numpy as np

from . import tape
from .model import Output, trace

BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Losses:
    """Terms of one batch; loss = main + mtp_weight * mtp + balance_weight * balance."""

    loss: float
    main: float  # mean negative log-likelihood of the next token, nats
    mtp: float  # mean of mtp_by_depth; 0 without MTP modules
    mtp_by_depth: tuple[float, ...]
    balance: float  # sum of balance_by_layer
    balance_by_layer: dict[int, float]  # mean over rows of sum_i f_i P_i, without a factor
    load_by_layer: dict[int, np.ndarray]  # tokens sent to each expert, over the whole batch


@dataclass(frozen=True)
class AdamWState:
    """Steps taken and the running means of gradients and of their squares."""

    step: int
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]


def compute_losses(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    mtp_weight: float,
    balance_weight: float,
    documents: np.ndarray | None = None,
) -> Losses:
    """The losses of rows tokens [B, T + 1], of which the first T are the inputs.

    Main: mean over the B * T targets. MTP depth k: sum over its B * (T - k) targets, also divided
    by B * T (B eq. 24). `documents` [B, T + 1] numbers each token's document: attention stays
    inside a document, a target counts only in the document of its input position, and both sums
    are divided by the number of main targets that count. Balance looks at whole rows always.
    """
    constants = {name: tape.as_tensor(value) for name, value in weights.items()}
    return _losses(config, constants, tokens, mtp_weight, balance_weight, documents)[1]


def loss_and_gradients(
    config: dict,
    weights: dict[str, np.ndarray],
    tokens: np.ndarray,
    mtp_weight: float,
    balance_weight: float,
    documents: np.ndarray | None = None,
) -> tuple[Losses, dict[str, np.ndarray]]:
    """`compute_losses`, and d loss / d weight for every weight except the selection biases.

    A weight the batch did not touch, such as an expert without tokens, has a gradient of zeros.
    """
    tensors = {
        name: tape.as_tensor(value) if name.endswith(BIAS) else tape.parameter(value)
        for name, value in weights.items()
    }
    loss, losses = _losses(config, tensors, tokens, mtp_weight, balance_weight, documents)
    names = [name for name in weights if not name.endswith(BIAS)]
    found = tape.gradients(loss, [tensors[name] for name in names])
    return losses, dict(zip(names, found, strict=True))


def _losses(
    config: dict,
    weights: dict[str, tape.Tensor],
    tokens: np.ndarray,
    mtp_weight: float,
    balance_weight: float,
    documents: np.ndarray | None,
) -> tuple[tape.Tensor, Losses]:
    """The loss on the tape, and all terms as numbers."""
    tokens = np.asarray(tokens)
    inputs = None if documents is None else documents[:, :-1]
    output = trace(config, weights, tokens[:, :-1], inputs)
    count = max(int(_counted(tokens, documents, distance=1).sum()), 1)
    main = _negative_log_likelihood(output.logits, tokens, documents, distance=1) * (1 / count)
    by_depth = [
        _negative_log_likelihood(logits, tokens, documents, distance=depth + 1) * (1 / count)
        for depth, logits in enumerate(output.mtp_logits, start=1)
    ]
    mtp = sum(by_depth, start=tape.as_tensor(0.0)) * (1 / max(len(by_depth), 1))
    by_layer = {layer: routing.balance_loss for layer, routing in output.routing.items()}
    balance = sum(by_layer.values(), start=tape.as_tensor(0.0))
    loss = main + mtp_weight * mtp + balance_weight * balance
    return loss, Losses(
        loss=float(loss.value),
        main=float(main.value),
        mtp=float(mtp.value),
        mtp_by_depth=tuple(float(term.value) for term in by_depth),
        balance=float(balance.value),
        balance_by_layer={layer: float(term.value) for layer, term in by_layer.items()},
        load_by_layer=_loads(output),
    )


def _loads(output: Output[tape.Tensor]) -> dict[int, np.ndarray]:
    return {layer: routing.load for layer, routing in output.routing.items()}


def _counted(tokens: np.ndarray, documents: np.ndarray | None, distance: int) -> np.ndarray:
    """Which targets `distance` after their input position count, bool [B, T + 1 - distance]."""
    if documents is None:
        return np.ones((tokens.shape[0], tokens.shape[1] - distance), dtype=bool)
    return documents[:, :-distance] == documents[:, distance:]


def _negative_log_likelihood(
    logits: tape.Tensor, tokens: np.ndarray, documents: np.ndarray | None, distance: int
) -> tape.Tensor:
    """Sum over the targets that count of -log P(target); logits [B, T + 1 - distance, V]."""
    targets = tokens[:, distance:]
    row, position = np.indices(targets.shape)
    log_probability = tape.log_softmax(logits)[row, position, targets]
    return -tape.total(log_probability * _counted(tokens, documents, distance))


def start_adamw(gradients: dict[str, np.ndarray]) -> AdamWState:
    """The state before the first step, for weights with these names and shapes."""

    def zeros() -> dict[str, np.ndarray]:
        return {name: np.zeros(np.shape(value)) for name, value in gradients.items()}

    return AdamWState(step=0, first=zeros(), second=zeros())


def adamw_step(
    weights: dict[str, np.ndarray],
    gradients: dict[str, np.ndarray],
    state: AdamWState,
    *,
    learning_rate: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> tuple[dict[str, np.ndarray], AdamWState, float]:
    """New weights, new state, and the global gradient norm before clipping.

    All gradients are first multiplied by min(1, clip_norm / (norm + 1e-6)), as PyTorch's
    clip_grad_norm_ does (optax leaves the 1e-6 out: 1e-6 relative). Then, with step t from 1,
        m = beta1 m + (1 - beta1) g         v = beta2 v + (1 - beta2) g^2
        w = w - learning_rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
                               + weight_decay w)
    Decay is decoupled and leaves 1-D weights, the norms, alone. Weights without a gradient, the
    selection biases, are returned as they are.
    """
    norm = float(np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values())))
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
    step = state.step + 1
    updated, first, second = dict(weights), {}, {}
    for name, gradient in gradients.items():
        weight, gradient = weights[name], gradient * factor
        first[name] = beta1 * state.first[name] + (1 - beta1) * gradient
        second[name] = beta2 * state.second[name] + (1 - beta2) * gradient**2
        scale = np.sqrt(second[name] / (1 - beta2**step)) + eps
        decay = weight_decay * weight if weight.ndim > 1 else 0.0
        change = first[name] / (1 - beta1**step) / scale + decay
        updated[name] = weight - learning_rate * change
    return updated, AdamWState(step, first, second), norm


def update_selection_bias(bias: np.ndarray, load: np.ndarray, rate: float) -> np.ndarray:
    """bias + rate * sign(mean(load) - load): up for underloaded experts, down for overloaded.

    `load` is that of the whole step's batch. An expert exactly at the mean stays as it is.
    """
    return bias + rate * np.sign(np.mean(load) - load)
