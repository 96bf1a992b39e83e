"""An independent DeepSeek-V3: float64, NumPy alone, written from the papers and for the eye.

It is one of the three truths `dsv3_jax` is tested against (Hugging Face's golden files and closed
forms are the others), so it imports neither jax nor torch nor dsv3_jax, and shares nothing with
them but the published equations. Nothing in it is fast on purpose: experts are a loop,
attention is a full square, gradients come from the small tape in `tape.py`.

    tape.py       reverse-mode differentiation of NumPy expressions
    rope.py       rotary positions, YaRN frequencies and softmax scale
    attention.py  multi-head latent attention, expanded and absorbed
    router.py     affinities, expert choice, balance loss
    model.py      blocks, main model, multi-token prediction, greedy generation, latent cache
    training.py   losses, gradients, AdamW, selection-bias update
    weights.py    names and shapes of the released checkpoint, random weights, FP8 blocks

Notation: config is a dict with the names of Hugging Face's config.json, weights a dict from the
released checkpoint's tensor names to arrays. Shapes use B rows, S positions, H heads, E experts.
*Sources*: "B" is arXiv 2412.19437v2 (DeepSeek-V3 Technical Report), "V2" arXiv 2405.04434.
"""

from .model import Output, Routing, forward, forward_cached, greedy
from .training import (
    AdamWState,
    Losses,
    adamw_step,
    compute_losses,
    loss_and_gradients,
    start_adamw,
    update_selection_bias,
)
from .weights import dequantize_blocks, quantize_blocks, random_weights, weight_shapes

__all__ = [
    "AdamWState",
    "Losses",
    "Output",
    "Routing",
    "adamw_step",
    "compute_losses",
    "dequantize_blocks",
    "forward",
    "forward_cached",
    "greedy",
    "loss_and_gradients",
    "quantize_blocks",
    "random_weights",
    "start_adamw",
    "update_selection_bias",
    "weight_shapes",
]
