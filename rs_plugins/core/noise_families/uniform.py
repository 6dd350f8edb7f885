"""Uniform noise on a cube, which certifies l1 balls, and linf balls."""

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from rs_plugins.core.checks import check_nonnegative, check_positive
from rs_plugins.core.noise import check_between, check_p_lower
from rs_plugins.core.noise_families.dimension import WithDimension
from rs_plugins.core.rounding import LESS, MORE, float_above, float_below, sixty_digits


@dataclass(frozen=True)
class UniformNoise:
    """Uniform noise on [-s, s] in each coordinate, s = √3·sigma, certifying an l1 ball of radius 2·s·(p - 1/2).

    The cubes around two images that are r apart in l1 share at least 1 - r/(2·s) of their volume, so the probability of
    every set differs by at most r/(2·s) between them (Yang et al. 2020; Levine & Feizi 2021). A threshold on one
    coordinate shows that there is no larger radius. Even p = 1 certifies no more than s.

    Args:
        sigma: Standard deviation of each coordinate in pixels, > 0.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0.
    """

    name: ClassVar[str] = "uniform"
    norm: ClassVar[str] = "l1"
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_positive(self.sigma, "sigma"))

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent uniform draws from ``generator`` and return it.

        None is outside [-s, s]: numbers from [-1, 1], times the largest number of their type that is at most s. The sum
        of a draw and an image is rounded, and may lie outside by that.
        """
        with sixty_digits():
            half = _largest_below(self._half_width, out.dtype)
        return out.uniform_(-1, 1, generator=generator).mul_(half)

    def radius(self, p_lower: float) -> float:
        """Return 2·s·(p_lower - 1/2), in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1]: below 1/2 nothing is certified.
        """
        with sixty_digits():
            return float_below(self._half_width * (2 * Decimal(check_p_lower(p_lower)) - 1) * LESS)

    def probability(self, radius: float) -> float:
        """Return 1/2 + radius/(2·s) for a radius >= 0 in pixels, rounded up; 1 for one of s or more."""
        with sixty_digits():
            share = Decimal(check_nonnegative(radius, "radius")) / self._half_width
            return min(1.0, float_above((1 + Fraction(share * MORE)) / 2))

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return s·(p_lower - runner_up), in pixels: the one falls and the other rises by r/(2·s) at most.

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1.
        """
        with sixty_digits():
            top, other = map(Decimal, check_between(p_lower, runner_up))
            return float_below(self._half_width * (top - other) * LESS)

    @property
    def _half_width(self) -> Decimal:
        return _half_width(self.sigma)


@dataclass(frozen=True)
class UniformLinfNoise(WithDimension):
    """Uniform noise as in `UniformNoise`, certifying an linf ball of radius 2·s·(1 - (3/2 - p)^(1/d)).

    The cubes around two images of d values that differ by at most r in each share at least v = (1 - r/(2·s))^d of their
    volume, so the probability of every set differs by at most 1 - v between them (Yang et al. 2020). A classifier that
    names another class just outside of the one cube shows that there is no larger radius.

    Args:
        sigma: Standard deviation of each coordinate in pixels, > 0.
        dimension: d; `certify` finds it.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0, or ``dimension`` no integer >= 1.
    """

    name: ClassVar[str] = "uniform-linf"
    norm: ClassVar[str] = "linf"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sigma", check_positive(self.sigma, "sigma"))

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent uniform draws from ``generator`` and return it, as `UniformNoise` does."""
        return UniformNoise(self.sigma).draw_(out, generator)

    def radius(self, p_lower: float) -> float:
        """Return 2·s·(1 - (3/2 - p_lower)^(1/d)), in pixels, for a lower bound on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1], or d is not known.
        """
        with sixty_digits():
            return self._until(Decimal(check_p_lower(p_lower)) - Decimal("0.5"))

    def probability(self, radius: float) -> float:
        """Return 3/2 - (1 - radius/(2·s))^d for a radius >= 0 in pixels, rounded up, at most 1."""
        dimension = self.known_dimension
        if not (radius := check_nonnegative(radius, "radius")):
            return 0.5
        with sixty_digits():
            side = 1 - Decimal(radius) / (2 * _half_width(self.sigma)) * MORE
            shared = (side.ln() * dimension).exp() * LESS if side > 0 else Decimal(0)
            return min(1.0, float_above(Decimal("1.5") - shared))

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return 2·s·(1 - (1 - (p_lower - runner_up)/2)^(1/d)), in pixels.

        The one falls and the other rises by 1 - v at most, so v > 1 - (p_lower - runner_up)/2 keeps them apart.

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1, or d is not known.
        """
        with sixty_digits():
            top, other = map(Decimal, check_between(p_lower, runner_up))
            return self._until((top - other) / 2)

    def _until(self, lost: Decimal) -> float:
        """Return the linf distance up to which two cubes share at least all but ``lost`` of their volume."""
        side = ((1 - lost).ln() / self.known_dimension).exp()
        return float_below(2 * _half_width(self.sigma) * (1 - side) * LESS)


def _half_width(sigma: float) -> Decimal:
    return Decimal(3).sqrt() * Decimal(sigma)


def _largest_below(value: Decimal, dtype: torch.dtype) -> float:
    """Return the largest number of a floating-point type that is at most ``value``."""
    nearest = torch.tensor(float(value), dtype=dtype)
    if Decimal(nearest.item()) > value:
        nearest = torch.nextafter(nearest, torch.zeros_like(nearest))
    return float(nearest)
