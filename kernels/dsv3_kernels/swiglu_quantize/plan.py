"""What the kernels are asked for, and how arrays come to them."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from dsv3_kernels.quantize.reference import BLOCK

IN_DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))


def unsupported(
    h: Float[Array, "*batch rows double_width"],
    weights: Float[Array, "*batch rows"] | None = None,
    d_a: Float[Array, "*batch rows width"] | None = None,
) -> str:
    """Why the kernels will not take these, or an empty string. Looks at shape and dtype only."""
    for name, x in (("h", h), ("weights", weights), ("d_a", d_a)):
        if x is not None and x.dtype not in IN_DTYPES:
            return f"{name} is {x.dtype}, expected bfloat16 or float32"
    if h.size == 0:
        return f"h is {list(h.shape)}, expected at least one value"
    return ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A problem, and how it is worked on."""

    name: str
    batch: int
    rows: int
    width: int
    """F."""
    dtype: Any
    has_weights: bool
    has_filled: bool
    power_of_two: bool = False

    @classmethod
    def of(
        cls,
        name: str,
        h: Array,
        weights: Array | None,
        filled: Array | None,
        power_of_two: bool = False,
        d_a: Array | None = None,
    ) -> "Plan":
        """NotImplementedError: see `unsupported`."""
        if reason := unsupported(h, weights, d_a):
            raise NotImplementedError(f"{name} on Hopper: {reason}")
        *batch, rows, double_width = h.shape
        return cls(
            name=name,
            batch=math.prod(batch),
            rows=rows,
            width=double_width // 2,
            dtype=h.dtype,
            has_weights=weights is not None,
            has_filled=filled is not None,
            power_of_two=power_of_two,
        )

    @property
    def is_transposed(self) -> bool:
        return self.name == "swiglu_quantize_transposed"

    @property
    def filled_rows(self) -> int:
        """With those past the end of the last tile, which what is copied without TMA needs."""
        return self.rows + -self.rows % BLOCK

    @property
    def filled_width(self) -> int:
        """Whole tiles of up must not begin in gate: any other F is filled up, by a copy of h."""
        return self.width + -self.width % BLOCK

    @property
    def cost(self) -> pl.CostEstimate:
        size = self.batch * self.rows * self.width
        is_backward = self.name == "swiglu_backward"
        moved = self.dtype.itemsize * (5 if is_backward else 2) + (not is_backward)
        flops = size * (16 if is_backward else 10)
        return pl.CostEstimate(flops=flops, bytes_accessed=size * moved, transcendentals=size)

    def matrices(self, x: Array, parts: int = 1) -> Array:
        """`x` [..., rows, parts F] as [batch, rows, parts filled_width]."""
        if self.filled_width == self.width:
            return x.reshape(self.batch, self.rows, parts * self.width)
        x = x.reshape(self.batch, self.rows, parts, self.width)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, self.filled_width - self.width)])
        return x.reshape(self.batch, self.rows, parts * self.filled_width)

    def of_rows(self, weights: Array | None, filled: Array | None) -> list[Array]:
        """Those that are there: [batch, filled_rows] in FP32, and [batch]."""
        there = []
        if weights is not None:
            weights = weights.astype(jnp.float32).reshape(self.batch, self.rows)
            there += [jnp.pad(weights, [(0, 0), (0, self.filled_rows - self.rows)])]
        if filled is not None:
            there += [filled.astype(jnp.int32).reshape(self.batch)]
        return there

    def split(self, refs: tuple) -> tuple[Any, Any, tuple]:
        """weights, `filled` and the results, of a kernel's last arguments."""
        weights = refs[0] if self.has_weights else None
        filled = refs[self.has_weights] if self.has_filled else None
        return weights, filled, refs[self.has_weights + self.has_filled :]
