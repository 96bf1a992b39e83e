"""Whether guessing tokens ahead pays, measured while it goes on. No JAX.

The MTP module guesses the token after the next; the next step computes both places at once, and
where the guess was right it makes two tokens. Nothing that comes out depends on the guesses: each
token is drawn from the model's own distribution at its place, with a noise that belongs to the
request and the place. A guess is drawn from the module's distribution with the noise of the place
it is for (a coupling of the two, which is rejection sampling with the draft and the target sharing
their random numbers): it is right the more often the closer the distributions are, always where
they are equal, and greedy answers are greedy guesses.

A step with guesses takes longer, so it pays if

    (1 + right / guessed) / seconds with guesses  >  1 / seconds without

Source: DeepSeek-V3 Technical Report §5.4.3 (85 to 90 % of the guesses are right, 1.8 times as many
tokens a second).
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median

TRIAL_STEPS = 64
"""Steps of each kind before they are compared."""
TRIAL_EVERY = 2048
"""Steps after which the kind that lost is tried again."""
CALLS = 15
"""Of whose seconds the median counts: one call may be late for reasons of its own."""
NEWEST = 0.05
"""Weight of the newest call in the share of right guesses."""


def _calls() -> deque[float]:
    return deque(maxlen=CALLS)


@dataclass
class Payoff:
    """The running comparison for one number of rows."""

    seconds_with: deque[float] = field(default_factory=_calls)
    """A step's, of the last calls."""
    seconds_without: deque[float] = field(default_factory=_calls)
    share_right: float | None = None
    is_on: bool = True
    steps_with: int = 0
    steps_without: int = 0
    _since_trial: int = 0

    def add(self, guessed: bool, seconds: float, guesses: int, right: int, steps: int) -> None:
        """Takes in a call of `steps` steps of `seconds` each, and chooses for the next."""
        if guessed:
            self.seconds_with.append(seconds)
            self.steps_with += steps
            if guesses:
                share, before = right / guesses, self.share_right
                self.share_right = share if before is None else before + NEWEST * (share - before)
        else:
            self.seconds_without.append(seconds)
            self.steps_without += steps
        self._since_trial += steps
        self.is_on = self._choose()

    @property
    def pays(self) -> bool:
        """Whether guessing makes more tokens a second, as far as is known."""
        if not self.seconds_with or not self.seconds_without or self.share_right is None:
            return True
        return (1 + self.share_right) * median(self.seconds_without) > median(self.seconds_with)

    def _choose(self) -> bool:
        if self.steps_with < TRIAL_STEPS:
            return True
        if self.steps_without < TRIAL_STEPS:
            return False
        if self._since_trial >= TRIAL_EVERY:  # the loser may have become the better one
            self._since_trial = 0
            if self.pays:
                self.steps_without = 0
            else:
                self.steps_with = 0
            return not self.pays
        return self.pays
