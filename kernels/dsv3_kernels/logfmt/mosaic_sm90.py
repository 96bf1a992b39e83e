"""LogFMT on Hopper: a thread a tile of 128 values, so that nothing is asked of another.

    x [tiles, 128]  <->  packed [tiles, 4 bits + 1] words of 32 bits        128 tiles a program

    program: one warpgroup
      encode    TMA      128 tiles -> shared memory, 128-byte swizzled     arrives at a barrier
                limits   a thread its tile, 8 values of BF16 in one access: smallest and largest
                codes    the tile again, 64 values at a time: log2, a quotient, a whole number;
                         16 codes and signs -> bits / 2 words -> shared memory
                copy     words side by side -> memory

      decode    copy     words side by side -> shared memory
                values   a thread its tile: bits out of one word or two, 2^..., sign
                TMA      128 tiles -> memory

      packed tile     | group 0: bits / 2 words | group 1 | ... | group 7 | largest, smallest |
      shared memory   41 words (33 with 8 bits), an odd number: 32 threads that each write their
                      n-th word meet in no bank

A packed tile is 164 bytes (132), which is no multiple of the 16 that TMA wants of a stride: so
words go to memory by threads, 128 bytes a warp.

Bound: memory. Of a value of BF16 in 10 bits 2 + 1.28 bytes (8: 2 + 1.03), at 14.5 a cycle and SM
4.4 values a cycle, for which 128 threads' instructions start: 29 a value (8 bits: 27). The kernels
take 23 to encode and 14 to decode. A logarithm or exponential is one of them, of 16 a cycle.

The papers give 50 to 100 % over the all-to-all for this, fused into it. Of 4,096 tokens, 7,168
values each, by these instructions: 151 us to encode and 94 us to decode on the 20 SMs that DeepSeek
leaves to communication, where 10 bits take 752 us at 50 GB/s: 33 %; at NVLink's 160 GB/s 104 %. On
all SMs, by themselves, 32 us each are predicted: what their bytes take to memory and back.

Against the reference: the same bytes and values in the interpreter, where log2 and exp2 are the
CPU's; FP32 values to 1e-5, and large constants in FP32 that are none in BF16 may tip by a code. On
a GPU the last places of log2 and exp2 differ from the CPU's, as those of XLA's own do there, and
codes between two values may tip.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from dsv3_kernels.logfmt import tiles as sizes
from dsv3_kernels.logfmt.reference import GROUP, NAN, TILE, TINY, clip_limits, packed_bytes, steps
from dsv3_kernels.quantize.mosaic_sm90 import IN_DTYPES, buffer

BITS = (8, 10)
MAGNITUDE = 0x7FFFFFFF
SIGN = -0x80000000
LN_2 = math.log(2)


def encode(x: Float[Array, "*batch columns"], bits: int) -> UInt8[Array, "*batch bytes"]:
    """The reference's `pack(encode(x))`. NotImplementedError: see `unsupported`."""
    _require_supported(x.dtype, x.size, bits)
    *batch, columns = x.shape
    count, words = x.size // TILE, sizes.words(bits)
    packed = _kernel(
        functools.partial(_encode_kernel, bits),
        count,
        name="logfmt_encode",
        out_type=jax.ShapeDtypeStruct((count + -count % sizes.TILES, words), jnp.uint32),
        scratch_types=dict(
            x_smem=buffer((sizes.TILES, TILE), x.dtype),
            packed_smem=plgpu.SMEM((sizes.TILES, words), jnp.uint32),
            arrived=plgpu.Barrier(),
        ),
        bytes_accessed=count * (TILE * x.dtype.itemsize + 4 * words),
    )(x.reshape(count, TILE))
    in_bytes = lax.bitcast_convert_type(packed[:count], jnp.uint8)
    return in_bytes.reshape(*batch, packed_bytes(columns, bits))


def decode(
    packed: UInt8[Array, "*batch bytes"], columns: int, bits: int, dtype: DTypeLike
) -> Float[Array, "*batch columns"]:
    """The reference's `decode(unpack(packed))`. NotImplementedError: see `unsupported`."""
    dtype = jnp.dtype(dtype)
    _require_supported(dtype, packed.size, bits)
    batch, words = packed.shape[:-1], sizes.words(bits)
    in_words = lax.bitcast_convert_type(packed.reshape(-1, words, 4), jnp.uint32)
    count = in_words.shape[0]
    if count % sizes.TILES:
        in_words = jnp.pad(in_words, [(0, -count % sizes.TILES), (0, 0)])
    values = _kernel(
        functools.partial(_decode_kernel, bits),
        count,
        name="logfmt_decode",
        out_type=jax.ShapeDtypeStruct((count, TILE), dtype),
        scratch_types=dict(
            packed_smem=plgpu.SMEM((sizes.TILES, words), jnp.uint32),
            x_smem=buffer((sizes.TILES, TILE), dtype),
        ),
        bytes_accessed=count * (TILE * dtype.itemsize + 4 * words),
    )(in_words)
    return values.reshape(*batch, columns)


