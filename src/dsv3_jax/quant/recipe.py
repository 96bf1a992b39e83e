"""What is in which format, and where: the one table of the FP8 recipe.

    y  = x W^T       Fprop   x in 1x128, W in 128x128
    dx = dy W        Dgrad   dy in 1x128, W in 128x128
    dW = dy^T x      Wgrad   dy in 128x1, x in 128x1, from what was kept of x

Not in the table and so in BF16 or FP32: embedding, output head, routers, norms, attention, the MTP
modules' eh_proj (BF16 in the released checkpoint). Source: DeepSeek-V3 Technical Report §3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv3_jax.quant.formats import (
    BLOCKS,
    E4M3,
    E4M3_POWER_OF_TWO,
    E4M3_ROWS,
    E5M2,
    E5M6_POWER_OF_TWO,
    PLAIN,
    ROW,
    Codec,
)
from dsv3_jax.quant.scaled_array import Tile


@dataclass(frozen=True)
class Operand:
    """How one operand of a product is quantised; `tile` None is one scale for all."""

    tile: Tile | None = ROW
    dtype: DTypeLike = E4M3
    power_of_two: bool = False


@dataclass(frozen=True)
class ProductRule:
    """One product's operands. `kept` is how x waits for Wgrad; PLAIN where it is made again.

    Tiles are along the sum: 1x128 of the gradient is 128x1 where its transpose is an operand.
    """

    input: Operand = Operand()
    weight: Operand = Operand(BLOCKS)
    gradient: Operand = Operand()
    kept: Codec = E4M3_ROWS
    input_columns: Operand = Operand()
    gradient_columns: Operand = Operand()


_EXACT = Operand(power_of_two=True)
_ORDINARY = ProductRule()
PUBLISHED: dict[str, ProductRule] = {
    "q_a_proj": _ORDINARY,
    "q_proj": _ORDINARY,  # also of V2, and q_b_proj
    "kv_a_proj_with_mqa": _ORDINARY,
    "kv_b_proj": _ORDINARY,
    # Attention's backward reads it too; 1x128 turns into 128x1, so no rounding is added.
    "o_proj": replace(_ORDINARY, input=_EXACT, kept=E5M6_POWER_OF_TWO, input_columns=_EXACT),
    "gate_proj": _ORDINARY,
    "up_proj": _ORDINARY,
    # SwiGLU's output is made again from its inputs, which are kept (`KEPT`).
    "mlp_down_proj": replace(_ORDINARY, kept=PLAIN),
    # What dispatch has brought in E4M3 is the operand as it is.
    "gate_up_proj": replace(_ORDINARY, input=_EXACT, kept=E4M3_POWER_OF_TWO, input_columns=_EXACT),
    # The gradient comes by combine's backward, in E4M3 as well.
    "down_proj": replace(_ORDINARY, gradient=_EXACT, kept=PLAIN, gradient_columns=_EXACT),
}
"""By name of the product (parallel/tape.py)."""

QUANTISED = frozenset(PUBLISHED) - {"mlp_down_proj"} | {"q_b_proj"}
"""Attributes of the model whose weights these products read."""

KEPT: dict[str, Codec] = {
    "attention_output": E5M6_POWER_OF_TWO,
    "expert_rows": E4M3_POWER_OF_TWO,
    "expert_up": E4M3_ROWS,
    "mlp_gate": E4M3_ROWS,
    "mlp_up": E4M3_ROWS,
}
"""How named tensors wait for backward; the others as they are."""


def _changed(**operands: Operand) -> dict[str, ProductRule]:
    return {name: replace(rule, **operands) for name, rule in PUBLISHED.items()}


_WHOLE, _E5M2 = Operand(None), Operand(dtype=E5M2)
RULES: dict[str, dict[str, ProductRule]] = {
    "published": PUBLISHED,
    # What the papers argue against, to be seen in experiments/precision.
    "per_tensor_scales": _changed(
        input=_WHOLE,
        weight=_WHOLE,
        gradient=_WHOLE,
        input_columns=_WHOLE,
        gradient_columns=_WHOLE,
    ),
    "block_gradients": _changed(
        gradient=Operand(BLOCKS), input_columns=Operand(BLOCKS), gradient_columns=Operand(BLOCKS)
    ),
    "e5m2_gradients": _changed(gradient=_E5M2, gradient_columns=_E5M2),
}
"""By `precision.rules`."""


@dataclass(frozen=True)
class Recipe:
    """What a model computes in: activations in `dtype`, products by `rules` or in `dtype`."""

    dtype: DTypeLike = jnp.float32
    rules: Mapping[str, ProductRule] = field(default_factory=dict)
    kept: Mapping[str, Codec] = field(default_factory=dict)

    def codec(self, name: str) -> Codec:
        return self.kept.get(name, PLAIN)


UNQUANTISED = Recipe()
"""Products and activations in the dtype that they are given in."""


def make_recipe(recipe: str, rules: str = "published") -> Recipe:
    """Of `precision.recipe` and `precision.rules`."""
    if recipe == "fp8":
        return Recipe(jnp.bfloat16, RULES[rules], KEPT)
    return Recipe({"fp32": jnp.float32, "bf16": jnp.bfloat16}[recipe])
