"""The Hopper kernels at the model's shape, in BF16."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels.bench import Case, memory_shares
from dsv3_kernels.logfmt import mosaic_sm90, op, tiles
from dsv3_kernels.logfmt.reference import packed_bytes
from dsv3_kernels.logfmt.shapes import BITS, SHAPE
from dsv3_kernels.sass import Kernel


def cases() -> list[Case]:
    """There and back with each number of bits."""
    return [case for bits in BITS for case in (_encode(bits), _decode(bits))]


def _encode(bits: int) -> Case:
    def make(key: Array) -> tuple[Array, ...]:
        return (jax.random.normal(key, SHAPE, jnp.bfloat16),)

    run = partial(mosaic_sm90.encode, bits=bits)
    return _case("encode", bits, run, make, asked_bytes=tiles.value_bytes(2))


def _decode(bits: int) -> Case:
    def make(key: Array) -> tuple[Array, ...]:
        x = jax.random.normal(key, SHAPE, jnp.bfloat16)
        return (op.encode(x, bits, implementation="reference"),)

    run = partial(mosaic_sm90.decode, columns=SHAPE[1], bits=bits, dtype=jnp.bfloat16)
    return _case("decode", bits, run, make, asked_bytes=tiles.coded_bytes(bits))


def _case(name: str, bits: int, run, make, asked_bytes: int) -> Case:
    rows, columns = SHAPE

    def predict(kernels: Sequence[Kernel]) -> dict[str, float]:
        [kernel] = kernels
        programs = tiles.programs_per_sm(kernel.shared_memory_bytes, kernel.registers)
        moved = tiles.value_bytes(2) + tiles.coded_bytes(bits)
        return memory_shares(kernel, moved, asked_bytes, programs)

    return Case(
        op="logfmt",
        name=f"{name} {list(SHAPE)} in {bits} bits",
        run=run,
        make=make,
        unit="memory",
        work=rows * (2 * columns + packed_bytes(columns, bits)),
        predict=predict,
        reference=partial(getattr(op, name), implementation="reference", **run.keywords),
    )
