"""CERTIFY of Cohen et al. (2019): a fixed number of votes."""

from dataclasses import dataclass, fields

import numpy as np

from rs_plugins.core.checks import check_count, check_flag, check_probability
from rs_plugins.core.confidence import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    fewest_for_half,
    randomised_lower,
)
from rs_plugins.core.noise import Noise
from rs_plugins.core.plans.protocol import Case, Verdict, check_runner_up, concluded, strongest_rival
from rs_plugins.core.procedures import Procedure
from rs_plugins.errors import InputError


@dataclass(frozen=True, repr=False)
class FixedBudget:
    """CERTIFY of Cohen et al. (2019): ``n0`` votes choose the class, ``n`` fresh ones bound its probability.

    Args:
        n0: Selection votes, >= 1.
        n: Estimation votes; at least log(alpha)/log(1/2), fewer cannot certify anything.
        alpha: Failure probability of each certificate, in (0, 1).
        runner_up: Bound the other classes too, each side at alpha/2, in place of taking all the rest for one class. An
            image whose top class is below 1/2 can then be certified; where there is one rival only, radii shrink a
            little.
        randomised: Use the randomised Clopper-Pearson bound, which is never smaller. It depends on one draw more, made
            before the votes and recorded. Where all votes agree it is almost 1 with probability ``alpha``, and the
            radius then about 8·sigma: valid, but nothing to put into a table.

    Raises:
        InputError: If a value is outside its range.
    """

    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    runner_up: bool = False
    randomised: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "n0", check_count(self.n0, "n0"))
        object.__setattr__(self, "n", check_count(self.n, "n"))
        object.__setattr__(self, "alpha", check_probability(self.alpha, "alpha"))
        object.__setattr__(self, "runner_up", check_flag(self.runner_up, "runner_up"))
        object.__setattr__(self, "randomised", check_flag(self.randomised, "randomised"))
        least = fewest_for_half(self.alpha)
        if self.n < least and not self.runner_up:
            raise InputError(
                f"n: expected at least {least}, got {self.n}: with fewer votes nothing can be certified at "
                f"alpha = {self.alpha}, even if all agree"
            )

    def __repr__(self) -> str:
        """Name further options only where they are not the default: the rest is the plan of every published log."""
        _, _, _, *options = fields(self)
        more = [f", {o.name}={getattr(self, o.name)!r}" for o in options if getattr(self, o.name) != o.default]
        return f"{type(self).__name__}(n0={self.n0}, n={self.n}, alpha={self.alpha}{''.join(more)})"

    @property
    def bound(self) -> str:
        """Name of the confidence bound."""
        name = "randomised clopper-pearson" if self.randomised else "clopper-pearson"
        return f"{name} with runner-up" if self.runner_up else name

    @property
    def most(self) -> int:
        """The number of votes of each image, selection and estimation."""
        return self.n0 + self.n

    def check(self, noise: Noise) -> None:
        """Raise `InputError` if this plan can do nothing with ``noise``."""
        if self.runner_up:
            check_runner_up(noise)

    def procedure(self, case: Case) -> Procedure[Verdict]:
        """Return the generator that asks for votes and returns the verdict on one image."""
        selection = yield self.n0
        guess = int(np.argmax(selection))  # the lowest of equals
        estimation = yield self.n
        count, rival = int(estimation[guess]), strongest_rival(case, estimation, guess, self.n)
        alpha = self.alpha / 2 if self.runner_up else self.alpha
        if self.randomised:
            p_lower = randomised_lower(count, self.n, alpha, case.draw)
        else:
            p_lower = clopper_pearson_lower(count, self.n, alpha)
        return concluded(
            case,
            guess=guess,
            count=count,
            n=self.n,
            n0=self.n0,
            p_lower=p_lower,
            # the most likely rival has no more votes than the most voted one, so this holds for every rival
            runner_up=clopper_pearson_upper(rival, self.n, alpha) if self.runner_up else None,
            draw=case.draw if self.randomised else None,
        )
