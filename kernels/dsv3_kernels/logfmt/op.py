"""LogFMT-n of rows, packed for the wire: the contract and the choice of implementation.

encode(x [..., columns], bits)              -> uint8 [..., packed_bytes(columns, bits)]
decode(packed, columns, bits, dtype)        -> dtype [..., columns]

Codes, limits and the order of bits are `reference`'s.
"""

import importlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv3_kernels import choice
from dsv3_kernels.logfmt import reference
from dsv3_kernels.logfmt.reference import packed_bytes, require_packed

__all__ = ["decode", "encode", "packed_bytes"]
IMPLEMENTATIONS = ("reference", "mosaic")
# Jitted, so that each shape is traced and lowered once in a program: a kernel takes 0.5 s.


@partial(jax.jit, static_argnames=("bits", "implementation"))
def encode(
    x: Float[Array, "*batch columns"], bits: int, *, implementation: str | None = None
) -> UInt8[Array, "*batch bytes"]:
    """`x` in `bits` bits a value and 4 bytes for each 128.

    None chooses `mosaic` where the program is for Hopper and the kernel has the case, otherwise
    `reference`. Raises ValueError for an unknown implementation, for columns that are not whole
    tiles and for bits outside 4..16; NotImplementedError for a case that the named one lacks.
    """
    choice.require_known(implementation, IMPLEMENTATIONS)
    packed_bytes(x.shape[-1], bits)

    def plain(x: Array) -> Array:
        return reference.pack(reference.encode(x, bits), bits)

    return choice.run(
        "logfmt encode",
        implementation,
        (x,),
        kernel=lambda: partial(_mosaic().encode, bits=bits),
        unsupported=lambda: _mosaic().unsupported(x.dtype, x.size, bits),
        plain=plain,
    )


@partial(jax.jit, static_argnames=("columns", "bits", "dtype", "implementation"))
def decode(
    packed: UInt8[Array, "*batch bytes"],
    columns: int,
    bits: int,
    dtype: DTypeLike = jnp.float32,
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch columns"]:
    """The values, computed in FP32, in `dtype`. Chosen and raised as above, and ValueError for rows
    of another size."""
    choice.require_known(implementation, IMPLEMENTATIONS)
    require_packed(packed.shape[-1], columns, bits)

    def plain(packed: Array) -> Array:
        return reference.decode(reference.unpack(packed, columns, bits), bits, dtype)

    return choice.run(
        "logfmt decode",
        implementation,
        (packed,),
        kernel=lambda: partial(_mosaic().decode, columns=columns, bits=bits, dtype=dtype),
        unsupported=lambda: _mosaic().unsupported(dtype, packed.size, bits),
        plain=plain,
    )


def _mosaic() -> Any:
    """Loaded when first asked for: it takes a second."""
    return importlib.import_module("dsv3_kernels.logfmt.mosaic_sm90")
