"""When experts of a served model are placed anew, and where: by the load since the last time.

One MoE layer moves between two steps, so that no step waits for all of them. A layer's weights and
the table of where they are change together, so every step's answers are those of the model.
"""

import time
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from dsv3_jax.parallel.expert_placement import Placement, gpu_loads, place_experts


class ExpertBalance:
    """Counts tokens to each expert, and says which layer is to be placed how.

    `seconds` lie between two rounds over all layers; None: only `begin` starts one.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        groups: int,
        nodes: int,
        gpus: int,
        seconds: float | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.placement = placement
        self.groups, self.nodes, self.gpus = groups, nodes, gpus
        self.rounds = 0
        self._seconds, self._clock = seconds, clock
        self._began = clock()
        self._load = np.zeros(placement.replicas.shape)
        self._measured = self._load
        self._layers: list[int] = []

    def add(self, load: Float[np.ndarray, "layers experts"]) -> None:
        """Tokens that went to each expert."""
        self._load += load

    def begin(self) -> None:
        """Starts a round now, by the load so far."""
        self._measured, self._load = self._load, np.zeros_like(self._load)
        self._layers = [layer for layer, load in enumerate(self._measured) if load.any()]
        self._began = self._clock()
        self.rounds += bool(self._layers)

    def next_layer(self) -> tuple[int, Placement] | None:
        """A layer and how it is to be placed, the one of the placement; None if nothing is due."""
        is_due = self._seconds is not None and self._clock() - self._began >= self._seconds
        if is_due and not self._layers:
            self.begin()
        if not self._layers:
            return None
        layer = self._layers.pop(0)
        load, slots = self._measured[layer : layer + 1], self.placement.expert_of_slot.shape[1]
        devices = {"groups": self.groups, "nodes": self.nodes, "gpus": self.gpus}
        placed = place_experts(load, slots=slots, **devices)
        self.placement = self.placement.with_layer(layer, placed)
        return layer, placed

    def unevenness(self) -> float:
        """Of the load since the round began, as placed now: the fullest GPU's over the mean, the
        mean of the layers; 1 where there is none."""
        used = self._load.any(axis=1)
        if not used.any():
            return 1.0
        loads = gpu_loads(self._load, self.placement, self.gpus)[used]
        return float(np.mean(loads.max(axis=1) / loads.mean(axis=1)))
