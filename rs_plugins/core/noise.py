"""Noise families: how to draw, and the radius that a probability buys."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from scipy.special import ndtr, ndtri
from torch import Tensor

from rs_plugins.core.checks import check_positive
from rs_plugins.errors import InputError


class Noise(Protocol):
    """What a noise family must offer to be certified with.

    Attributes:
        name: The family's name in results, for example ``"gaussian"``.
        norm: The norm of the certified ball: ``"l2"``, ``"l1"`` or ``"linf"``.
        sigma: Standard deviation of each coordinate, in pixels.
    """

    name: ClassVar[str]
    norm: ClassVar[str]

    @property
    def sigma(self) -> float:
        """Standard deviation of each coordinate, in pixels."""

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent draws from ``generator`` and return it."""

    def radius(self, p_lower: float) -> float:
        """Return the radius certified by a lower bound ``p_lower`` >= 1/2 on the top class's probability."""


@runtime_checkable
class NoiseAtRadius(Noise, Protocol):
    """A noise family whose radius can be inverted, so that a plan can ask for a radius."""

    def probability(self, radius: float) -> float:
        """Return a probability of the top class that certifies ``radius``, as small as rounding allows."""


@runtime_checkable
class NoiseWithRunnerUp(Noise, Protocol):
    """A noise family that can use a bound on the probability of every other class."""

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return the radius certified by p_lower >= runner_up, bounds on the top class and on every other one."""


class Family(Protocol):
    """A noise family: called with a standard deviation it gives a `Noise`."""

    def __call__(self, sigma: float, /) -> Any:
        """Return the family's `Noise` of standard deviation ``sigma`` pixels."""


@dataclass(frozen=True)
class GaussianNoise:
    """Isotropic Gaussian noise, certifying an l2 ball of radius sigma·Φ⁻¹(p) (Cohen et al. 2019, Theorem 1).

    Args:
        sigma: Standard deviation in pixels, > 0.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0.
    """

    name: ClassVar[str] = "gaussian"
    norm: ClassVar[str] = "l2"
    sigma: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_positive(self.sigma, "sigma"))

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent N(0, sigma²) draws from ``generator`` and return it."""
        return out.normal_(0.0, self.sigma, generator=generator)

    def radius(self, p_lower: float) -> float:
        """Return sigma·Φ⁻¹(p_lower), in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1]: below 1/2 nothing is certified.
        """
        if not 0.5 <= p_lower <= 1:
            raise InputError(f"p_lower: expected a probability in [1/2, 1], got {p_lower}")
        return self.sigma * float(ndtri(p_lower))

    def probability(self, radius: float) -> float:
        """Return Φ(radius / sigma) for a radius >= 0 in pixels, rounded up to be on the safe side, at most 1."""
        return 0.5 if radius == 0 else min(1.0, float(ndtr(radius / self.sigma)) * (1 + 2**-50))

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return sigma/2·(Φ⁻¹(p_lower) - Φ⁻¹(runner_up)), in pixels (Cohen et al. 2019, Theorem 1).

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1.
        """
        if not 0 < runner_up <= p_lower < 1:
            raise InputError(f"runner_up: expected a probability in (0, p_lower = {p_lower}], got {runner_up}")
        return self.sigma / 2 * float(ndtri(p_lower) - ndtri(runner_up))


def make_noise(family: Family, sigma: float) -> Noise:
    """Return ``family`` at ``sigma`` pixels.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0, or what the family returns is no `Noise`.
    """
    if not callable(family):
        raise InputError(f"family: expected a noise family such as GaussianNoise, got {family!r}")
    noise = family(check_positive(sigma, "sigma"))
    missing = [name for name in ("name", "norm", "sigma", "draw_", "radius") if not hasattr(noise, name)]
    if missing:
        raise InputError(f"family: expected a noise family, got {family!r}, whose noise has no {', '.join(missing)}")
    return noise  # type: ignore[no-any-return]
