"""A kernel's FLOPs, where whoever reads a compiled program finds them: in its instruction's name.

To XLA a kernel is a custom call without a cost; of JAX's CostEstimate nothing gets that far.
"""

from typing import Literal

import jax


def flops_in_name(unit: Literal["bf16", "fp8"], flops: int):
    """A scope for the call of a kernel that does `flops` on this unit: `.../fp8_flops=12/...`."""
    return jax.named_scope(f"{unit}_flops={flops}")
