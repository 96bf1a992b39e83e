"""A kernel's work, where whoever reads a compiled program finds it: in its instruction's name.

To XLA a kernel is a custom call without a cost; of JAX's CostEstimate nothing gets that far.
"""

from typing import Literal

import jax


def work_in_name(unit: Literal["bf16", "fp8"], flops: int, read_bytes: int | None = None):
    """A scope for the call of a kernel that does `flops` on this unit: `.../fp8_flops=12/...`; with
    `read_bytes` of one that reads no more of its operands than that, `..._read_bytes=34/...`."""
    reads = "" if read_bytes is None else f"_read_bytes={read_bytes}"
    return jax.named_scope(f"{unit}_flops={flops}{reads}")
