"""XLA's scheduled program, read from its text. Imports no JAX.

`parse_module` turns `compiled.as_text()` into computations with their instructions in the order of
the schedule. What the instructions cost is in costs.py, what the collectives send in links.py, how
often a computation runs in program.py.

Source: XLA's HloPrintOptions and hlo_parser.cc define the text.
"""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Array:
    """One array of an instruction's result, as a device holds it."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        """Bytes, four-bit values packed; 0 for tokens and opaque values."""
        return (self.size * dtype_bits(self.dtype) + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One line: its result (a tuple flattened), opcode, operands' names and the rest, unread."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    """The operands as printed: a constant's value, a parameter's number."""
    attributes: str

    @property
    def result_bytes(self) -> int:
        return sum(array.nbytes for array in self.results)

    @property
    def op_name(self) -> str:
        """Where JAX traced it, e.g. `jit(step)/shard_map/while/body/all_to_all`; may be empty."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, key: str) -> str | None:
        """The value of `key=value`, up to the comma that ends it; brackets are kept together."""
        found = re.search(rf"(?:^|[ ,]){re.escape(key)}=", self.attributes)
        if found is None:
            return None
        return self.attributes[found.end() : _end_of_value(self.attributes, found.end())]

    def called(self, key: str) -> str | None:
        """The computation that `key` names, without its %."""
        value = self.attribute(key)
        return None if value is None else value.lstrip("%")

    def numbers(self, key: str) -> tuple[int, ...]:
        """The integers of `key={1,2}`; empty if there is no such attribute."""
        return tuple(int(number) for number in re.findall(r"\d+", self.attribute(key) or ""))


@dataclass(frozen=True)
class Computation:
    """Instructions in schedule order; the last of those marked ROOT is the result."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction
    by_name: dict[str, Instruction]

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]

    def operand_arrays(self, instruction: Instruction) -> list[Array]:
        """The arrays of every operand, tuples flattened."""
        return [array for name in instruction.operands for array in self.by_name[name].results]


@dataclass(frozen=True)
class Module:
    """A whole program for `partitions` devices."""

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


def dtype_bits(dtype: str) -> int:
    """Bits of one value of an XLA type, e.g. 8 for f8e4m3fn; ValueError for an unknown one."""
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    found = re.fullmatch(r"(?:bf|f|s|u|c)(\d+)(?:e\d+m\d+\w*)?", dtype)
    if found is None:
        raise ValueError(f"HLO type {dtype!r} is unknown")
    return int(found[1])


def parse_module(text: str) -> Module:
    """The program of `compiled.as_text()`; ValueError if it is none or is not scheduled."""
    header = text.split("\n", 1)[0]
    if not header.startswith("HloModule") or "is_scheduled=true" not in header:
        raise ValueError(
            "expected the text of a compiled program: HloModule ..., is_scheduled=true"
        )
    computations: dict[str, Computation] = {}
    entry = None
    lines: list[str] = []
    name = ""
    for line in text.split("\n"):
        opened = _HEADER.match(line)
        if opened:
            name, lines = opened["name"], []
            entry = name if opened["entry"] else entry
        elif line.startswith("}"):
            computations[name] = _parse_computation(name, lines)
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("expected an ENTRY computation in the compiled program's text")
    counts = [re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
    partitions = math.prod(int(found[1]) for found in counts if found)
    return Module(computations, computations[entry], partitions)


def parse_arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a printed shape: `(f32[2,3]{1,0}, u32[])` has two."""
    return tuple(
        Array(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims in _ARRAY.findall(shape)
    )


_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?P<root>ROOT )?%?(?P<name>[^\s=]+) = ")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_BRACKET = re.compile(r"[()]")


def _parse_computation(name: str, lines: list[str]) -> Computation:
    instructions = []
    root = None
    for line in lines:
        opened = _INSTRUCTION.match(line)
        if opened is None:
            continue
        instruction = _parse_instruction(opened["name"], line[opened.end() :])
        instructions.append(instruction)
        root = instruction if opened["root"] else root
    if root is None:
        raise ValueError(f"computation {name} has no ROOT in the compiled program's text")
    by_name = {instruction.name: instruction for instruction in instructions}
    return Computation(name, tuple(instructions), root, by_name)


def _parse_instruction(name: str, rest: str) -> Instruction:
    """`rest` is `shape opcode(operands), attributes`."""
    shape_end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, shape_end)
    if opcode is None:
        raise ValueError(f"instruction {name} has no opcode in the compiled program's text")
    end = _close(rest, opcode.end() - 1)
    text = rest[opcode.end() : end - 1]
    operands = () if opcode[1] == "constant" else tuple(re.findall(r"%([^\s,()]+)", text))
    results = parse_arrays(rest[:shape_end])
    return Instruction(name, opcode[1], results, operands, text, rest[end:])


def _close(text: str, start: int) -> int:
    """The place after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in _BRACKET.finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    raise ValueError(f"unclosed parenthesis in the compiled program's text: {text[start:80]}")


def _end_of_value(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        character = text[place]
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            return place
    return len(text)
