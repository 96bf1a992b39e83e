"""A schedule as constants of a jitted program: int32 arrays [tick, rank] and buffer sizes.

Every rank has five buffers, of equal size on all ranks. A slot's life, in ticks:

    buffer        written                               read for the last time
    activations   end of the sender's forward           forward
    gradients     end of the sender's backward          backward
    residuals     forward                               full backward, or weight backward
    weights       input backward                        weight backward
    losses        end of the last stage's forward       backward

Messages land when the tick is over: they may take a slot that an action of the tick has read. What
an action writes goes into no slot that its rank reads in the same tick, so both halves of an
overlapped pair can run at once, in place. -1 (`NONE`) marks what does not apply.

One tick of one rank, with a = the arrays at [tick, rank]:

    x    = batch[forward_micro_batch] if a.activation_slot < 0 else activations[a.activation_slot]
    y, residuals[a.forward_residual_slot] = forward(chunk a.forward_chunk, x)
    dy   = losses[a.loss_slot] if a.gradient_slot < 0 else gradients[a.gradient_slot]
    dx, (dw | weights[a.weight_slot]) = backward(residuals[a.backward_residual_slot], dy)
    dw   = weight_backward(residuals[a.backward_residual_slot], weights[a.weight_slot])
    then, for peer in PREVIOUS (rank-1), NEXT (rank+1), SELF:  what that peer sent here goes to
    activations[a.receive_activation[peer]] and gradients[a.receive_gradient[peer]], where >= 0

What the last stage puts out becomes, at the end of the tick, a gradient of the loss in slot
a.receive_loss of the same rank. `enters` and its like say, to all ranks alike, when a micro-batch
meets the embedding or the head, by direction: DualPipe's second half of micro-batches is direction
1, everything else direction 0.

A rank sends at most one activation and one gradient a tick, but may receive one of each from
either neighbour. SELF is DualPipeV's turn at the last rank, where no message is needed.
"""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from dsv3_jax.parallel.pipeline.orders import Kind, Layout, Work
from dsv3_jax.parallel.pipeline.schedule import Schedule, made_events

NONE = -1


class Peer(enum.IntEnum):
    """Where a message goes to or comes from."""

    PREVIOUS = 0
    NEXT = 1
    SELF = 2


@dataclass(frozen=True, kw_only=True)
class ScheduleArrays:
    """What the executor compiles in (module docstring)."""

    kind: Int32[np.ndarray, "ticks ranks"]
    """Values of `Kind`, from 0."""
    forward_micro_batch: Int32[np.ndarray, "ticks ranks"]
    forward_chunk: Int32[np.ndarray, "ticks ranks"]
    backward_micro_batch: Int32[np.ndarray, "ticks ranks"]
    """Of a BACKWARD_WEIGHT too."""
    backward_chunk: Int32[np.ndarray, "ticks ranks"]
    activation_slot: Int32[np.ndarray, "ticks ranks"]
    """Read by the forward half; NONE in stage 0, whose input is the batch."""
    gradient_slot: Int32[np.ndarray, "ticks ranks"]
    """Read by the backward half; NONE in the last stage, where the loss is."""
    loss_slot: Int32[np.ndarray, "ticks ranks"]
    """Read by the backward half of the last stage; NONE in all others."""
    receive_loss: Int32[np.ndarray, "ticks ranks"]
    """The slot for the loss gradient of what the forward half puts out; NONE but in the last."""
    forward_residual_slot: Int32[np.ndarray, "ticks ranks"]
    """Written by the forward half."""
    backward_residual_slot: Int32[np.ndarray, "ticks ranks"]
    """Read by the backward half and by BACKWARD_WEIGHT."""
    weight_slot: Int32[np.ndarray, "ticks ranks"]
    """Written by BACKWARD_INPUT, read by BACKWARD_WEIGHT."""
    send_activation: Int32[np.ndarray, "ticks ranks"]
    """The `Peer` that the forward's output goes to; NONE in the last stage."""
    send_gradient: Int32[np.ndarray, "ticks ranks"]
    """The `Peer` that the input's gradient goes to; NONE in stage 0."""
    receive_activation: Int32[np.ndarray, "ticks ranks peers"]
    """The slot for what each `Peer` sends here in this tick."""
    receive_gradient: Int32[np.ndarray, "ticks ranks peers"]
    enters: Int32[np.ndarray, "ticks directions"]
    """The micro-batch whose forward is in stage 0 in this tick."""
    leaves: Int32[np.ndarray, "ticks directions"]
    """The micro-batch whose forward is in the last stage."""
    turns: Int32[np.ndarray, "ticks directions"]
    """The micro-batch whose backward, a weight backward too, is in the last stage."""
    returns: Int32[np.ndarray, "ticks directions"]
    """The micro-batch whose backward (not a weight backward) is in stage 0."""
    first_rank: Int32[np.ndarray, " directions"]
    """The rank of stage 0."""
    last_rank: Int32[np.ndarray, " directions"]
    stage_of_chunk: Int32[np.ndarray, "ranks chunks"]
    activation_slots: Int32[np.ndarray, " ranks"]
    """Slots that each rank uses; a buffer of an SPMD program has the largest number of them."""
    gradient_slots: Int32[np.ndarray, " ranks"]
    residual_slots: Int32[np.ndarray, " ranks"]
    """Both chunks share them: DualPipe needs stages + 1, two pools would be half as many again."""
    weight_slots: Int32[np.ndarray, " ranks"]
    loss_slots: Int32[np.ndarray, " ranks"]
    residuals_of_chunk: Int32[np.ndarray, "ranks chunks"]
    """Most residuals of each chunk alive at a time, for an executor that keeps them apart."""
    weights_of_chunk: Int32[np.ndarray, "ranks chunks"]


