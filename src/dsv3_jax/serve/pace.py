"""How long an engine's calls take, and so how much of the prompts is read at a time. No JAX.

While others decode, a call that reads lasts no longer than one that decodes, so that nobody's
answer slows to less than half because another's prompt is long; longer where more requests wait
with a prompt than decode, for these are served by reading.
"""

from collections.abc import Sequence

Shape = tuple[int, int]
"""Rows and tokens of a call that reads."""
RISE, FALL = 0.5, 0.2
"""Of a running mean: chunks take longer as a prompt goes on."""
FORGET = 0.03
"""By which estimates of shapes that are not used fall towards the least that was measured. One slow
call, the machine's fault maybe, would keep a shape from being used, and so measured, for good."""


class Pace:
    """Running means of calls' seconds by shape."""

    def __init__(self, shapes: Sequence[Shape]):
        self.shapes = tuple(shapes)
        self.seconds: dict[Shape, float] = {}
        self.decode_seconds: float | None = None
        self._least: dict[Shape, float] = {}

    def was_decoded(self, seconds: float) -> None:
        """A call that decodes took so long."""
        before = self.decode_seconds
        self.decode_seconds = seconds if before is None else _mean(before, seconds)

    def was_read(self, shape: Shape, seconds: float) -> None:
        """A call that reads took so long."""
        for other, before in self.seconds.items():
            if other != shape:
                self.seconds[other] = before + FORGET * (self._least[other] - before)
        self.seconds[shape] = _mean(self.seconds.get(shape, seconds), seconds)
        self._least[shape] = min(self._least.get(shape, seconds), seconds)

    def choose(self, left: Sequence[Sequence[int]], decoding: int) -> Shape:
        """The shape that reads most tokens a second, of those that others have time for; `left` are
        the tokens of each device's prompts, `decoding` the requests that wait for this call."""
        shapes, seconds = self.shapes, self.seconds
        if decoding and self.decode_seconds is not None:
            reading = sum(map(len, left))
            limit = self.decode_seconds * max(1.0, reading / decoding)
            allowed = tuple(shape for shape in shapes if seconds[shape] <= limit)
            shapes = allowed or (min(shapes, key=lambda shape: seconds[shape]),)

        def rate(shape: Shape) -> float:
            rows, tokens = shape
            read = sum(min(tokens, n) for of_device in left for n in of_device[:rows])
            return read / seconds[shape]

        return max(shapes, key=rate)


def _mean(before: float, seconds: float) -> float:
    return before + (RISE if seconds > before else FALL) * (seconds - before)
