"""How long an engine's calls take, and so how much is read and decoded at a time. No JAX.

Each call costs the host, and the server's clients, some time. So one that decodes has as many steps
as `CALL_SECONDS` have time for: what arrives is seen only after it. While others decode, the calls
that read are shorter than one that decodes, so that nobody's answer slows to less than half because
another's prompt is long; longer where more requests wait with a prompt than decode, for these are
served by reading.
"""

from collections.abc import Hashable, Sequence

Shape = tuple[int, int]
"""Rows and tokens of a call that reads."""
CALL_SECONDS, FULL_CALL_SECONDS = 0.03, 0.1
"""Of a call that decodes more than `FIRST_STEPS`, at most: where slots are free, and where none is,
so that who arrives has to wait anyway."""
FIRST_STEPS = 4
"""Of calls after an arrival, and of those that were not measured yet."""
READ_SHARE = 0.6
"""Of the seconds of a call that decodes, for reading before it: both vary by half, and the slowest
of the two together are to be less than twice the slowest of the one."""
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
        self._step_seconds: dict[Hashable, float] = {}
        self._steps = FIRST_STEPS

    def has_arrived(self) -> None:
        """A request has, and more may at once: the next calls that decode are short."""
        self._steps = FIRST_STEPS

    def steps(self, program: Hashable, most: int, is_full: bool) -> int:
        """Steps of the next call of a program that decodes: up to `most`, after an arrival few at
        first. If it `is_full`, none that arrives could be let in, so these may be many."""
        seconds = FULL_CALL_SECONDS if is_full else CALL_SECONDS
        known = self._step_seconds.get(program)
        fitting = 0 if known is None else int(seconds / known)
        allowed = fitting if is_full else min(fitting, self._steps)
        self._steps = min(most, 2 * self._steps)
        return min(most, max(FIRST_STEPS, allowed))

    def was_decoded(self, program: Hashable, steps: int, seconds: float) -> None:
        """A call that decodes took so long for its steps."""
        before, each = self.decode_seconds, self._step_seconds
        self.decode_seconds = seconds if before is None else _mean(before, seconds)
        if steps:
            each[program] = _mean(each.get(program, seconds / steps), seconds / steps)

    def was_read(self, shape: Shape, seconds: float) -> None:
        """A call that reads took so long."""
        for other, before in self.seconds.items():
            if other != shape:
                self.seconds[other] = before + FORGET * (self._least[other] - before)
        self.seconds[shape] = _mean(self.seconds.get(shape, seconds), seconds)
        self._least[shape] = min(self._least.get(shape, seconds), seconds)

    def choose(
        self, left: Sequence[Sequence[int]], decoding: int, spent: float = 0.0
    ) -> Shape | None:
        """The shape that reads most tokens a second, of those that others have time for; `left` are
        the tokens of each device's prompts, `decoding` the requests that wait for this call.

        None where calls of `spent` seconds, since it was last decoded, were enough: a second one is
        for more requests than decode.
        """
        shapes, seconds = self.shapes, self.seconds
        reading = sum(map(len, left))
        if spent and (reading <= decoding or not decoding or self.decode_seconds is None):
            return None
        if decoding and self.decode_seconds is not None:
            limit = READ_SHARE * self.decode_seconds * max(1.0, reading / decoding) - spent
            shapes = tuple(shape for shape in shapes if seconds[shape] <= limit)
            if spent and not shapes:
                return None
            shapes = shapes or (min(self.shapes, key=lambda shape: seconds[shape]),)

        def rate(shape: Shape) -> float:
            rows, tokens = shape
            read = sum(min(tokens, n) for of_device in left for n in of_device[:rows])
            return read / seconds[shape]

        return max(shapes, key=rate)


def _mean(before: float, seconds: float) -> float:
    return before + (RISE if seconds > before else FALL) * (seconds - before)
