"""Laplace noise, which certifies l1 balls."""

from dataclasses import dataclass
from decimal import Decimal
from math import inf, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from rs_plugins.core.checks import check_nonnegative, check_positive
from rs_plugins.core.noise import check_between, check_p_lower
from rs_plugins.core.rounding import LESS, float_above, float_below, sixty_digits


@dataclass(frozen=True)
class LaplaceNoise:
    """Independent Laplace noise of scale s = sigma/√2, certifying an l1 ball of radius -s·ln(2·(1 - p)).

    The density changes by a factor of at most exp(r/s) when its centre moves by r in l1, and so does the probability of
    every set. So a class with probability p at an image has at least 1 - exp(r/s)·(1 - p) there, and every other one at
    most exp(r/s)·(1 - p) (Teng et al. 2020; Yang et al. 2020). A threshold on one coordinate shows that there is no
    larger radius. The literature's linf radius for this noise is an approximation and not offered.

    Args:
        sigma: Standard deviation of each coordinate in pixels, > 0.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0.
    """

    name: ClassVar[str] = "laplace"
    norm: ClassVar[str] = "l1"
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_positive(self.sigma, "sigma"))

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent Laplace draws from ``generator`` and return it.

        Each is the quantile of a uniform number from [-1, 1), in single precision at least: of multiples of 2**-23
        there, so that none is further out than 17·s. At -1 the quantile would be infinite; the next number to it that
        the type has is taken.
        """
        exact = torch.promote_types(out.dtype, torch.float32)
        u = torch.empty_like(out, dtype=exact).uniform_(-1, 1, generator=generator)
        tail = u.abs().clamp_(max=1 - torch.finfo(exact).eps / 2).neg_().log1p_().mul_(-self.sigma / sqrt(2))
        return out.copy_(tail.copysign_(u))

    def radius(self, p_lower: float) -> float:
        """Return -s·ln(2·(1 - p_lower)), in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1]: below 1/2 nothing is certified.
        """
        if (p_lower := check_p_lower(p_lower)) == 1:
            return inf
        with sixty_digits():
            return float_below(-self._scale * (2 * (1 - Decimal(p_lower))).ln() * LESS)

    def probability(self, radius: float) -> float:
        """Return 1 - exp(-radius / s)/2 for a radius >= 0 in pixels, rounded up, at most 1."""
        if not (radius := check_nonnegative(radius, "radius")):
            return 0.5
        with sixty_digits():
            distance = Decimal(radius) / self._scale
            return float_above(1 - (-distance).exp() / 2 * LESS)

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return the greater of s/2·ln(p_lower / runner_up) and -s·ln(1 - p_lower + runner_up), in pixels.

        With f = exp(r/s), at distance r the top class has at least p_lower/f and at least 1 - f·(1 - p_lower), every
        other one at most f·runner_up, which is less up to the first radius, and up to the second.

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1.
        """
        with sixty_digits():
            top, other = map(Decimal, check_between(p_lower, runner_up))
            best = max((top / other).ln() / 2, -(1 - top + other).ln())
            return float_below(best * self._scale * LESS)

    @property
    def _scale(self) -> Decimal:
        return Decimal(self.sigma) / Decimal(2).sqrt()
