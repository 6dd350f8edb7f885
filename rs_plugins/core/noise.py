"""Noise families: how to draw, and the radius that a probability buys. Others than Gaussian: `noise_families`.

Radii are rounded down, probabilities that buy a radius up. They are of noise in real numbers: draws, and their sum with
an image, are rounded to the type that the model takes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rs_plugins.core.checks import check_nonnegative, check_positive
from rs_plugins.core.rounding import (
    float_below,
    normal_cdf_above,
    normal_quantile_above,
    normal_quantile_below,
    product_below,
    quotient_above,
)
from rs_plugins.errors import InputError, RSPluginsError

_CLASSES = {
    "gaussian": "GaussianNoise",
    "gaussian-linf": "GaussianLinfNoise",
    "laplace": "LaplaceNoise",
    "lattice-gaussian": "LatticeGaussianNoise",
    "uniform": "UniformNoise",
    "uniform-linf": "UniformLinfNoise",
}


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
        """Return the radius that a lower bound ``p_lower`` >= 1/2 on the top class's probability buys, rounded down."""


@runtime_checkable
class NoiseAtRadius(Noise, Protocol):
    """A noise family whose radius can be inverted, so that a plan can ask for a radius."""

    def probability(self, radius: float) -> float:
        """Return a probability of the top class that certifies ``radius``, rounded up; 1 where none below 1 does."""


@runtime_checkable
class NoiseWithRunnerUp(Noise, Protocol):
    """A noise family that can use a bound on the probability of every other class."""

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return the radius certified by p_lower >= runner_up, bounds on the top class and on every other one."""


@runtime_checkable
class NoiseOfShape(Protocol):
    """A noise family whose radius depends on the shape of an image, as in the norm linf."""

    def for_shape(self, shape: Sequence[int], /) -> Noise:
        """Return the noise for images of ``shape``, without the batch; called once, before it is asked for a radius."""


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
        """Fill ``out`` with independent N(0, sigma²) draws from ``generator`` and return it.

        They are drawn in single precision at least: in half precision torch 2.2 has no tails on a CPU, where bfloat16
        ends at 3.4·sigma and float16 at 4·sigma.
        """
        exact = torch.promote_types(out.dtype, torch.float32)
        drawn = out if out.dtype == exact else torch.empty_like(out, dtype=exact)
        return out.copy_(drawn.normal_(0.0, self.sigma, generator=generator))

    def radius(self, p_lower: float) -> float:
        """Return sigma·Φ⁻¹(p_lower), in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1]: below 1/2 nothing is certified.
        """
        quantile = normal_quantile_below(check_p_lower(p_lower))
        return product_below(self.sigma, quantile) if math.isfinite(quantile) else quantile

    def probability(self, radius: float) -> float:
        """Return Φ(radius / sigma) for a radius >= 0 in pixels, rounded up, at most 1."""
        return normal_cdf_above(quotient_above(check_nonnegative(radius, "radius"), self.sigma))

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return sigma/2·(Φ⁻¹(p_lower) - Φ⁻¹(runner_up)), in pixels (Cohen et al. 2019, Theorem 1).

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1.
        """
        p_lower, runner_up = check_between(p_lower, runner_up)
        low, high = normal_quantile_below(p_lower), normal_quantile_above(runner_up)
        if low <= high:
            return 0.0
        return float_below(Fraction(self.sigma) / 2 * (Fraction(low) - Fraction(high)))


def check_p_lower(p_lower: float) -> float:
    """Return ``p_lower`` as a float if it is a bound that certifies something.

    Raises:
        InputError: If it is outside [1/2, 1].
    """
    if not 0.5 <= p_lower <= 1:
        raise InputError(f"p_lower: expected a probability in [1/2, 1], got {p_lower}")
    return float(p_lower)


def check_between(p_lower: float, runner_up: float) -> tuple[float, float]:
    """Return bounds on the top class and on every other one as floats.

    Raises:
        InputError: If not 0 < runner_up <= p_lower < 1.
    """
    if not 0 < runner_up <= p_lower < 1:
        raise InputError(f"runner_up: expected a probability in (0, p_lower = {p_lower}], got {runner_up}")
    return float(p_lower), float(runner_up)


def _advice(family: object) -> str:
    """Return what to pass instead of the name of a family, or of noise that has its sigma already."""
    if isinstance(family, str):
        return (
            f"; pass the class, rs_plugins.{_CLASSES[family]}" if family in _CLASSES else "; pass a class, not a name"
        )
    if hasattr(family, "draw_"):
        return f"; pass the class, {type(family).__name__}: its sigma goes to sigma="
    return ""


def make_noise(family: Family, sigma: float, shape: Sequence[int] | None = None) -> Noise:
    """Return ``family`` at ``sigma`` pixels, for images of ``shape`` if it is given.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0, or what the family returns is no `Noise`.
    """
    if not callable(family):
        raise InputError(f"family: expected a noise family such as GaussianNoise, got {family!r}{_advice(family)}")
    sigma = check_positive(sigma, "sigma")
    try:
        noise = family(sigma)
    except RSPluginsError:
        raise
    except TypeError as error:
        raise InputError(f"family: expected a function of sigma alone, got {family!r} ({error})") from error
    except Exception as error:  # somebody else's constructor
        name, cause = getattr(family, "name", family), f"{type(error).__name__}: {error}"
        raise InputError(f"noise {name!r}: cannot be made with sigma = {sigma:g}: {cause}") from error
    missing = [name for name in ("name", "norm", "sigma", "draw_", "radius") if not hasattr(noise, name)]
    if missing:
        raise InputError(f"family: expected a noise family, got {family!r}, whose noise has no {', '.join(missing)}")
    if shape is not None and isinstance(noise, NoiseOfShape):
        return noise.for_shape(tuple(shape))
    return noise  # type: ignore[no-any-return]
