"""What a plan is: asked with the circumstances of one image, it collects votes and returns a verdict."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rs_plugins.core.noise import Noise
from rs_plugins.core.votes import Procedure

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
        report: To be called with a verdict that holds if sampling stops now; True asks the plan to stop.
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

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
