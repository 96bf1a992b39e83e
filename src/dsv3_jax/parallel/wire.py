"""How rows look on their way between devices: as they are, in E4M3, or in LogFMT.

Dispatch in E4M3 is what the experts' products read: 1x128 with power-of-two scales, exact when it
is decoded to BF16 and quantised again. Combine's backward brings gradients the same way, dispatch's
backward goes as combine does. One row is one run of bytes, so that a hop stays one transfer:

    E4M3     hidden values | one exponent for 128 of them | routing weights as they are
    LogFMT   dsv3_kernels.logfmt's bytes | routing weights' gradients as they are

Source: DeepSeek-V3 Technical Report §3.3.3 (dispatch, combine); "Insights into DeepSeek-V3" §3.2
(LogFMT).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.quant.formats import E4M3, E4M3_POWER_OF_TWO
from dsv3_kernels.logfmt.op import decode, encode, packed_bytes
from dsv3_kernels.quantize.op import BLOCK


@dataclass(frozen=True)
class Packing:
    """Rows [..., hidden + extra], of which `extra` columns are not to be rounded, as `pack` makes
    them and `unpack` makes of them again."""

    name: str
    pack: Callable[[Array, int], Array]
    unpack: Callable[[Array, int, DTypeLike], Array]


def _pack_e4m3(rows: Float[Array, "*batch width"], extra: int) -> UInt8[Array, "*batch bytes"]:
    hidden = rows.shape[-1] - extra
    values, exponents = E4M3_POWER_OF_TWO.encode(rows[..., :hidden])
    return jnp.concatenate([to_bytes(values), exponents, to_bytes(rows[..., hidden:])], axis=-1)


def _unpack_e4m3(
    packed: UInt8[Array, "*batch bytes"], extra: int, dtype: DTypeLike
) -> Float[Array, "*batch width"]:
    most = packed.shape[-1] - extra * jnp.dtype(dtype).itemsize
    hidden = most * BLOCK // (BLOCK + 1)  # of them and their exponents
    values = from_bytes(packed[..., :hidden], E4M3)
    rows = E4M3_POWER_OF_TWO.decode((values, packed[..., hidden:most]), dtype)
    return jnp.concatenate([rows, from_bytes(packed[..., most:], dtype)], axis=-1)


def _pack_logfmt(bits: int, rows: Float[Array, "*batch width"], extra: int) -> Array:
    hidden = rows.shape[-1] - extra
    packed = encode(rows[..., :hidden], bits)
    return jnp.concatenate([packed, to_bytes(rows[..., hidden:])], axis=-1)


def _unpack_logfmt(bits: int, packed: Array, extra: int, dtype: DTypeLike) -> Array:
    most = packed.shape[-1] - extra * jnp.dtype(dtype).itemsize
    hidden = most // packed_bytes(BLOCK, bits) * BLOCK
    rows = decode(packed[..., :most], hidden, bits, jnp.dtype(dtype))
    return jnp.concatenate([rows, from_bytes(packed[..., most:], dtype)], axis=-1)


AS_IS = Packing("as it is", lambda rows, extra: rows, lambda rows, extra, dtype: rows)
PACKINGS = {
    "bf16": AS_IS,
    "fp8": Packing("E4M3", _pack_e4m3, _unpack_e4m3),
} | {
    f"logfmt{bits}": Packing(
        f"LogFMT-{bits}", partial(_pack_logfmt, bits), partial(_unpack_logfmt, bits)
    )
    for bits in (8, 10)
}
"""By `precision.dispatch` and `precision.combine`."""


@dataclass(frozen=True)
class Wire:
    """What rows go out in to their experts, and what the sums come back in."""

    dispatch: Packing = AS_IS
    combine: Packing = AS_IS


UNCHANGED = Wire()


def wire_of(precision: PrecisionConfig) -> Wire:
    """What `precision` has rows and sums travel in."""
    return Wire(PACKINGS[precision.dispatch_format], PACKINGS[precision.combine])


def to_bytes(x: Array) -> UInt8[Array, "*batch bytes"]:
    """The bytes of the values of each row."""
    if x.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(x, jnp.uint8)
    parts = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return parts.reshape(*x.shape[:-1], x.shape[-1] * x.dtype.itemsize)


def from_bytes(packed: UInt8[Array, "*batch bytes"], dtype: DTypeLike) -> Array:
    """The values that `to_bytes` was given."""
    size = jnp.dtype(dtype).itemsize
    if size > 1:
        packed = packed.reshape(*packed.shape[:-1], packed.shape[-1] // size, size)
    return jax.lax.bitcast_convert_type(packed, dtype)


def pass_through(there: Packing, back: Packing, extra: int, rows: Array) -> Array:
    """`rows` as they arrive; their gradient as it arrives by the way back."""

    @jax.custom_vjp
    def passed(rows):
        return there.unpack(there.pack(rows, extra), extra, rows.dtype)

    passed.defvjp(
        lambda rows: (passed(rows), None),
        lambda _, d_rows: (back.unpack(back.pack(d_rows, extra), extra, d_rows.dtype),),
    )
    return rows if there is back is AS_IS else passed(rows)
