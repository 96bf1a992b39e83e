"""How often a pipeline's compiled loops and conditionals run: what its schedule says of them.

The program is the same on all ranks; which branch runs is data. Its FLOPs and bytes are counted as
the mean over ranks. Its time is that of the slowest rank of each tick: embedding and head make all
ranks wait for each other at every tick's end.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from dsv3_jax.parallel.pipeline.arrays import NONE
from dsv3_jax.parallel.pipeline.orders import Kind
from dsv3_jax.plan.program import Block, Choice, walk_blocks
from dsv3_jax.train.pipeline_step import Pipeline


@dataclass(frozen=True, eq=False)
class PipelineRules:
    """Branch and trip rules for the step of `pipeline`."""

    pipeline: Pipeline

    def trips(self, op_name: str) -> int:
        """The places of a stage for the loop over them; none for rows beyond the first round."""
        if "routed_experts" in op_name:
            return 0
        return self.pipeline.tables.places if op_name.count("/while") == 2 else 1

    def mean(self, choice: Choice, seconds: tuple[float, ...]) -> list[float]:
        """Each branch's share of all ranks' ticks and places."""
        if len(choice.branches) != len(self.pipeline.steps()):
            return self._crossing(seconds)
        counts = Counter(int(step) for step in self._steps().reshape(-1))
        total = sum(counts.values())
        return [counts[branch] / total for branch in range(len(seconds))]

    def slowest_rank(self, choice: Choice, seconds: tuple[float, ...]) -> list[float]:
        """The same of the rank that takes longest in each tick."""
        if len(choice.branches) != len(self.pipeline.steps()):
            return self._crossing(seconds)
        steps = self._steps()
        slowest = np.asarray(seconds)[steps].sum(axis=2).argmax(axis=1)
        chosen = steps[np.arange(len(steps)), slowest].reshape(-1)
        return [float(np.mean(chosen == branch)) for branch in range(len(seconds))]

    def pairs(self, program: Block) -> frozenset[str]:
        """The branches of overlapped pairs."""
        steps = self.pipeline.steps()
        choices = [
            item
            for block in walk_blocks(program)
            for item in block.items
            if isinstance(item, Choice) and len(item.branches) == len(steps)
        ]
        return frozenset(
            branch.name
            for choice in choices
            for branch, step in zip(choice.branches, steps, strict=True)
            if step.forward and step.backward
        )

    def _crossing(self, seconds: tuple[float, ...]) -> list[float]:
        """Of a conditional on a micro-batch that enters or leaves: the branch that does something
        runs once a micro-batch."""
        enters = self.pipeline.arrays.enters
        share = float(np.mean(enters != NONE))
        busy = seconds.index(max(seconds))
        rest = (1 - share) / (len(seconds) - 1)
        return [share if branch == busy else rest for branch in range(len(seconds))]

    def _steps(self) -> np.ndarray:
        """The number of the step [ticks, ranks, places]."""
        pipeline = self.pipeline
        arrays, kinds, places = pipeline.arrays, pipeline.tables.kind, pipeline.tables.places
        number = {step: i for i, step in enumerate(pipeline.steps())}
        ticks, ranks = arrays.kind.shape
        steps = np.zeros((ticks, ranks, places), np.int32)
        for tick in range(ticks):
            for rank in range(ranks):
                if arrays.kind[tick, rank] == Kind.IDLE:
                    continue
                forward, backward = (
                    arrays.forward_chunk[tick, rank],
                    arrays.backward_chunk[tick, rank],
                )
                for place in range(places):
                    up = kinds[rank, forward, place] if forward != NONE else 0
                    down = kinds[rank, backward, places - 1 - place] if backward != NONE else 0
                    step = pipeline.step_of(int(arrays.kind[tick, rank]), int(up), int(down))
                    steps[tick, rank, place] = number[step]
        return steps
