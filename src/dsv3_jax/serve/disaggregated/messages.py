"""What the coordinator and a unit tell each other; all of it is pickled. No JAX."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt32

from dsv3_jax.config import ServerConfig
from dsv3_jax.serve.request import EngineStatistics, Output, Request

Address = tuple[str, int]


class Kind(enum.StrEnum):
    """What a unit does."""

    PREFILL = "prefill"
    DECODE = "decode"


# To a unit


@dataclass(frozen=True, kw_only=True)
class Start:
    """The first message: what to run."""

    name: str
    kind: Kind
    load: Callable[..., Any]
    """Makes the `Transformer`; on a mesh where it is given one."""
    server: ServerConfig
    """With the unit's own mesh."""
    first_device: int
    """Of the machine's, from which on the unit has its own."""
    experts: int
    """Routed ones of the model."""
    transfer_key: bytes
    """That units know each other by."""
    compiler_options: dict[str, Any] | None


@dataclass(frozen=True)
class Read:
    """Read a request's prompt, and what is made of its answer, and hand it over."""

    request: Request
    made: tuple[int, ...]
    to: Address


@dataclass(frozen=True)
class Cancel:
    request_id: str


@dataclass(frozen=True)
class Mask:
    """Answers `MaskWanted`; None where the request has ended."""

    words: UInt32[np.ndarray, " words"] | None


# From a unit


@dataclass(frozen=True, kw_only=True)
class Ready:
    """All is compiled."""

    credits: int
    """Requests that the unit takes at a time."""
    statistics: EngineStatistics
    address: Address | None
    """Where a decode unit takes handovers."""


@dataclass(frozen=True)
class Refused:
    """The unit cannot run what it was told to."""

    message: str


@dataclass(frozen=True)
class Beat:
    """The unit is alive."""

    statistics: EngineStatistics | None
    """None before it is ready."""
    step_seconds: float
    """How long its present step has taken."""


@dataclass(frozen=True)
class Adopted:
    """All of a handover has arrived."""

    request_id: str


@dataclass(frozen=True)
class NotHandedOver:
    request_id: str
    reason: str


@dataclass(frozen=True)
class Outputs:
    outputs: list[Output]
    statistics: EngineStatistics


@dataclass(frozen=True)
class MaskWanted:
    """Which tokens a request's constraint allows after those of `Outputs` so far."""

    request_id: str


class ConstraintElsewhere:
    """Stands for a request's constraint, which stays with the coordinator."""

    def allowed(self) -> UInt32[np.ndarray, " words"]:
        raise AssertionError("the unit puts its own in this one's place")

    def accept(self, token: int) -> None:
        raise AssertionError("the unit puts its own in this one's place")
