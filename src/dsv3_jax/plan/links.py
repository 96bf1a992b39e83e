"""What a collective sends over NVLink and over the network, a device. Imports no JAX.

Devices are numbered as XLA numbers partitions, and partition p is GPU p % 8 of node p // 8: true of
a mesh made of the topology's devices in their order. With n devices in a group, L of them in one
node, a device sends

    all-to-all           B/n to each of the others: B (n-L)/n network, B (L-1)/n NVLink
    all-gather           V = R (n-1)/n    a ring through every device, node after node: of its n
    reduce-scatter       V = B (n-1)/n    edges 1/L leave a node, so V/L network and
    all-reduce           V = 2 B (n-1)/n  V (L-1)/L NVLink (all NVLink within one node)
    collective-permute   B over whichever link its pair has; one pair over the network: all do

where B are the bytes of a device's operands and R those of its results. NCCL's rings are that, one
a network port, so the L devices of a node share what enters it. A ragged all-to-all counts as if
its buffers were full. Of several groups, the one that sends most over the network counts.
"""

import functools
import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "collective-broadcast",
)
Number = float | int
"""Of bytes and FLOPs: exact where they can be, fractions of shares and means."""
Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends over each link."""

    nvlink_bytes: Number = 0.0
    network_bytes: Number = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(
            self.nvlink_bytes + other.nvlink_bytes, self.network_bytes + other.network_bytes
        )

    def __mul__(self, times: Number) -> "Traffic":
        return Traffic(self.nvlink_bytes * times, self.network_bytes * times)

    @property
    def total_bytes(self) -> Number:
        return self.nvlink_bytes + self.network_bytes


@functools.lru_cache(maxsize=1024)
def parse_groups(text: str, partitions: int) -> Groups:
    """The groups of a `replica_groups` attribute in any of XLA's spellings.

    {{0,1},{2,3}}        lists; {} is one group of all
    [2,4]<=[8]           2 groups of 4: the numbers 0 to 7 in rows
    [4,2]<=[2,4]T(1,0)   the same reshaped to 2 by 4, transposed, and cut into rows of 2
    mesh['a'=2,'b'=4] {'b'}                   those along axes of a mesh; 'b':(2)2 is a part of an
    mesh['a'=2,'b'=4], device_ids=([..]) {'b'}  axis (after a factor of 2, of size 2)

    Source: XLA's replica_group.cc, mesh_and_axis.cc, tile_assignment.cc.
    """
    text = text.strip()
    if text.startswith("mesh["):
        return _mesh_groups(text)
    if text.startswith("["):
        rows = _iota(text)
        size = int(text[1 : text.index("]")].split(",")[-1])
        return tuple(tuple(rows[at : at + size]) for at in range(0, len(rows), size))
    groups = [tuple(int(n) for n in group.split(",")) for group in re.findall(r"{([\d,]+)}", text)]
    return tuple(groups) if groups else (tuple(range(partitions)),)


def parse_pairs(text: str) -> tuple[tuple[int, int], ...]:
    """(source, target) of every pair of a `source_target_pairs` attribute."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def group_traffic(kind: str, sent_bytes: int, groups: Groups, gpus_per_node: int) -> Traffic:
    """What a device sends in a collective that is no collective-permute (see the module's text).

    `sent_bytes` are B, for an all-gather R.
    """
    shapes = {_shape_of(group, gpus_per_node) for group in groups}
    each = [_traffic(kind, sent_bytes, size, local) for size, local in shapes]
    return max(each, key=lambda traffic: (traffic.network_bytes, traffic.nvlink_bytes))


def pairs_traffic(
    sent_bytes: int, pairs: tuple[tuple[int, int], ...], gpus_per_node: int
) -> Traffic:
    """What a device sends in a collective-permute; over the network if any pair does."""
    moving = [(source, target) for source, target in pairs if source != target]
    if any(source // gpus_per_node != target // gpus_per_node for source, target in moving):
        return Traffic(network_bytes=float(sent_bytes))
    return Traffic(nvlink_bytes=float(sent_bytes)) if moving else Traffic()


def _shape_of(group: tuple[int, ...], gpus_per_node: int) -> tuple[int, int]:
    """Devices of the group, and the fewest of them that share a node."""
    nodes = Counter(device // gpus_per_node for device in group)
    return len(group), min(nodes.values())


def _traffic(kind: str, sent: int, size: int, local: int) -> Traffic:
    if kind in ("all-to-all", "ragged-all-to-all"):
        return Traffic(sent * (local - 1) / size, sent * (size - local) / size)
    volume = sent * (size - 1) / size * (2 if kind == "all-reduce" else 1)
    if local == size:
        return Traffic(nvlink_bytes=volume)
    return Traffic(volume * (local - 1) / local, volume / local)


def _iota(text: str) -> list[int]:
    """The numbers of `[..]<=[dims]T(permutation)`, in row-major order."""
    dims = [int(dim) for dim in re.findall(r"\d+", text.split("<=")[1].split("T")[0])]
    order = re.search(r"T\(([\d,]+)\)", text)
    if order is None:
        return list(range(math.prod(dims)))
    permutation = [int(dim) for dim in order[1].split(",")]
    strides = _strides(dims)
    ranges = [[index * strides[dim] for index in range(dims[dim])] for dim in permutation]
    return [sum(parts) for parts in itertools.product(*ranges)]


def _mesh_groups(text: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", _in(text, "[]"))}
    axes = re.findall(r"'?([\w.-]+)'?(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    strides = dict(zip(sizes, _strides(list(sizes.values())), strict=True))
    parts = []  # (stride, size) of each axis, or part of one, that the groups run along
    for name, before, size in axes:
        count = int(size) if size else sizes[name]
        after = sizes[name] // (int(before) * count) if size else 1
        parts.append((strides[name] * after, count))
    members = [sum(steps) for steps in _product(parts)]
    devices = _device_ids(text, math.prod(sizes.values()))
    firsts = [first for first in range(len(devices)) if all(first // s % n == 0 for s, n in parts)]
    return tuple(tuple(devices[first + step] for step in members) for first in firsts)


def _product(parts: list[tuple[int, int]]):
    return itertools.product(*([index * stride for index in range(n)] for stride, n in parts))


def _device_ids(text: str, count: int) -> list[int]:
    """The devices in the mesh's order: 0, 1, 2, ... unless `device_ids=(...)` says otherwise."""
    found = re.search(r"device_ids=\((.*)\) ?{", text)
    if found is None:
        return list(range(count))
    if "<=" in found[1]:
        return _iota(found[1])
    # A transposed iota is printed ([2,4]T(1,0)); anything else as nested lists of numbers.
    order = re.fullmatch(r"\[([\d,]+)\](T\([\d,]+\))", found[1])
    if order is not None:
        return _iota(f"<=[{order[1]}]{order[2]}")
    return [int(number) for number in re.findall(r"\d+", found[1])]


def _in(text: str, brackets: str) -> str:
    return text[text.index(brackets[0]) + 1 : text.index(brackets[1])]


def _strides(dims: list[int]) -> list[int]:
    return [math.prod(dims[place + 1 :]) for place in range(len(dims))]
