"""What a plan is: asked with the circumstances of one image, it collects votes and returns a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rs_plugins.core.noise import Noise, NoiseWithRunnerUp
from rs_plugins.core.noise_promises import promised_number
from rs_plugins.core.perturbing import may_fail
from rs_plugins.core.procedures import Counts, Procedure
from rs_plugins.errors import InputError

ABSTAIN = -1


@dataclass(frozen=True)
class Verdict:
    """What a plan concludes from one image's votes.

    Attributes:
        prediction: The certified class, or `ABSTAIN`.
        radius: Certified radius in pixels; 0 for an abstention.
        guess: The class that the selection votes chose.
        count: Estimation votes for the guess.
        n: Estimation votes in all.
        n0: Selection votes.
        p_lower: Lower bound on the probability of the guess under noise, at the plan's confidence.
        runner_up: Upper bound on the probability of every other class; None where 1 - ``p_lower`` serves as one.
        draw: The uniform draw of a randomised bound, made before the first vote; None for other bounds.
    """

    prediction: int
    radius: float
    guess: int
    count: int
    n: int
    n0: int
    p_lower: float
    runner_up: float | None = None
    draw: float | None = None


@dataclass(frozen=True)
class Case:
    """The circumstances of one image that a plan may look at before its votes come in.

    Attributes:
        noise: The noise, which turns probabilities into radii and back.
        draw: A uniform draw from (0, 1], made before the first vote from a stream of its own.
        seconds: Returns the image's share of the wall-clock time so far.
        report: To be called with a verdict that holds if sampling stops now; True asks the plan to stop. Plans that do
            so have an attribute ``interim`` that is True.
    """

    noise: Noise
    draw: float
    seconds: Callable[[], float]
    report: Callable[[Verdict], bool]


class Plan(Protocol):
    """How many votes to collect for an image, and what to conclude from them."""

    @property
    def alpha(self) -> float:
        """Failure probability of each certificate."""

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""

    @property
    def most(self) -> int:
        """The largest number of votes that an image can need."""

    def check(self, noise: Noise) -> None:
        """Raise `InputError` if this plan can do nothing with ``noise``; called before any work starts."""

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""


def concluded(
    case: Case,
    *,
    guess: int,
    count: int,
    n: int,
    n0: int,
    p_lower: float,
    runner_up: float | None = None,
    draw: float | None = None,
) -> Verdict:
    """Return the verdict that these bounds allow: ``guess`` with the largest radius they certify, or an abstention.

    ``runner_up`` bounds the probability of every other class; None where 1 - ``p_lower`` is all that is known.

    Raises:
        InputError: If ``p_lower`` or ``runner_up`` is outside [0, 1], or what the noise gives is no radius.
    """
    for bound, name in ((p_lower, "p_lower"), (runner_up, "runner_up")):
        if bound is not None and not 0 <= bound <= 1:
            raise InputError(f"{name}: expected a probability, from 0 to 1, got {bound}")
    rest = 1 - p_lower if runner_up is None else min(runner_up, 1 - p_lower)
    if p_lower < 0.5 and p_lower <= rest:
        prediction, radius = ABSTAIN, 0.0
    elif runner_up is None:
        prediction, radius = int(guess), promised_number(case.noise, "radius", p_lower)
    else:
        noise = check_runner_up(case.noise)
        prediction, radius = int(guess), promised_number(noise, "radius_between", p_lower, rest)
    return Verdict(prediction, radius, int(guess), int(count), n, n0, p_lower, runner_up, draw)


def strongest_rival(case: Case, votes: Counts, guess: int, n: int) -> int:
    """Return the number of ``votes`` (classes,) of the most voted class but ``guess``, out of ``n``.

    Where the noise may fail, the votes for no class are counted as its, too: they might have been.
    """
    missing = n - int(votes.sum()) if may_fail(case.noise) else 0
    return int(np.delete(votes, guess).max()) + missing


def check_runner_up(noise: Noise) -> NoiseWithRunnerUp:
    """Return ``noise`` if it can use a bound on the runner-up.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(noise, NoiseWithRunnerUp):
        raise InputError(f"runner_up: expected False for {noise.name} noise, which has no radius_between, got True")
    return noise
