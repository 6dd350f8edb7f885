"""Sound lines below and above smooth activations on an interval, from where they are convex and where concave.

Any slope gives a sound line: its offset is the least (or the greatest) value of f(z) - slope * z on the interval. That
extremum is looked for piece by piece: at the ends of a piece, and where f'(z) = slope in a piece whose curvature allows
it. There a bisection leaves a short bracket, and a tangent at its end bounds the function on the rest of the bracket, so
that the offset is rounded outward. The gradient of the offset is that of the extremum (envelope theorem): exact, and
without a step through the bisection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 20  # the offset's slack falls with the square of the bracket: about 1e-10 for an interval of length 10


class Lines(NamedTuple):
    """Lines around an activation on an interval: lower_slope z + lower_offset <= f(z) <= upper_slope z + upper_offset."""

    lower_slope: Tensor
    lower_offset: Tensor
    upper_slope: Tensor
    upper_offset: Tensor


@dataclass(frozen=True)
class Curve:
    """A scalar function, and where it is convex or concave.

    Args:
        value: f, of a tensor of any shape.
        derivative: f', likewise; finite everywhere. At a kink, any slope between those of both sides.
        pieces: Of (start, end, curvature), in order, from minus to plus infinity: 1 where f is convex, -1 where it is
            concave, 0 where it is a line up to rounding.
        minimum: Where f falls before and rises after, and a number just below f there; None where f never falls.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    pieces: tuple[tuple[float, float, int], ...]
    minimum: tuple[float, float] | None = None

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """The values of f from ``lower`` to ``upper``: (least, greatest), each of their shape."""
        at_lower, at_upper = self.value(lower), self.value(upper)
        if self.minimum is None:
            return at_lower, at_upper
        place, least = self.minimum
        inside = (lower <= place) & (place <= upper)
        return (
            torch.where(inside, torch.full_like(at_lower, least), torch.minimum(at_lower, at_upper)),
            torch.maximum(at_lower, at_upper),
        )

    def lines(self, lower: Tensor, upper: Tensor) -> Lines:
        """Lines below and above f on the interval from ``lower`` to ``upper``, tensors of one shape.

        Below a convex f the line is the tangent at the middle, above it the chord; the other way round where f is
        concave. Where the interval has both, the best at the middle of chord, tangent and constant, each moved until it
        is sound.
        """
        middle = lower / 2 + upper / 2
        tangent = self.derivative(middle)
        slopes = [chord(self, lower, upper, tangent), tangent, torch.zeros_like(tangent)]
        below = _best([(slope, self.offset(slope, lower, upper, 1)) for slope in slopes], middle, 1)
        above = _best([(slope, self.offset(slope, lower, upper, -1)) for slope in slopes], middle, -1)
        return Lines(*below, *above)

    def offset(self, slope: Tensor, lower: Tensor, upper: Tensor, side: int) -> Tensor:
        """The offset with which a line of this ``slope`` is sound.

        Args:
            slope: Of the line, of the shape of the bounds.
            lower: Where the interval starts.
            upper: Where it ends.
            side: 1 for a line below f, -1 for one above it.
        """
        found = self._at(lower, slope, side)
        found = torch.minimum(found, self._at(upper, slope, side))
        for start, end, curvature in self.pieces:
            meets = (lower < end) & (upper > start)
            left, right = lower.clamp(start, end), upper.clamp(start, end)
            if curvature == side:
                found = torch.where(meets, torch.minimum(found, self._inside(left, right, slope, side)), found)
            elif math.isfinite(end):
                # The extremum on this piece is at its ends; the right one may be a kink.
                found = torch.where(meets & (upper >= end), torch.minimum(found, self._at(right, slope, side)), found)
        return side * found

    def _at(self, z: Tensor, slope: Tensor, side: int) -> Tensor:
        return side * (self.value(z) - slope * z)

    def _inside(self, left: Tensor, right: Tensor, slope: Tensor, side: int) -> Tensor:
        """A number just below the least value of side (f(z) - slope z) where that is convex."""
        with torch.no_grad():
            for _ in range(_STEPS):
                middle = left / 2 + right / 2
                rises = side * (self.derivative(middle) - slope) > 0
                left, right = torch.where(rises, left, middle), torch.where(rises, middle, right)
            falls = (side * (self.derivative(left) - slope)).clamp(max=0)
            climbs = (side * (self.derivative(right) - slope)).clamp(min=0)
            width = (right - left).clamp(min=0)
            slack = torch.minimum(-falls, climbs) * width
        return self._at(left, slope, side) - slack
