"""CERTIFY of Cohen et al. (2019): a fixed number of votes."""

from dataclasses import dataclass

import numpy as np

from rs_plugins.core.checks import check_count, check_probability
from rs_plugins.core.confidence import clopper_pearson_lower, fewest_for_half
from rs_plugins.core.plans.protocol import ABSTAIN, Case, Verdict
from rs_plugins.core.votes import Procedure
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class FixedBudget:
    """CERTIFY of Cohen et al. (2019): ``n0`` votes choose the class, ``n`` fresh ones bound its probability.

    Args:
        n0: Selection votes, >= 1.
        n: Estimation votes; at least log(alpha)/log(1/2), fewer cannot certify anything.
        alpha: Failure probability of each certificate, in (0, 1).

    Raises:
        InputError: If a value is outside its range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        object.__setattr__(self, "n0", check_count(self.n0, "n0"))
        object.__setattr__(self, "n", check_count(self.n, "n"))
        object.__setattr__(self, "alpha", check_probability(self.alpha, "alpha"))
        least = fewest_for_half(self.alpha)
        if self.n < least:
            raise InputError(
                f"n: expected at least {least}, got {self.n}: with fewer votes nothing can be certified at "
                f"alpha = {self.alpha}, even if all agree"
            )

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""
        return "clopper-pearson"

    @property
    def most(self) -> int:
        """The number of votes of each image, selection and estimation."""
        return self.n0 + self.n

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        selection = yield self.n0
        guess = int(np.argmax(selection))  # the lowest of equals
        estimation = yield self.n
        count = int(estimation[guess])
        p_lower = clopper_pearson_lower(count, self.n, self.alpha)
        certified = p_lower >= 0.5
        return Verdict(
            prediction=guess if certified else ABSTAIN,
            radius=case.noise.radius(p_lower) if certified else 0.0,
            guess=guess,
            count=count,
            n=self.n,
            n0=self.n0,
            p_lower=p_lower,
        )
