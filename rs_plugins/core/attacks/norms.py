"""What an attack needs to know about a norm: which way to step, how to stay in the ball, where in it to start."""

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from rs_plugins.core.geometry import (
    expand_like,
    highest_l2,
    normalise_l2,
    project_box,
    project_l2,
    project_linf,
    sign_or,
)


class Norm(Protocol):
    """The norm of an attack's budget; every method works per image.

    Attributes:
        name: ``"l2"`` or ``"linf"``.
    """

    name: ClassVar[str]

    def direction(self, gradient: Tensor, otherwise: Tensor) -> Tensor:
        """Return the step of norm 1 that climbs most along ``gradient`` (n, *input).

        An image whose gradient is zero or not finite gets the direction of ``otherwise`` (broadcastable).
        """

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        """Return the point of the ball of radius ``eps`` (broadcastable) that is nearest to ``delta`` (n, *input)."""

    def highest(self, slope: Tensor, x: Tensor, eps: Tensor, otherwise: Tensor) -> Tensor:
        """Return the point of box and ball that is highest along ``slope``: argmax <slope, delta>, both (n, *input).

        An image whose slope is zero or not finite climbs along ``otherwise`` (broadcastable).
        """

    def start(self, free: Tensor, source: torch.Generator) -> Tensor:
        """Return points uniform in the ball of radius 1, float32, zero where ``free`` (n, *input) is not set.

        All images share one set of draws: with equal masks they start at the same point.
        """


class _L2:
    name: ClassVar[str] = "l2"

    def direction(self, gradient: Tensor, otherwise: Tensor) -> Tensor:
        return normalise_l2(gradient, otherwise)

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        return project_l2(delta, eps)

    def highest(self, slope: Tensor, x: Tensor, eps: Tensor, otherwise: Tensor) -> Tensor:
        return project_l2(highest_l2(normalise_l2(slope, otherwise), x, eps), eps)

    def start(self, free: Tensor, source: torch.Generator) -> Tensor:
        gaussian = _shared(torch.randn, free, source)
        u = torch.rand((), generator=source, device=free.device, dtype=torch.float32)
        dimensions = free.flatten(1).sum(dim=1).clamp(min=1)
        radius = u ** (1 / dimensions)  # a ball of radius r has r^d of the volume
        return expand_like(radius, free) * normalise_l2(free * gaussian, otherwise=torch.zeros_like(gaussian))


class _Linf:
    name: ClassVar[str] = "linf"

    def direction(self, gradient: Tensor, otherwise: Tensor) -> Tensor:
        return sign_or(gradient, otherwise)

    def project(self, delta: Tensor, eps: Tensor) -> Tensor:
        return project_linf(delta, eps)

    def highest(self, slope: Tensor, x: Tensor, eps: Tensor, otherwise: Tensor) -> Tensor:
        return project_box(eps * sign_or(slope, otherwise), x)

    def start(self, free: Tensor, source: torch.Generator) -> Tensor:
        return free * (2 * _shared(torch.rand, free, source) - 1)


def _shared(draw: Callable[..., Tensor], free: Tensor, source: torch.Generator) -> Tensor:
    """Return one draw for all images, (*input), in single precision whatever the default type is."""
    return draw(free.shape[1:], generator=source, device=free.device, dtype=torch.float32)


L2: Norm = _L2()
LINF: Norm = _Linf()
