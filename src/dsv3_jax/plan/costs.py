"""What one instruction of a compiled program costs a device: FLOPs and bytes of HBM. No JAX.

Only matrix products count as FLOPs, a multiply-add as two. Bytes are what a kernel must read and
write once: operands and results, where a slice of an operand counts as the slice and an update in
place as the update. Traffic that L2 saves, and reads repeated for want of cache, are not known.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from dsv3_jax.plan.hlo import Array, Computation, Instruction, Module
from dsv3_jax.plan.links import Number


@dataclass(frozen=True)
class Cost:
    """FLOPs by the unit that does them, and bytes of HBM."""

    fp8_flops: Number = 0.0
    bf16_flops: Number = 0.0
    tf32_flops: Number = 0.0
    fp32_flops: Number = 0.0
    hbm_bytes: Number = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __mul__(self, times: Number) -> "Cost":
        return Cost(*(getattr(self, f.name) * times for f in fields(Cost)))

    @property
    def flops(self) -> Number:
        return self.fp8_flops + self.bf16_flops + self.tf32_flops + self.fp32_flops


FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
        "domain",
    ]
)
"""Opcodes that launch nothing."""

_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATE_OPERAND = {"dynamic-update-slice": 1, "scatter": 2}
_FP8_FAMILY = ("f8", "s8", "u8", "f4", "s4", "u4")


def instruction_cost(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Cost, tuple[str, ...]]:
    """The cost of one kernel, and what in it has FLOPs that could not be counted.

    Loops, conditionals, calls and collectives are program.py's.
    """
    flops, uncounted = Cost(), ()
    called = instruction.called("calls")
    if called is None:
        flops, uncounted = _product_cost(computation, instruction)
        traffic = _plain_bytes(computation, instruction)
    else:
        inner = module.computations[called]
        for part, where in products(module, inner):
            cost, unknown = _product_cost(where, part)
            flops, uncounted = flops + cost, uncounted + unknown
        traffic = _fusion_bytes(inner)
    return flops + Cost(hbm_bytes=traffic), uncounted


def products(module: Module, computation: Computation) -> Iterator[tuple[Instruction, Computation]]:
    """Instructions of `computation`, and of fusions in it, with the computation each is in."""
    for instruction in computation.instructions:
        called = instruction.called("calls")
        if called is None:
            yield instruction, computation
        else:
            yield from products(module, module.computations[called])


def _product_cost(
    computation: Computation, instruction: Instruction
) -> tuple[Cost, tuple[str, ...]]:
    if instruction.opcode in ("dot", "scaled-dot", "ragged-dot"):
        left, right = (computation.operand(instruction, place).results[0] for place in (0, 1))
        contracted = instruction.numbers("lhs_contracting_dims")
        flops = 2.0 * instruction.results[0].size * math.prod(left.dims[dim] for dim in contracted)
        return _by_unit(flops, left, right, instruction.attributes.lower()), ()
    if instruction.opcode == "convolution":
        return Cost(), ("convolution",)
    if instruction.opcode != "custom-call":
        return Cost(), ()
    target = (instruction.attribute("custom_call_target") or "").strip('"')
    if target.startswith("__cublas$"):
        return _cublas_cost(computation, instruction), ()
    if target.startswith("mosaic_gpu"):
        return _mosaic_cost(instruction), ()
    return Cost(), () if target in _WITHOUT_PRODUCTS else (target,)


_WITHOUT_PRODUCTS = ("__cub$DeviceRadixSort", "__gpu$TopK", "Sharding", "annotate_device_placement")


_WORK_IN_NAME = re.compile(r"/(fp8|bf16)_flops=(\d+)(?:_read_bytes=(\d+))?/")


def _cublas_cost(computation: Computation, instruction: Instruction) -> Cost:
    """Of `__cublas$gemm`, `__cublas$lt$matmul` and its `$f8`: the first result is the product."""
    left, right = (computation.operand(instruction, place).results[0] for place in (0, 1))
    config = json.loads(instruction.attribute("backend_config") or "{}")["gemm_backend_config"]
    dims = config["dot_dimension_numbers"]["lhs_contracting_dimensions"]
    contracted = math.prod(left.dims[int(dim)] for dim in dims)
    precision = json.dumps(config.get("precision_config", {})).lower()
    return _by_unit(2.0 * instruction.results[0].size * contracted, left, right, precision)


def _mosaic_cost(instruction: Instruction) -> Cost:
    """Of dsv3_kernels, whose FLOPs are in their names (dsv3_kernels/cost.py)."""
    found = _WORK_IN_NAME.search(instruction.op_name)
    return Cost(**{f"{found[1]}_flops": float(found[2])}) if found else Cost()


def _by_unit(flops: float, left: Array, right: Array, precision: str) -> Cost:
    """`precision` is the instruction's text in lower case. FP32 by default runs as TF32."""
    types = (left.dtype, right.dtype)
    if all(dtype.startswith(_FP8_FAMILY) for dtype in types):
        return Cost(fp8_flops=flops)
    if "f64" in types or "c64" in types or "c128" in types:
        return Cost(fp32_flops=flops)
    if "f32" not in types or "dot_bf16" in precision or "dot_f16" in precision:
        return Cost(bf16_flops=flops)
    if "highest" in precision or "dot_f32_f32_f32" in precision:
        return Cost(fp32_flops=flops)
    return Cost(tf32_flops=flops)


def _plain_bytes(computation: Computation, instruction: Instruction) -> float:
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done"):
        return 0.0
    if opcode in _SLICES:
        return 2.0 * instruction.result_bytes
    if opcode in _UPDATE_OPERAND:
        update = computation.operand(instruction, _UPDATE_OPERAND[opcode])
        return 2.0 * update.result_bytes
    read = sum(array.nbytes for array in computation.operand_arrays(instruction))
    if (found := _WORK_IN_NAME.search(instruction.op_name)) and found[3]:
        read = min(read, int(found[3]))
    if opcode == "copy-start":
        return 2.0 * read
    results = instruction.results
    if "__cublas$" in instruction.attributes:
        results = results[:1]  # the others are workspace
    return float(read + sum(array.nbytes for array in results))


def _fusion_bytes(inner: Computation) -> float:
    """Every parameter read (or only its slices), every result written (or only its updates)."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions:
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    read = sum(
        _read_bytes(parameter, users)
        for parameter in inner.instructions
        if parameter.opcode == "parameter"
    )
    return float(read + _written_bytes(inner, inner.root))


def _read_bytes(source: Instruction, users: dict[str, list[Instruction]]) -> int:
    """Bytes read of `source`, never more than all of it."""
    total = 0
    for user in users.get(source.name, []):
        first = user.operands[0] == source.name
        if user.opcode == "bitcast":
            total += _read_bytes(user, users)
        elif user.opcode in _SLICES and first:
            total += user.result_bytes
        elif user.opcode in _UPDATE_OPERAND and first:
            continue  # updated in place: what is written counts where it is written
        else:
            return source.result_bytes
    return min(total, source.result_bytes)


def _written_bytes(inner: Computation, result: Instruction) -> int:
    if result.opcode == "tuple":
        return sum(_written_bytes(inner, inner.by_name[name]) for name in result.operands)
    if result.opcode == "bitcast":
        return _written_bytes(inner, inner.operand(result, 0))
    if result.opcode in _UPDATE_OPERAND:
        return inner.operand(result, _UPDATE_OPERAND[result.opcode]).result_bytes
    if "__cublas$" in result.attributes:
        return result.results[0].nbytes
    return result.result_bytes