class Life(NamedTuple):
    """How long the value for `work` is in a buffer of `rank`: these ticks and all between them."""

    work: Work
    rank: int
    first: int
    last: int


BUFFERS = ("activation", "gradient", "residual", "weight", "loss")
_PER_TICK = (
    "forward_micro_batch",
    "forward_chunk",
    "backward_micro_batch",
    "backward_chunk",
    "activation_slot",
    "gradient_slot",
    "loss_slot",
    "receive_loss",
    "forward_residual_slot",
    "backward_residual_slot",
    "weight_slot",
    "send_activation",
    "send_gradient",
)


def lower_schedule(schedule: Schedule) -> ScheduleArrays:
    """Constants and buffer sizes of a correct `schedule` (what `check_schedule` takes)."""
    layout, lives = schedule.layout, find_lives(schedule)
    slots = {buffer: number_slots(lives[buffer]) for buffer in BUFFERS}
    shape = schedule.ticks, schedule.ranks
    arrays: dict[str, np.ndarray] = {name: np.full(shape, NONE, np.int32) for name in _PER_TICK}
    arrays["kind"] = np.array([[a.kind for a in row] for row in schedule.table], np.int32)
    for payload in ("activation", "gradient"):
        arrays[f"receive_{payload}"] = np.full((*shape, len(Peer)), NONE, np.int32)
    for tick, row in enumerate(schedule.table):
        for rank, action in enumerate(row):
            at = tick, rank
            if action.forward is not None:
                _fill_half(arrays, slots, layout, at, "forward", action.forward)
                _send(arrays, slots, layout, at, "activation", action.forward, 1)
                arrays["receive_loss"][at] = slots["loss"].get(action.forward, NONE)
            if action.backward is not None:
                _fill_half(arrays, slots, layout, at, "backward", action.backward)
                if action.kind == Kind.BACKWARD_WEIGHT:
                    arrays["gradient_slot"][at] = arrays["loss_slot"][at] = NONE
                else:
                    _send(arrays, slots, layout, at, "gradient", action.backward, -1)
    return ScheduleArrays(**arrays, **_crossings(schedule), **_buffer_sizes(layout, lives))


def _crossings(schedule: Schedule) -> dict[str, np.ndarray]:
    """Fields of `ScheduleArrays`: what is in the first or in the last stage."""
    layout = schedule.layout
    last, directions = layout.stages - 1, 1 + layout.is_bidirectional
    shape = schedule.ticks, directions
    crossings = {
        "enters": ("forward", 0),
        "leaves": ("forward", last),
        "turns": ("backward", last),  # and ("weight", last): of a full backward the same one
        "returns": ("backward", 0),
    }
    found = {name: np.full(shape, NONE, np.int32) for name in crossings}
    for tick, row in enumerate(schedule.table):
        for event, work in (made for action in row for made in made_events(action)):
            for name, crossing in crossings.items():
                is_late = event == "weight" and name == "turns" and work.stage == last
                if is_late or (event, work.stage) == crossing:
                    found[name][tick, _direction(layout, work)] = work.micro_batch
    first = [layout.rank_of(Work(_first_of(layout, d), 0)) for d in range(directions)]
    ends = [layout.rank_of(Work(_first_of(layout, d), last)) for d in range(directions)]
    return found | {"first_rank": np.array(first, np.int32), "last_rank": np.array(ends, np.int32)}


def _direction(layout: Layout, work: Work) -> int:
    return layout.chunk_of(work) if layout.is_bidirectional else 0


