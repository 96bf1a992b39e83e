"""The schedule as a tree: kernels, transfers, loops and choices, with what each costs. No JAX.

XLA moves nothing across the border of a loop or a conditional, so each of their computations is a
`Block` with a schedule of its own.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from dsv3_jax.plan.costs import FREE, Cost, instruction_cost, products
from dsv3_jax.plan.hlo import Computation, Instruction, Module
from dsv3_jax.plan.links import (
    KINDS,
    Number,
    Traffic,
    group_traffic,
    pairs_traffic,
    parse_groups,
    parse_pairs,
)


@dataclass(frozen=True)
class Collective:
    """One transfer as it stands in the schedule."""

    name: str
    kind: str
    op_name: str
    payload_bytes: int
    """A device's operands; of an all-gather its results."""
    traffic: Traffic
    group_size: int
    """Devices in a group; 2 for a collective-permute."""
    asynchronous: bool


@dataclass(frozen=True)
class Kernel:
    """Something that computes or moves memory."""

    name: str
    cost: Cost
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """A transfer begins; a synchronous one has its `Done` right behind it."""

    collective: Collective


@dataclass(frozen=True)
class Done:
    """The device waits until the transfer of that name has ended."""

    name: str


@dataclass(frozen=True)
class Loop:
    """A body that runs `trips` times; not `known` are those that a TripRule guessed."""

    name: str
    op_name: str
    trips: int
    known: bool
    body: "Block"


@dataclass(frozen=True)
class Choice:
    """A conditional: one of its branches runs, decided by data."""

    name: str
    op_name: str
    branches: tuple["Block", ...]


Item = Kernel | Start | Done | Loop | Choice


