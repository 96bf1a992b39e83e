"""Texts that end an answer: found in pieces, none of which may give away a part of one."""

from collections.abc import Sequence


class StopFinder:
    """Lets text pass up to the first of the `stop` texts; holds back what may begin one.

    >>> finder = StopFinder(["two"])
    >>> finder.push("one tw"), finder.push("o three"), finder.found
    ('one ', '', True)
    """

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may go out now that `text` has come."""
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.found = True
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