def _first_of(layout: Layout, direction: int) -> int:
    """The first micro-batch of a direction."""
    return direction * (layout.micro_batches // 2)


def _fill_half(
    arrays: dict[str, np.ndarray],
    slots: dict[str, dict[Work, int]],
    layout: Layout,
    at: tuple[int, int],
    half: str,
    work: Work,
) -> None:
    arrays[f"{half}_micro_batch"][at] = work.micro_batch
    arrays[f"{half}_chunk"][at] = layout.chunk_of(work)
    arrays[f"{half}_residual_slot"][at] = slots["residual"][work]
    if half == "forward":
        arrays["activation_slot"][at] = slots["activation"].get(work, NONE)
    else:
        arrays["gradient_slot"][at] = slots["gradient"].get(work, NONE)
        arrays["loss_slot"][at] = slots["loss"].get(work, NONE)
        arrays["weight_slot"][at] = slots["weight"].get(work, NONE)


def _send(
    arrays: dict[str, np.ndarray],
    slots: dict[str, dict[Work, int]],
    layout: Layout,
    at: tuple[int, int],
    payload: str,
    work: Work,
    step: int,
) -> None:
    """From `work` to the same micro-batch `step` stages on, where there is such a stage."""
    receiver = Work(work.micro_batch, work.stage + step)
    if 0 <= receiver.stage < layout.stages:
        tick, rank = at
        other = layout.rank_of(receiver)
        arrays[f"send_{payload}"][at] = _peer(rank, other)
        arrays[f"receive_{payload}"][tick, other, _peer(other, rank)] = slots[payload][receiver]


def _peer(rank: int, other: int) -> Peer:
    """What `other` is to `rank`."""
    return {-1: Peer.PREVIOUS, 0: Peer.SELF, 1: Peer.NEXT}[other - rank]


def find_lives(schedule: Schedule) -> dict[str, list[Life]]:
    """For each of `BUFFERS`, when every value that goes through it is there."""
    layout = schedule.layout
    ticks: dict[str, dict[Work, int]] = {"forward": {}, "backward": {}, "weight": {}}
    for tick, row in enumerate(schedule.table):
        for event, work in (made for action in row for made in made_events(action)):
            ticks[event][work] = tick
    forward, backward, weight = ticks.values()
    lives: dict[str, list[Life]] = {buffer: [] for buffer in BUFFERS}
    for work in forward:
        (micro_batch, stage), rank = work, layout.rank_of(work)
        before, after = Work(micro_batch, stage - 1), Work(micro_batch, stage + 1)
        if stage > 0:
            life = Life(work, rank, forward[before] + 1, forward[work])
            lives["activation"].append(life)
        if stage < layout.stages - 1:
            lives["gradient"].append(Life(work, rank, backward[after] + 1, backward[work]))
        else:
            lives["loss"].append(Life(work, rank, forward[work] + 1, backward[work]))
        lives["residual"].append(Life(work, rank, forward[work], weight[work]))
        if weight[work] > backward[work]:
            lives["weight"].append(Life(work, rank, backward[work], weight[work]))
    return lives


def number_slots(lives: list[Life]) -> dict[Work, int]:
    """The slot of every work: the lowest that is free on its rank, so the fewest possible slots."""
    free_from: dict[int, list[int]] = {}
    slots = {}
    for life in sorted(lives, key=lambda life: (life.rank, life.first, life.work)):
        ends = free_from.setdefault(life.rank, [])
        slot = next((i for i, tick in enumerate(ends) if tick <= life.first), len(ends))
        ends[slot : slot + 1] = [life.last + 1]
        slots[life.work] = slot
    return slots


def _buffer_sizes(layout: Layout, lives: dict[str, list[Life]]) -> dict[str, Any]:
    """Fields of `ScheduleArrays`: the most values alive at a time."""
    ranks, chunks = layout.ranks, layout.chunks
    sizes: dict[str, Any] = {}
    for buffer in BUFFERS:
        of_rank: list[list[Life]] = [[] for _ in range(ranks)]
        of_chunk: list[list[list[Life]]] = [[[] for _ in range(chunks)] for _ in range(ranks)]
        for life in lives[buffer]:
            of_rank[life.rank].append(life)
            of_chunk[life.rank][layout.chunk_of(life.work)].append(life)
        sizes[f"{buffer}_slots"] = np.array([_most_alive(mine) for mine in of_rank], np.int32)
        if buffer in ("residual", "weight"):
            counts = [[_most_alive(mine) for mine in parts] for parts in of_chunk]
            sizes[f"{buffer}s_of_chunk"] = np.array(counts, np.int32)
    stages = [[layout.stage_of(rank, chunk) for chunk in range(chunks)] for rank in range(ranks)]
    return sizes | {"stage_of_chunk": np.array(stages, np.int32)}


def _most_alive(lives: list[Life]) -> int:
    changes = sorted([(life.first, 1) for life in lives] + [(life.last + 1, -1) for life in lives])
    return int(np.cumsum([0] + [change for _, change in changes]).max())
