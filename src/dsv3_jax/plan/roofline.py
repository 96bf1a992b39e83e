"""How long a compiled step would take, by a roofline over its schedule. Imports no JAX.

A prediction, never a measurement. The schedule is walked in order: a kernel takes the longer of its
FLOPs and its bytes, a transfer goes on beside the kernels, on NVLink and network at once, after
those that began before it on the same link; its `done` waits for it. Left out, so the real step is
slower: launch gaps, the multiprocessors that transfers take from kernels, stragglers, congestion.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from dsv3_jax.plan.costs import Cost
from dsv3_jax.plan.hardware import Gpu
from dsv3_jax.plan.links import Number, Traffic
from dsv3_jax.plan.program import Block, Choice, Collective, Done, Kernel, Loop, Start

MATRIX_EFFICIENCY = 0.70
"""Share of the dense peak in a large product: the 700 W of an SXM board hold its clock below the
boost clock that the data sheet's peak is for, to about 0.7 of it in BF16; DeepSeek's whole step
reached 0.44 ("Insights" Table 4), attention, bubbles and everything else included."""
MEMORY_EFFICIENCY = 0.85
"""Share of the HBM bandwidth that a streaming kernel reaches; refresh and turnarounds take the
rest."""
NETWORK_SECONDS = 3.7e-6
"""Before the first byte: InfiniBand across leaves ("Insights" Table 5, 64 B)."""
NVLINK_SECONDS = 3.33e-6
"""The same of NVLink (Table 5)."""

COMPUTE, NVLINK, NETWORK = "compute", "NVLink", "network"

BranchRule = Callable[[Choice, tuple[float, ...]], Sequence[float]]
"""How often each branch of a conditional counts, given the predicted seconds of each. For a
pipeline: the share of ticks in which each branch is the slowest over the ranks."""


@dataclass(frozen=True)
class Interval:
    """Something on one lane, in seconds since its block began."""

    lane: str
    start: float
    end: float
    name: str
    kind: str
    """`matrix`, `memory`, `wait`, `loop`, `choice` on the compute lane, else the collective's."""


@dataclass(frozen=True)
class Transfer:
    """One collective of a block, each time the block runs."""

    collective: Collective
    block: str
    times: Number
    """How often a step runs it."""
    seconds: float
    """What it takes alone."""
    exposed_seconds: float
    """How long the device waits for it with nothing to do."""
    covering_seconds: float
    """Of kernels between start and done."""
    covering_flops: Number


@dataclass(frozen=True)
class Timing:
    """One run of a block, all in it included."""

    seconds: float
    transfer_seconds: float
    exposed_seconds: float
    cost: Cost
    traffic: Traffic
    intervals: tuple[Interval, ...]
    """Of this block alone: a loop or a conditional is one interval."""
    transfers: tuple[Transfer, ...]
    """Of this block and all in it, `times` counted for one run of this block."""

    @property
    def hidden_fraction(self) -> float:
        """Share of the transfers' time that kernels cover; 1 if nothing is sent."""
        if self.transfer_seconds == 0:
            return 1.0
        return max(0.0, 1 - self.exposed_seconds / self.transfer_seconds)


@dataclass(frozen=True)
class Prediction:
    """The timing of a step, and of each block in it by name."""

    step: Timing
    blocks: dict[str, Timing]

    @property
    def busiest_block(self) -> str:
        """Where most transfer time passes in a step: what a timeline is worth drawing of."""
        spent: dict[str, float] = {}
        for transfer in self.step.transfers:
            seconds = transfer.seconds * transfer.times
            spent[transfer.block] = spent.get(transfer.block, 0.0) + seconds
        return max(spent, key=lambda name: spent[name]) if spent else next(iter(self.blocks))


def slowest_branch(choice: Choice, seconds: tuple[float, ...]) -> list[float]:
    """The slowest branch, each time."""
    slowest = seconds.index(max(seconds))
    return [float(index == slowest) for index in range(len(seconds))]


def mean_branch(choice: Choice, seconds: tuple[float, ...]) -> list[float]:
    """Every branch equally often."""
    return [1 / len(seconds)] * len(seconds)


def kernel_seconds(cost: Cost, gpu: Gpu) -> float:
    """The longer of computing and moving, at the shares of the peaks above."""
    matrix = (
        cost.fp8_flops / gpu.fp8_flops_per_second
        + cost.bf16_flops / gpu.bf16_flops_per_second
        + cost.tf32_flops / gpu.tf32_flops_per_second
        + cost.fp32_flops / gpu.fp32_flops_per_second
    )
    memory = cost.hbm_bytes / gpu.memory_bytes_per_second
    return max(matrix / MATRIX_EFFICIENCY, memory / MEMORY_EFFICIENCY)


def link_seconds(traffic: Traffic, gpu: Gpu) -> dict[str, float]:
    """Seconds on each link that is used, at the bandwidth that is achieved on it."""
    seconds = {}
    if traffic.nvlink_bytes:
        moving = traffic.nvlink_bytes / gpu.nvlink_achieved_bytes_per_second
        seconds[NVLINK] = NVLINK_SECONDS + moving
    if traffic.network_bytes:
        moving = traffic.network_bytes / gpu.network_achieved_bytes_per_second
        seconds[NETWORK] = NETWORK_SECONDS + moving
    return seconds