def unsupported(dtype: DTypeLike, size: int, bits: int) -> str:
    """Why the kernels will not take values of this dtype, packed or not, or an empty string."""
    if jnp.dtype(dtype) not in IN_DTYPES:
        return f"values are {jnp.dtype(dtype)}, expected bfloat16 or float32"
    if bits not in BITS:
        return f"bits are {bits}, expected 8 or 10"
    if size == 0:
        return "there are no values, expected at least one"
    return ""


def _require_supported(dtype: DTypeLike, size: int, bits: int) -> None:
    if reason := unsupported(dtype, size, bits):
        raise NotImplementedError(f"LogFMT on Hopper: {reason}")


def _kernel(
    body: Any, count: int, name: str, out_type: Any, scratch_types: dict, bytes_accessed: int
) -> Any:
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(-(-count // sizes.TILES),),
        grid_names=("program",),
        kernel_name=name,
        scratch_types=scratch_types,
        cost_estimate=pl.CostEstimate(
            flops=12 * count * TILE, transcendentals=count * TILE, bytes_accessed=bytes_accessed
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # A thread reads and writes its own rows of shared memory; where not, here is a barrier.
            unsafe_no_auto_barriers=True,
            # All layouts are given: to infer them takes Mosaic 20 s, for so many columns.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def _encode_kernel(bits, x, packed, *, x_smem, packed_smem, arrived):
    mine = _mine()
    plgpu.copy_gmem_to_smem(x.at[mine], x_smem, arrived)
    plgpu.barrier_wait(arrived)
    smallest, largest = _limits(x_smem)
    log_min, step = _log_min_and_step(smallest, largest, bits)
    step = jnp.where(step > 0, step, jnp.float32(1))  # NaN's too: log_min makes those NaN
    rounding = 2 - middle(step)
    for start in range(0, TILE, sizes.PIECE):
        # Or the compiler would have all of the tile in registers, from the first reading on.
        plgpu.commit_smem()
        stored = _read(x_smem.at[:, pl.ds(start, sizes.PIECE)])
        magnitude = stored & MAGNITUDE
        log = jnp.log2(_float(magnitude))  # of what FP32 flushes as of zero
        code = (log - _spread(log_min, log)) / _spread(step, log) + _spread(rounding, log)
        # NaN becomes 0 in int32. From the smallest magnitude on a code is at least 1.
        code = jnp.clip(code, 0, steps(bits) + 1).astype(jnp.int32)
        code = jnp.maximum(code, 1 + ((magnitude - _spread(smallest, magnitude)) >> 31))
        for group in range(0, sizes.PIECE, GROUP):
            words = _pack(_columns(code, group), _columns(stored, group), bits)
            first = (start + group) // GROUP * (bits // 2)
            for n, word in enumerate(words):
                _write_word(packed_smem, first + n, word)
    _write_word(packed_smem, sizes.words(bits) - 1, _packed_limits(smallest, largest))
    plgpu.commit_smem()
    packed[mine] = plgpu.load(packed_smem, layout=_side_by_side(packed_smem))


def _decode_kernel(bits, packed, x, *, packed_smem, x_smem):
    mine = _mine()
    layout = _side_by_side(packed_smem)
    packed_smem[...] = plgpu.load(packed.at[mine], layout=layout, optimized=False)
    plgpu.commit_smem()
    limits = _read_word(packed_smem, sizes.words(bits) - 1)
    smallest, largest = clip_limits(limits & ~0xFFFF, limits << 16)
    log_min, step = _log_min_and_step(smallest, largest, bits)
    zero = jnp.where(step == step, jnp.float32(0), jnp.float32(jnp.nan))
    least, most = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(x.dtype).max)
    for start in range(0, TILE, sizes.PIECE):
        values = []
        for group in range(0, sizes.PIECE, GROUP):
            first = (start + group) // GROUP * (bits // 2)
            words = [_read_word(packed_smem, first + n) for n in range(bits // 2)]
            for code, sign in _unpack(words, bits):
                value = jnp.exp2(log_min + step * (code - 1).astype(jnp.float32))
                value = jnp.where(code == 0, zero, jnp.clip(value, least, most))
                values.append(_bits(value) | sign)
        piece = _float(plgpu.layout_cast(jnp.concatenate(values, axis=1), _rows(x.dtype)))
        place = x_smem.at[:, pl.ds(start, sizes.PIECE)]
        plgpu.store(place, piece.astype(x.dtype), optimized=False)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(x_smem, x.at[mine])
    plgpu.wait_smem_to_gmem(0)


def _mine():
    return pl.ds(lax.axis_index("program") * sizes.TILES, sizes.TILES)


def _rows(dtype: DTypeLike | None = None) -> Any:
    """A row a thread; with a dtype, as many values in a vector as 16 bytes have, and one without:
    only columns that are no part of a vector can be taken apart."""
    return plgpu.Layout.TCGEN05_TMEM_NATIVE(16 // jnp.dtype(dtype).itemsize if dtype else 1)


def _side_by_side(ref: Any) -> Any:
    return plgpu.Layout.WG_STRIDED(ref.shape, vec_size=1)


def _read(ref: Any) -> Array:
    """FP32's bits of values."""
    values = plgpu.load(ref, layout=_rows(ref.dtype), optimized=False)
    return plgpu.layout_cast(_bits(values.astype(jnp.float32)), _rows())


def _read_word(packed_smem: Any, n: int) -> Array:
    word = plgpu.load(packed_smem.at[:, pl.ds(n, 1)], layout=_rows(), optimized=False)
    return word.astype(jnp.int32)


def _write_word(packed_smem: Any, n: int, word: Array) -> None:
    plgpu.store(packed_smem.at[:, pl.ds(n, 1)], word.astype(jnp.uint32), optimized=False)


def _limits(x_smem: Any) -> tuple[Array, Array]:
    """Magnitudes of code 1 and of the largest code, of each tile; see `reference.encode`."""
    smallest, largest = [], []
    for start in range(0, TILE, sizes.PIECE):
        magnitude = _read(x_smem.at[:, pl.ds(start, sizes.PIECE)]) & MAGNITUDE
        smallest.append(jnp.min(magnitude, axis=1))
        largest.append(jnp.max(magnitude, axis=1))
    of_tile = functools.reduce(jnp.minimum, smallest), functools.reduce(jnp.maximum, largest)
    rounded_down, most = (jnp.where(m < TINY, 0, jnp.minimum(m, NAN)) for m in of_tile)
    return clip_limits(rounded_down & ~0xFFFF, (most + 0xFFFF) & ~0xFFFF)


def _packed_limits(smallest: Array, largest: Array) -> Array:
    """Both in BF16. 2**-126 travels as 0, as the reference's exp2 has it on a CPU: who reads one
    takes it for the other."""
    smallest, largest = (jnp.where(m == TINY, 0, m) for m in (smallest, largest))
    word = lax.shift_right_logical(largest, 16) | smallest
    return plgpu.layout_cast(lax.broadcast_in_dim(word, (sizes.TILES, 1), (0,)), _rows())


def _log_min_and_step(smallest: Array, largest: Array, bits: int) -> tuple[Array, Array]:
    log_min, log_max = jnp.log2(_float(smallest)), jnp.log2(_float(largest))
    return log_min, (log_max - log_min) / steps(bits)


def middle(step: Array) -> Array:
    """log2((1 + 2**step) / 2) / step to FP32's last place, for steps up to 32 / 126: its series."""
    x = step * jnp.float32(LN_2)
    square = x * x
    return 0.5 + x * (1 / 8 - square * (1 / 192 - square * (1 / 2880)))


def _spread(of_tiles: Array, like: Array) -> Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(of_tiles, like.shape, (0,)), _rows())


def _columns(x: Array, first: int) -> list[Array]:
    """Of a group, one by one."""
    return [x[:, column : column + 1] for column in range(first, first + GROUP)]


def _pack(codes: list[Array], stored: list[Array], bits: int) -> list[Array]:
    """The words of a group: codes end to end, then the sign bits of what was stored."""
    width, words = bits - 1, []
    for start in range(0, GROUP * bits, 32):
        parts = []
        for lane, code in enumerate(codes):
            place = lane * width - start
            if -width < place < 32:
                parts.append(code << place if place >= 0 else code >> -place)
            place = GROUP * width + lane - start
            if 0 <= place < 32:
                parts.append(_shift_right(stored[lane] & SIGN, 31 - place))
        words.append(functools.reduce(lax.bitwise_or, parts))
    return words


def _unpack(words: list[Array], bits: int) -> list[tuple[Array, Array]]:
    """The codes of a group, and their signs as FP32 has them."""
    width, found = bits - 1, []
    for lane in range(GROUP):
        n, place = divmod(lane * width, 32)
        code = _shift_right(words[n], place)
        if place + width > 32:
            code |= words[n + 1] << (32 - place)
        n, place = divmod(GROUP * width + lane, 32)
        found.append((code & ((1 << width) - 1), (words[n] << (31 - place)) & SIGN))
    return found


def _shift_right(x: Array, places: int) -> Array:
    """Zeros come in from the left."""
    return lax.shift_right_logical(x, jnp.full(x.shape, places, x.dtype)) if places else x


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float32)
