"""Gaussian noise with its certificate in the norm linf."""

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from rs_plugins.core.checks import check_nonnegative
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.dimension import WithDimension
from rs_plugins.core.rounding import LESS, MORE, float_above, float_below, sixty_digits


@dataclass(frozen=True)
class GaussianLinfNoise(WithDimension):
    """Isotropic Gaussian noise, certifying an linf ball of radius sigma·Φ⁻¹(p)/√d for images of d values.

    A change of at most r in each of d values is at most √d·r long, so the l2 certificate holds for it; for a linear
    classifier with weights of equal size there is none larger.

    Args:
        sigma: Standard deviation in pixels, > 0.
        dimension: d; `certify` finds it.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0, or ``dimension`` no integer >= 1.
    """

    name: ClassVar[str] = "gaussian-linf"
    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma", self.l2.sigma)

    @property
    def l2(self) -> GaussianNoise:
        """The same noise with its certificate in l2."""
        return GaussianNoise(self.sigma)

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent N(0, sigma²) draws from ``generator`` and return it."""
        return self.l2.draw_(out, generator)

    def radius(self, p_lower: float) -> float:
        """Return sigma·Φ⁻¹(p_lower)/√d, in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1], or d is not known.
        """
        return self._shared_out(self.l2.radius(p_lower))

    def probability(self, radius: float) -> float:
        """Return Φ(√d·radius / sigma) for a radius >= 0 in pixels, rounded up, at most 1."""
        with sixty_digits():
            root = Fraction(Decimal(self.known_dimension).sqrt() * MORE)
            length = float_above(Fraction(check_nonnegative(radius, "radius")) * root)
        return self.l2.probability(length)

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return sigma/2·(Φ⁻¹(p_lower) - Φ⁻¹(runner_up))/√d, in pixels.

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1, or d is not known.
        """
        return self._shared_out(self.l2.radius_between(p_lower, runner_up))

    def _shared_out(self, length: float) -> float:
        """Return the linf radius of a cube in the l2 ball of radius ``length``."""
        dimension = self.known_dimension
        if math.isinf(length):
            return length
        with sixty_digits():
            return float_below(Decimal(length) / Decimal(dimension).sqrt() * LESS)