@dataclass(frozen=True)
class Block:
    """A computation in the order of its schedule."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Totals:
    """What a block costs with everything in it."""

    cost: Cost = field(default_factory=Cost)
    traffic: Traffic = field(default_factory=Traffic)
    counts: dict[str, Number] = field(default_factory=dict)
    """How many collectives of each kind."""
    bytes_by_kind: dict[str, Traffic] = field(default_factory=dict)

    def __add__(self, other: "Totals") -> "Totals":
        counts, by_kind = dict(self.counts), dict(self.bytes_by_kind)
        for kind, count in other.counts.items():
            counts[kind] = counts.get(kind, 0.0) + count
        for kind, traffic in other.bytes_by_kind.items():
            by_kind[kind] = by_kind.get(kind, Traffic()) + traffic
        return Totals(self.cost + other.cost, self.traffic + other.traffic, counts, by_kind)

    def __mul__(self, times: Number) -> "Totals":
        return Totals(
            self.cost * times,
            self.traffic * times,
            {kind: count * times for kind, count in self.counts.items()},
            {kind: traffic * times for kind, traffic in self.bytes_by_kind.items()},
        )


BRANCH_RULES = ("max", "mean")


TripRule = Callable[[str], int]
"""How often a loop runs that ends by its data, given where JAX traced it: its `op_name`, such as
`jit(step)/while/body/while`."""


def run_once(op_name: str) -> int:
    """Every loop that ends by its data runs once."""
    return 1


def read_program(module: Module, gpus_per_node: int, trips: TripRule = run_once) -> Block:
    """The entry computation as a tree; a computation called twice is one Block, shared."""
    return _Reader(module, gpus_per_node, trips).block(module.entry.name)


def count_totals(block: Block, branches: str = "max") -> Totals:
    """FLOPs, bytes and transfers of one run of `block`.

    Of a conditional counts, for "max", the branch with the most FLOPs (then HBM bytes, then bytes
    sent), for "mean" the mean of all.
    """
    if branches not in BRANCH_RULES:
        raise ValueError(f"branches is {branches!r}, expected one of {', '.join(BRANCH_RULES)}")
    done: dict[str, Totals] = {}

    def of_block(block: Block) -> Totals:
        if block.name not in done:
            done[block.name] = sum((of_item(item) for item in block.items), Totals())
        return done[block.name]

    def of_item(item: Item) -> Totals:
        match item:
            case Kernel():
                return Totals(cost=item.cost)
            case Start():
                c = item.collective
                return Totals(Cost(), c.traffic, {c.kind: 1.0}, {c.kind: c.traffic})
            case Loop():
                return of_block(item.body) * item.trips
            case Choice():
                each = [of_block(branch) for branch in item.branches]
                if branches == "mean":
                    return sum(each, Totals()) * (1 / len(each))
                return max(
                    each, key=lambda t: (t.cost.flops, t.cost.hbm_bytes, t.traffic.total_bytes)
                )
        return Totals()

    return of_block(block)


def walk_blocks(block: Block) -> Iterator[Block]:
    """`block` and every block in it, each once, the outer first."""
    seen: set[str] = set()
    waiting = [block]
    while waiting:
        current = waiting.pop(0)
        if current.name in seen:
            continue
        seen.add(current.name)
        yield current
        for item in current.items:
            match item:
                case Loop():
                    waiting.append(item.body)
                case Choice():
                    waiting.extend(item.branches)


def list_unknowns(block: Block) -> tuple[list[str], list[str]]:
    """Loops whose trip count was guessed (`name x trips`), and calls whose FLOPs do not count."""
    loops, calls = [], set()
    for inner in walk_blocks(block):
        for item in inner.items:
            match item:
                case Loop(known=False):
                    loops.append(f"{item.name} x {item.trips}")
                case Kernel():
                    calls.update(item.uncounted)
    return loops, sorted(calls)


class _Reader:
    """Turns computations into blocks, each once."""

    def __init__(self, module: Module, gpus_per_node: int, trips: TripRule):
        self.module = module
        self.gpus_per_node = gpus_per_node
        self.trips = trips
        self.blocks: dict[str, Block] = {}

    def block(self, name: str) -> Block:
        if name not in self.blocks:
            computation = self.module.computations[name]
            items = [
                item for line in computation.instructions for item in self.items(computation, line)
            ]
            self.blocks[name] = Block(name, tuple(items))
        return self.blocks[name]

    def items(self, computation: Computation, line: Instruction) -> Iterator[Item]:
        """What one instruction stands for; nothing for tuples and the like."""
        opcode = line.opcode
        if opcode in FREE:
            return
        if opcode.endswith("-done"):
            yield Done(line.operands[0])
        elif opcode == "while":
            known = self.trip_count(line)
            trips = self.trips(line.op_name) if known is None else known
            body = self.block(line.called("body") or "")
            yield Loop(line.name, line.op_name, trips, known is not None, body)
        elif opcode == "conditional":
            branches = tuple(self.block(name) for name in _branch_names(line))
            yield Choice(line.name, line.op_name, branches)
        elif opcode == "call":
            yield from self.block(line.called("to_apply") or "").items
        elif not opcode.endswith("-update"):
            yield from self.kernel_or_transfer(computation, line)

    def kernel_or_transfer(self, computation: Computation, line: Instruction) -> Iterator[Item]:
        asynchronous = line.opcode.endswith("-start")
        sent = list(self.collectives(computation, line))
        if line.opcode.removesuffix("-start") not in KINDS:
            cost, uncounted = instruction_cost(self.module, computation, line)
            if not sent or cost.flops:
                yield Kernel(line.name, cost, uncounted)
        if sent:
            yield Start(_merge(line, sent, asynchronous))
            if not asynchronous:
                yield Done(line.name)

    def collectives(self, computation: Computation, line: Instruction) -> Iterator[Collective]:
        """The collective that `line` is, or those that it wraps (async-start, fusion)."""
        kind = line.opcode.removesuffix("-start")
        if kind in KINDS:
            yield self.collective(computation, line, kind)
            return
        called = line.called("calls")
        if called is not None:
            for part, where in products(self.module, self.module.computations[called]):
                if part.opcode in KINDS:
                    yield self.collective(where, part, part.opcode)

    def collective(self, computation: Computation, line: Instruction, kind: str) -> Collective:
        operand_bytes = sum(array.nbytes for array in computation.operand_arrays(line))
        if kind in ("collective-permute", "collective-broadcast"):
            text = line.attribute("source_target_pairs") or ""
            traffic = pairs_traffic(operand_bytes, parse_pairs(text), self.gpus_per_node)
            return Collective(line.name, kind, line.op_name, operand_bytes, traffic, 2, False)
        text = line.attribute("replica_groups") or ""
        groups = parse_groups(text, self.module.partitions)
        size = len(groups[0])
        payload = operand_bytes * (size if kind == "all-gather" else 1)
        traffic = group_traffic(kind, payload, groups, self.gpus_per_node)
        return Collective(line.name, kind, line.op_name, payload, traffic, size, False)

    def trip_count(self, line: Instruction) -> int | None:
        """From XLA's analysis, else from a condition that is `counter < constant`."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.attributes)
        if known:
            return int(known[1])
        condition = self.module.computations[line.called("condition") or ""]
        parts = [part for part, _ in products(self.module, condition)]
        compares = [part for part in parts if part.opcode == "compare"]
        bounds = [
            int(part.text)
            for part in parts
            if part.opcode == "constant" and re.fullmatch(r"[su]\d+", part.results[0].dtype)
        ]
        ends_in_compare = condition.root.opcode in ("compare", "fusion")
        if len(compares) == len(bounds) == 1 and ends_in_compare and len(parts) <= _SIMPLE:
            return bounds[0] if compares[0].attribute("direction") == "LT" else None
        return None


_SIMPLE = 8  # instructions of a condition that only compares its counter


def _branch_names(line: Instruction) -> list[str]:
    """Of an indexed conditional in the order of its index, of a predicated one (true, false)."""
    listed = line.attribute("branch_computations")
    if listed is not None:
        return [name.strip().lstrip("%") for name in listed.strip("{}").split(",")]
    return [line.called(key) or "" for key in ("true_computation", "false_computation")]


def _merge(line: Instruction, sent: list[Collective], asynchronous: bool) -> Collective:
    """One transfer under the name of the line, of all that it wraps."""
    first = sent[0]
    return Collective(
        line.name,
        first.kind,
        line.op_name or first.op_name,
        sum(part.payload_bytes for part in sent),
        sum((part.traffic for part in sent), Traffic()),
        first.group_size,
        asynchronous,
    )
