"""How long things take just now: the last minute's quantiles, and lines through what was seen."""

import math
from dataclasses import dataclass, field

WINDOW_SECONDS = 60
BINS_PER_OCTAVE = 8
"""A quantile is right to 9 %."""
SMALLEST_SECONDS = 1e-5
NUM_BINS = 8 * 24
"""Up to 167 s; what is longer counts as that."""


class RollingQuantile:
    """Quantiles of the last minute, from counts in logarithmic bins, a row a second."""

    def __init__(self):
        self._rows: dict[int, dict[int, int]] = {}

    def add(self, seconds: float, now: float, count: int = 1) -> None:
        """`count` values of `seconds` at the time `now`."""
        octaves = math.log2(max(seconds, SMALLEST_SECONDS) / SMALLEST_SECONDS)
        place = min(int(octaves * BINS_PER_OCTAVE), NUM_BINS - 1)
        row = self._rows.get(int(now))
        if row is None:
            self._forget(now)
            row = self._rows[int(now)] = {}
        row[place] = row.get(place, 0) + count

    def quantile(self, share: float, now: float, after: int = 0) -> float | None:
        """The value that `share` of the last minute's are below, None if there are none.

        With `after`, of those that will be left of them when `after` seconds have passed.
        """
        oldest = now + after - WINDOW_SECONDS
        counts: dict[int, int] = {}
        for second, row in self._rows.items():
            if second > oldest:
                for place, count in row.items():
                    counts[place] = counts.get(place, 0) + count
        wanted, seen = share * sum(counts.values()), 0
        for place in sorted(counts):
            seen += counts[place]
            if seen >= wanted:
                return SMALLEST_SECONDS * 2 ** ((place + 0.5) / BINS_PER_OCTAVE)
        return None

    def seconds_over(self, share: float, limit: float, now: float) -> int:
        """How long the quantile stays over `limit` if nothing comes but time passes."""
        for after in range(WINDOW_SECONDS + 1):
            value = self.quantile(share, now, after)
            if value is None or value <= limit:
                return after
        return WINDOW_SECONDS

    def _forget(self, now: float) -> None:
        for second in [second for second in self._rows if second <= now - WINDOW_SECONDS]:
            del self._rows[second]


class RollingCount:
    """How many a second there were, of the last `seconds`."""

    def __init__(self, seconds: int):
        self._seconds = seconds
        self._rows: dict[int, int] = {}
        self._began: float | None = None

    def add(self, count: int, now: float) -> None:
        """`count` more at the time `now`."""
        if self._began is None:
            self._began = now
        second = int(now)
        if second not in self._rows:
            for old in [old for old in self._rows if old <= now - self._seconds]:
                del self._rows[old]
        self._rows[second] = self._rows.get(second, 0) + count

    def per_second(self, now: float) -> float:
        """The mean rate; 0 if there were none."""
        total = sum(count for at, count in self._rows.items() if at > now - self._seconds)
        if self._began is None or not total:
            return 0.0
        return total / min(max(now - self._began, 1.0), self._seconds)


@dataclass(kw_only=True)
class Line:
    """y = a + b·x through observations, of which older ones count ever less; a, b ≥ 0."""

    keep: float = 0.98
    _weight: float = field(default=0.0)
    _x: float = field(default=0.0)
    _y: float = field(default=0.0)
    _xx: float = field(default=0.0)
    _xy: float = field(default=0.0)

    def add(self, x: int | float, y: float) -> None:
        """One observation."""
        self._weight = self.keep * self._weight + 1
        self._x = self.keep * self._x + x
        self._y = self.keep * self._y + y
        self._xx = self.keep * self._xx + x * x
        self._xy = self.keep * self._xy + x * y

    def at(self, x: int | float) -> float | None:
        """The y of `x`, None before the first observation."""
        if self._weight == 0:
            return None
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x**2
        slope = 0.0
        if spread > 1e-9 * (1 + mean_x**2):
            slope = max((self._xy / self._weight - mean_x * mean_y) / spread, 0.0)
        start = mean_y - slope * mean_x
        if start < 0:  # then through the origin
            start, slope = 0.0, mean_y / mean_x if mean_x > 0 else 0.0
        return start + slope * x
