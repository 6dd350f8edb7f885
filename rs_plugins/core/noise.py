"""Noise families: how to draw, and the radius that a probability buys."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from scipy.special import ndtri
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
