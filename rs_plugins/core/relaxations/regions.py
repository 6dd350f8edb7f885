"""The region around an image that bounds hold on, and the intervals that it becomes on its way through a network."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from rs_plugins.core.checks import check_floating
from rs_plugins.core.geometry import per_image
from rs_plugins.errors import InputError

Norm = Literal["linf", "l2"]


@dataclass(frozen=True, eq=False)
class Region:
    """All images within ``eps`` of ``x`` whose pixels are in [0, 1].

    Nothing here asks for a gradient: the region is made of pixels, before the network sees them.

    Attributes:
        x: Images (n, *input), pixels in [0, 1].
        eps: Radius in pixels, a number or one per image (n,).
        norm: Of the radius. ``"l2"`` knows of the ball and of the box around it, not of how they cut each other.
        lower: The least value of each pixel, (n, *input).
        upper: The greatest.
        centre: The middle of both.
        radius: Half their difference.
    """

    x: Tensor
    eps: float | Tensor
    norm: Norm = "linf"
    lower: Tensor = field(init=False, repr=False)
    upper: Tensor = field(init=False, repr=False)
    centre: Tensor = field(init=False, repr=False)
    radius: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise InputError(f"norm: expected one of {', '.join(map(repr, get_args(Norm)))}, got {self.norm!r}")
        x = check_floating(self.x).detach()
        eps = per_image(self.eps, x, "eps").to(x.dtype)
        # a pixel that a round trip through some normalisation moved out of [0, 1] stays in its own region
        lower = torch.minimum((x - eps).clamp(min=0), x)
        upper = torch.maximum((x + eps).clamp(max=1), x)
        parts = {"x": x, "lower": lower, "upper": upper, "centre": (lower + upper) / 2, "radius": (upper - lower) / 2}
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    @property
    def scale(self) -> Tensor:
        """The radius ``eps`` at each pixel, (n, *input)."""
        return per_image(self.eps, self.x, "eps").to(self.x.dtype).expand_as(self.x)

    def minimum(self, coefficients: Tensor) -> Tensor:
        """Return the least value of <A_k, x> over the region for A (n or 1, rows, *input), as (n, rows)."""
        least = box_minimum(coefficients, self.centre, self.radius)
        if self.norm == "linf":
            return least
        norms = torch.linalg.vector_norm(coefficients.flatten(2), dim=2)
        return best(least, product(coefficients, self.x) - self.scale.flatten(1)[:, :1] * norms)

    def interval(self) -> "Interval":
        """Return the region as it is before any layer."""
        return Interval(self.centre, self.radius, Ball(self.x, self.scale) if self.norm == "l2" else None)


class Ball(NamedTuple):
    """All centre + scale·z with ‖z‖₂ ≤ 1: an l2 ball, also after layers that treat each value by itself."""

    centre: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class Interval:
    """What a node's values are within: centre ± radius, both (n, *node).

    Attributes:
        centre: The middle.
        radius: Half the width.
        ball: The l2 ball that they are in as well, as long as no layer has mixed values.
        mixed: How many layers have mixed values since the region. Up to one, the ends of each value are exact.
    """

    centre: Tensor
    radius: Tensor
    ball: Ball | None = None
    mixed: int = 0

    @classmethod
    def between(cls, lower: Tensor, upper: Tensor, mixed: int = 2) -> "Interval":
        """Return the interval from ``lower`` to ``upper``."""
        return cls((lower + upper) / 2, functional.relu(upper - lower) / 2, mixed=mixed)

    @property
    def lower(self) -> Tensor:
        """The lower end."""
        return self.centre - self.radius

    @property
    def upper(self) -> Tensor:
        """The upper end."""
        return self.centre + self.radius

    @property
    def exact(self) -> bool:
        """Whether each value reaches both ends somewhere in the region."""
        return self.mixed < 2

    def minimum(self, coefficients: Tensor) -> Tensor:
        """Return the least value of <A_k, z> for A (n or 1, rows, *node), as (n, rows)."""
        return box_minimum(coefficients, self.centre, self.radius)


def box_minimum(coefficients: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Return A·c - |A|·r for A (n or 1, rows, *node) and c, r (n, *node), as (n, rows)."""
    return product(coefficients, centre) - product(coefficients.abs(), radius)


def product(coefficients: Tensor, values: Tensor) -> Tensor:
    """Return <A_k, v> for A (n or 1, rows, *node) and v (n or 1, *node) or (n, rows, *node), as (n or 1, rows)."""
    rows = coefficients.flatten(2)
    if values.ndim == coefficients.ndim:
        return (rows * values.flatten(2)).sum(2)
    if len(rows) == 1:
        return values.flatten(1) @ rows[0].mT
    return (rows @ values.flatten(1).unsqueeze(2)).squeeze(2)


def best(first: Tensor, second: Tensor) -> Tensor:
    """Return the greater of both, element by element; of equal ones ``first``, with the whole gradient."""
    return torch.where(first >= second, first, second)


def identity(size: int, like: Tensor) -> Tensor:
    """Return the identity matrix (size, size) in the dtype and on the device of ``like``."""
    return torch.eye(size, device=like.device).to(like.dtype)  # torch 2.3 makes none in bfloat16 on a CPU