def predict(block: Block, gpu: Gpu, branches: BranchRule = slowest_branch) -> Prediction:
    """The predicted time of one run of `block`, a whole program or a part.

    Each loop and conditional is timed with its links idle at its start; what was sent before it
    goes on beside it.
    """
    blocks: dict[str, Timing] = {}
    step = _Walk(gpu, branches, blocks).block(block)
    return Prediction(step, blocks)


@dataclass
class _Sent:
    """A transfer between its start and its done."""

    collective: Collective
    alone: float
    ends: float
    compute_seconds: float
    flops: Number


class _Clock:
    """The state while one block is walked."""

    def __init__(self, name: str):
        self.name = name
        self.now = 0.0
        self.free = {NVLINK: 0.0, NETWORK: 0.0}
        self.sent: dict[str, _Sent] = {}
        self.compute_seconds = 0.0
        self.transfer_seconds = 0.0
        self.exposed_seconds = 0.0
        self.cost = Cost()
        self.traffic = Traffic()
        self.intervals: list[Interval] = []
        self.transfers: list[Transfer] = []

    def compute(self, name: str, kind: str, seconds: float) -> None:
        if seconds > 0:
            self.intervals.append(Interval(COMPUTE, self.now, self.now + seconds, name, kind))
        self.now += seconds
        self.compute_seconds += seconds

    def start(self, collective: Collective, seconds: dict[str, float]) -> None:
        ends = self.now
        for link, duration in seconds.items():
            begins = max(self.now, self.free[link])
            self.free[link] = begins + duration
            ends = max(ends, self.free[link])
            self.intervals.append(
                Interval(link, begins, self.free[link], collective.name, collective.kind)
            )
        alone = max(seconds.values(), default=0.0)
        self.transfer_seconds += alone
        self.traffic += collective.traffic
        self.sent[collective.name] = _Sent(
            collective, alone, ends, self.compute_seconds, self.cost.flops
        )

    def finish(self, name: str) -> None:
        sent = self.sent.pop(name, None)
        if sent is None:
            return  # the done of a kernel
        waited = max(0.0, sent.ends - self.now)
        if waited > 0:
            self.intervals.append(Interval(COMPUTE, self.now, sent.ends, name, "wait"))
        self.now += waited
        self.exposed_seconds += waited
        covering = self.compute_seconds - sent.compute_seconds
        flops = self.cost.flops - sent.flops
        self.transfers.append(
            Transfer(sent.collective, self.name, 1.0, sent.alone, waited, covering, flops)
        )

    def include(self, inner: Timing, times: Number) -> None:
        """Adds what `times` runs of an inner block did, all but its time."""
        self.transfer_seconds += inner.transfer_seconds * times
        self.exposed_seconds += inner.exposed_seconds * times
        self.cost += inner.cost * times
        self.traffic += inner.traffic * times
        self.transfers += [replace(t, times=t.times * times) for t in inner.transfers if times]

    def timing(self) -> Timing:
        return Timing(
            self.now,
            self.transfer_seconds,
            self.exposed_seconds,
            self.cost,
            self.traffic,
            tuple(self.intervals),
            tuple(self.transfers),
        )


class _Walk:
    """Times every block once."""

    def __init__(self, gpu: Gpu, branches: BranchRule, blocks: dict[str, Timing]):
        self.gpu = gpu
        self.branches = branches
        self.blocks = blocks

    def block(self, block: Block) -> Timing:
        if block.name not in self.blocks:
            clock = _Clock(block.name)
            for item in block.items:
                self.item(clock, item)
            for name in list(clock.sent):
                clock.finish(name)
            self.blocks[block.name] = clock.timing()
        return self.blocks[block.name]

    def item(self, clock: _Clock, item: Kernel | Start | Done | Loop | Choice) -> None:
        match item:
            case Kernel():
                clock.cost += item.cost
                kind = "matrix" if item.cost.flops else "memory"
                clock.compute(item.name, kind, kernel_seconds(item.cost, self.gpu))
            case Start():
                traffic = item.collective.traffic
                clock.start(item.collective, link_seconds(traffic, self.gpu))
            case Done():
                clock.finish(item.name)
            case Loop():
                body = self.block(item.body)
                clock.include(body, item.trips)
                clock.compute(f"{item.name} x {item.trips}", "loop", body.seconds * item.trips)
            case Choice():
                self.choice(clock, item)

    def choice(self, clock: _Clock, choice: Choice) -> None:
        each = [self.block(branch) for branch in choice.branches]
        weights = self.branches(choice, tuple(timing.seconds for timing in each))
        seconds = 0.0
        for timing, weight in zip(each, weights, strict=True):
            clock.include(timing, weight)
            seconds += timing.seconds * weight
        clock.compute(choice.name, "choice", seconds)


def ranked_transfers(timing: Timing) -> Iterator[Transfer]:
    """The transfers, the one that a step waits longest for first, then by their time."""
    yield from sorted(
        timing.transfers,
        key=lambda t: (t.exposed_seconds * t.times, t.seconds * t.times),
        reverse=True,
    )
