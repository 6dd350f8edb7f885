"""A radius that is valid whenever one stops, by the betting confidence sequence."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rs_plugins.core.betting import betting_interval
from rs_plugins.core.checks import check_count, check_flag, check_positive, check_probability
from rs_plugins.core.noise import Noise
from rs_plugins.core.plans.protocol import ABSTAIN, Case, Verdict, check_runner_up, concluded, strongest_rival
from rs_plugins.core.procedures import Procedure
from rs_plugins.errors import InputError

FIRST, GROWTH = 64, 1.1  # the first look, and the relative distance between looks


@dataclass(frozen=True)
class Anytime:
    """A certificate that holds whenever sampling stops, for whatever reason.

    The bounds of the betting confidence sequence hold at all looks at once. Sampling stops after ``n`` votes or
    ``seconds``, when the radius is near what is attainable, when nothing can be certified any more, or when `certify`'s
    ``watch`` says so.

    Args:
        n0: Selection votes, >= 1.
        n: The most estimation votes.
        seconds: The most time for an image: its share of the time of the batches it takes part in. With this the number
            of votes, and so the certificate, depends on the machine's speed. None sets no limit.
        fraction: Stop when the radius reaches this share, in (0, 1], of the radius that would come out if all votes
            that are left went to the class, or of what the upper end of the sequence allows. 1 goes on to the end.
        alpha: Failure probability of each certificate, over all times at once, in (0, 1).
        runner_up: Bound the other classes too, each side at alpha/2, as in `FixedBudget`.

    Raises:
        InputError: If a value is outside its range.
    """

    interim: ClassVar[bool] = True
    n0: int = 100
    n: int = 100_000
    seconds: float | None = None
    fraction: float = 0.95
    alpha: float = 0.001
    runner_up: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "n0", check_count(self.n0, "n0"))
        object.__setattr__(self, "n", check_count(self.n, "n"))
        object.__setattr__(self, "alpha", check_probability(self.alpha, "alpha"))
        object.__setattr__(self, "runner_up", check_flag(self.runner_up, "runner_up"))
        object.__setattr__(self, "fraction", check_positive(self.fraction, "fraction"))
        if self.fraction > 1:
            raise InputError(f"fraction: expected a number in (0, 1], got {self.fraction}")
        if self.seconds is not None:
            object.__setattr__(self, "seconds", check_positive(self.seconds, "seconds"))

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""
        return "betting sequence with runner-up" if self.runner_up else "betting sequence"

    @property
    def most(self) -> int:
        """The largest number of votes that an image can need."""
        return self.n0 + self.n

    def check(self, noise: Noise) -> None:
        """Raise `InputError` if this plan can do nothing with ``noise``."""
        if self.runner_up:
            check_runner_up(noise)

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        selection = yield self.n0
        guess = int(np.argmax(selection))  # the lowest of equals
        votes, n = np.zeros_like(selection), 0
        bounds = _Bounds(self)
        while True:
            asked = self._next(n, case)
            votes, n = votes + (yield asked), n + asked
            count, rival = int(votes[guess]), strongest_rival(case, votes, guess, n)
            bounds.tighten(count, rival, n)
            verdict = concluded(
                case,
                guess=guess,
                count=count,
                n=n,
                n0=self.n0,
                p_lower=bounds.top_lower,
                runner_up=bounds.rival_upper if self.runner_up else None,
            )
            stop = case.report(verdict) or n == self.n or self._out_of_time(case)
            if stop or self._good_enough(verdict, bounds, case):
                return verdict

    def _next(self, n: int, case: Case) -> int:
        """Return how many votes to ask for after ``n``: a tenth more, or what the time left allows."""
        wanted = max(FIRST, round(n * (GROWTH - 1)))
        if self.seconds is not None and n:
            pace = case.seconds() / (self.n0 + n)
            wanted = min(wanted, max(FIRST, int((self.seconds - case.seconds()) / max(pace, 1e-9))))
        return min(wanted, self.n - n)

    def _out_of_time(self, case: Case) -> bool:
        return self.seconds is not None and case.seconds() >= self.seconds

    def _good_enough(self, verdict: Verdict, bounds: "_Bounds", case: Case) -> bool:
        """Return whether the radius is near what is attainable, or nothing is."""
        p = min(bounds.top_upper, bounds.if_all_agree(verdict.count, verdict.n))
        rest = min(1 - p, bounds.rival_lower) if self.runner_up else None
        best = concluded(case, guess=0, count=0, n=0, n0=0, p_lower=p, runner_up=rest)
        return best.prediction == ABSTAIN or (
            verdict.prediction != ABSTAIN and verdict.radius >= self.fraction * best.radius
        )


class _Bounds:
    """Bounds on the probabilities of the guess and of its strongest rival, intersected over the looks so far.

    The most likely rival never has more votes than the most voted one, so the upper bound holds for every rival.
    """

    def __init__(self, plan: Anytime) -> None:
        self._alpha = plan.alpha / 2 if plan.runner_up else plan.alpha
        self._most = plan.n
        self.top_lower = 0.0
        self.top_upper = self.rival_upper = 1.0
        self.rival_lower = 2.0**-52

    def tighten(self, count: int, rival: int, n: int) -> None:
        """Take in the votes for the guess and for its strongest rival out of ``n``."""
        lower, upper = betting_interval(count, n, self._alpha)
        self.top_lower, self.top_upper = max(self.top_lower, lower), min(self.top_upper, upper)
        lower, upper = betting_interval(rival, n, self._alpha)
        self.rival_lower, self.rival_upper = max(self.rival_lower, lower), min(self.rival_upper, upper)

    def if_all_agree(self, count: int, n: int) -> float:
        """Return the lower bound if all votes that are left go to the guess."""
        return max(self.top_lower, betting_interval(count + self._most - n, self._most, self._alpha)[0])
