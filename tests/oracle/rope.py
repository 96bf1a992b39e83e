"""Rotary position embedding of interleaved pairs, and its YaRN extension.

The released checkpoint rotates neighbouring channels (x0, x1), (x2, x3), ... as complex numbers.
*Source*: `inference/model.py` of DeepSeek-V3 for the layout; YaRN (arXiv 2309.00071) in the form
of the model's Hugging Face code for the frequencies.
"""

import math

import numpy as np

from . import tape


def magnitude_scale(factor: float, mscale: float) -> float:
    """YaRN's temperature 0.1 * mscale * ln(factor) + 1, and 1 without extension (factor <= 1).

    Example: magnitude_scale(40, 1.0) = 1.368888, its square 1.873854.
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def frequencies(config: dict) -> np.ndarray:
    """Angle per position of each channel pair, radians, [qk_rope_head_dim / 2].

    Plain RoPE turns pair j by theta ** (-2j / dim). YaRN leaves the fast pairs, which turn
    `beta_fast` times or more within the original length, alone; divides those of the slow pairs,
    with `beta_slow` turns or fewer, by `factor`; and blends linearly between.
    """
    dim, theta = config["qk_rope_head_dim"], config["rope_theta"]
    plain = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return plain

    def pair_with_turns(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with_turns(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(pair_with_turns(scaling.get("beta_slow", 1))), dim - 1)
    width = 0.001 if low == high else high - low  # Hugging Face's guard against dividing by 0
    slowness = np.clip((np.arange(dim // 2) - low) / width, 0.0, 1.0)
    return plain * (1.0 - slowness) + plain / scaling["factor"] * slowness


def rotate(config: dict, x, start: int = 0) -> tape.Tensor:
    """x [B, S, H, dim] or [B, S, dim] with pair j of position p turned by p * frequencies[j].

    The first position is `start`. With YaRN the result is also multiplied by
    magnitude(mscale) / magnitude(mscale_all_dim), which is 1 in every DeepSeek-V3.
    """
    x = tape.as_tensor(x)
    batch, length, *heads, dim = x.shape
    angles = np.outer(np.arange(start, start + length), frequencies(config))
    angles = angles.reshape(1, length, *(1 for _ in heads), dim // 2)
    scaling = config.get("rope_scaling") or {"factor": 1.0}
    magnitude = magnitude_scale(scaling["factor"], scaling.get("mscale", 1.0))
    magnitude /= magnitude_scale(scaling["factor"], scaling.get("mscale_all_dim", 0.0))
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    pairs = tape.reshape(x, (batch, length, *heads, dim // 2, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    turned = [first * cos - second * sin, first * sin + second * cos]
    columns = [tape.reshape(part, (*part.shape, 1)) for part in turned]
    return tape.reshape(tape.concatenate(columns, axis=-1), x.shape)


def softmax_scale(config: dict) -> float:
    """Factor of the attention scores: 1 / sqrt(nope + rope dims), times YaRN's magnitude squared.

    Example: heads of 128 + 64 and factor 40 give 1.873854 / sqrt(192) = 0.135234.
    """
    scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
    scaling = config.get("rope_scaling")
    if scaling is None:
        return scale
    return scale * magnitude_scale(scaling["factor"], scaling.get("mscale_all_dim", 0.0)) ** 2
