"""The Hopper kernels at the 671B model's shapes."""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_kernels import sass
from dsv3_kernels.bench import Case, memory_shares
from dsv3_kernels.permute import mosaic_sm90, reference, shapes, tiles
from dsv3_kernels.permute.shapes import Shape


def cases() -> list[Case]:
    """Rows taken, summed, and multiplied for the gradient of weights."""
    taken = [_case("take_rows", shape, programs=shape.slots) for shape in shapes.TAKEN]
    summed = [_case("sum_rows", shape, programs=shape.rows) for shape in shapes.SUMMED]
    multiplied = [
        _case("dot_rows", shape, programs=shape.rows)
        for shape in shapes.SUMMED
        if shape.has_weights
    ]
    return taken + summed + multiplied


def _case(op: str, shape: Shape, *, programs: int) -> Case:
    # A slot that is filled is read once, and each row or slot of the result written; `dot_rows`
    # reads its rows instead.
    row_bytes = shape.width * jnp.dtype(shape.dtype).itemsize
    work = (shape.filled + programs) * row_bytes
    loads = shape.filled / programs + (op == "dot_rows")

    def predict(kernels: Sequence[sass.Kernel]) -> dict[str, float]:
        [kernel] = kernels
        moved, beside = work / programs, tiles.programs_per_sm(kernel.registers)
        of_memory = memory_shares(kernel, moved, row_bytes, beside)
        return of_memory | tiles.shares(kernel.registers, programs, moved, loads)

    return Case(
        op="permute",
        name=f"{op}, {shape.name}",
        run=getattr(mosaic_sm90, op),
        make=_make(op, shape),
        unit="memory",
        work=work,
        predict=predict,
        reference=getattr(reference, op),
    )


def _make(op: str, shape: Shape) -> Callable[[Array], tuple[Array, ...]]:
    """The kernel's arguments: rows at random, in random slots."""
    is_taken = op == "take_rows"

    def make(key: Array) -> tuple[Array, ...]:
        of_rows, of_slots, of_weights = jax.random.split(key, 3)
        table = (shape.slots,) if is_taken else (shape.rows, shape.top_k)
        place = jax.random.permutation(of_slots, math.prod(table)).reshape(table)
        number = shape.rows if is_taken else shape.slots
        index = jnp.where(place < shape.filled, place % number, -1)

        def some(rows: int) -> Array:
            return jax.random.bits(of_rows, (rows, shape.width), jnp.uint8).astype(shape.dtype)

        if op == "dot_rows":
            return some(shape.rows), some(shape.slots), index
        weights = [jax.random.uniform(of_weights, table)] if shape.has_weights else []
        return some(number), index, *weights

    return make
