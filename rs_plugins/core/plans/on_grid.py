"""The largest radius of a grid that is certified, with no more votes than this question needs."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from rs_plugins.core.checks import check_choice, check_count, check_nonnegative, check_probability
from rs_plugins.core.noise import Noise, NoiseAtRadius
from rs_plugins.core.noise_promises import promised_number
from rs_plugins.core.plans.protocol import ABSTAIN, Case, Verdict
from rs_plugins.core.procedures import Procedure
from rs_plugins.core.sequential_test import Boundary, betting_boundary, exact_boundary, schedule
from rs_plugins.errors import InputError, RSPluginsWarning

DECIMALS = 12
BOUNDARIES: dict[str, Callable[..., Boundary]] = {"exact": exact_boundary, "betting": betting_boundary}


@dataclass(frozen=True)
class OnGrid:
    """The largest radius of a grid that is certified: what tables of certified accuracy need.

    A sequential test for each radius looks at the same votes; sampling stops when no radius is undecided. A radius is
    certified if its test and those of all smaller radii certify. If the image's true radius lies below some radius of
    the grid, the smallest such one is certified with probability at most ``alpha``, and no larger one without it: the
    tests need no correction for being many.

    The certificate's radius is one of the grid; an abstention says that not even the smallest is certified.

    Args:
        radii: Radii in pixels, >= 0, increasing. Radius 0 says whether the class is certified at all. They are taken as
            decimals: 0.30000000000000004 out of a floating-point grid means 0.3.
        n0: Selection votes, >= 1.
        n: The most estimation votes. A radius that ``n`` votes cannot certify even if all agree is never certified.
        alpha: Failure probability of each certificate, in (0, 1).
        slack: How much the tests may miss: an image whose true radius is less than about ``slack``·sigma above a radius
            may be given up there, as not certified (under Gaussian noise in l2; under others, where the probability
            is as much above). Larger values take fewer votes and certify fewer images, with the same guarantee. Below
            what ``n`` votes can tell apart (0.01 to 0.1 for 100,000) it changes nothing.
        beta: The share of images at ``slack``·sigma above a radius that may be given up early, in (0, 1).
        test: "exact", computed from all paths of votes, or "betting", read off the betting confidence sequence.

    Raises:
        InputError: If a value is outside its range.
    """

    interim: ClassVar[bool] = True
    radii: tuple[float, ...]
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    slack: float = 0.04
    beta: float = 0.3
    test: str = "exact"

    def __post_init__(self) -> None:
        object.__setattr__(self, "radii", _check_radii(self.radii))
        object.__setattr__(self, "n0", check_count(self.n0, "n0"))
        object.__setattr__(self, "n", check_count(self.n, "n"))
        object.__setattr__(self, "alpha", check_probability(self.alpha, "alpha"))
        object.__setattr__(self, "slack", check_nonnegative(self.slack, "slack"))
        object.__setattr__(self, "beta", check_probability(self.beta, "beta"))
        check_choice(self.test, BOUNDARIES, "test")

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""
        return f"{self.test} sequential test"

    @property
    def most(self) -> int:
        """The largest number of votes that an image can need."""
        return self.n0 + self.n

    def check(self, noise: Noise) -> None:
        """Raise `InputError` if ``noise`` cannot say which probability a radius takes, or no radius is in reach.

        Warns of radii out of reach, which are then never certified.
        """
        within = len(self.reachable(noise))
        if within == len(self.radii):
            return
        most = promised_number(noise, "radius", max(0.5, self.alpha ** (1 / self.n)))
        reason = (
            f"even if all agree, n = {self.n} votes at sigma = {noise.sigma} prove no radius above {most:.4g} pixels"
        )
        if not within:
            raise InputError(f"radii: expected one that can be certified, got {self.radii[0]:g}: {reason}")
        out = ", ".join(f"{radius:g}" for radius in self.radii[within:])
        warnings.warn(f"radii: {out} will never be certified: {reason}", RSPluginsWarning, stacklevel=4)

    def reachable(self, noise: Noise) -> tuple[float, ...]:
        """Return the probability that each radius takes, for those that ``n`` votes can certify if all agree."""
        if not isinstance(noise, NoiseAtRadius):
            raise InputError(f"family: expected noise with probability(radius) for this plan, got {noise.name} noise")
        # a float may be a little less than the decimal that is printed for it
        probabilities = (
            promised_number(noise, "probability", math.nextafter(radius, math.inf) if radius else 0.0, most=1)
            for radius in self.radii
        )
        return tuple(p for p in probabilities if p < 1 and p**self.n < 0.999 * self.alpha)

    def tests(self, noise: Noise) -> list[Boundary]:
        """Return the sequential test of each radius within reach; computed once for each probability."""
        boundary = BOUNDARIES[self.test]
        options = {"n": self.n, "alpha": self.alpha, "beta": self.beta, "slack": self.slack}
        return [boundary(p, **options) for p in self.reachable(noise)]

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        tests = self.tests(case.noise)
        selection = yield self.n0
        guess = int(np.argmax(selection))  # the lowest of equals
        needed, state = self.reachable(case.noise), _Undecided(tests)
        count, n = 0, 0
        for look, votes in enumerate(schedule(self.n)):
            estimation = yield votes - n
            count, n = count + int(estimation[guess]), votes
            undecided = state.after(look, count)
            certified = state.certified
            verdict = Verdict(
                prediction=guess if certified else ABSTAIN,
                radius=self.radii[certified - 1] if certified else 0.0,
                guess=guess,
                count=count,
                n=n,
                n0=self.n0,
                p_lower=needed[certified - 1] if certified else 0.0,
            )
            if case.report(verdict) or not undecided:  # to stop early only certifies less
                break
        return verdict


class _Undecided:
    """How far the tests of a grid have come.

    Attributes:
        certified: How many radii are certified: those whose test, and all tests below, have certified.
        ceiling: How many radii are still possible: those below the first whose test has given up.
    """

    def __init__(self, tests: Sequence[Boundary]) -> None:
        self.certified, self.ceiling = 0, len(tests)
        self._tests = tests
        self._passed: set[int] = set()

    def after(self, look: int, count: int) -> bool:
        """Return whether a radius is undecided after ``count`` successes at the ``look``-th look."""
        for radius in range(self.certified, self.ceiling):
            if radius in self._passed:
                continue
            test = self._tests[radius]
            if count >= test.certify[look]:
                self._passed.add(radius)
            elif count <= test.give_up[look]:
                self.ceiling = radius
                break
        while self.certified in self._passed:
            self.certified += 1
        return self.certified < self.ceiling


def _check_radii(radii: Sequence[float]) -> tuple[float, ...]:
    given = np.atleast_1d(np.asarray(radii, dtype=object))
    values = tuple(round(check_nonnegative(radius, "radii"), DECIMALS) + 0.0 for radius in given)  # no -0.0
    if not values or any(later <= earlier for earlier, later in pairwise(values)):
        raise InputError(f"radii: expected one or more increasing radii in pixels, got {radii!r:.200}")
    return values
