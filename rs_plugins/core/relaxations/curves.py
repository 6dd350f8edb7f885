"""Intervals of smooth activations, and sound lines below and above them, from where they are convex and where concave.

Any slope gives a sound line: its offset is the least (or the greatest) value of f(z) - slope·z on the interval. That
extremum is looked for piece by piece: at the ends of a piece, and where f'(z) = slope in a piece of the right
curvature. There a bisection leaves a short bracket, and a tangent bounds the function on it, so the offset is rounded
outward. The gradient of the offset is that of the extremum (envelope theorem), without a step through the bisection.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

Line = tuple[Tensor, Tensor]  # slope and offset, each of the shape of the bounds

_STEPS = 12  # of the bisection; what is lost falls with the cube of the bracket's length
_FAR = 40.0  # beyond, all curves here are lines to the rounding of float64


@dataclass(frozen=True)
class Curve:
    """A scalar function, and where it is convex or concave.

    Args:
        value: f, of a tensor of any shape.
        derivative: f', likewise; finite everywhere, with a finite gradient. At a kink it may be the slope of either
            side.
        pieces: Of (start, end, curvature), in order, from minus to plus infinity: 1 where f is convex, -1 where it is
            concave, 0 where it is a line up to rounding. A piece of many has finite ends or curvature 0.
        minimum: Where f falls before and rises after, and a number just below f there; None where f never falls.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    pieces: tuple[tuple[float, float, int], ...] = ((-math.inf, math.inf, 1),)
    minimum: tuple[float, float] | None = None

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest value of f from ``lower`` to ``upper``, each of their shape."""
        at_lower, at_upper = self.value(lower), self.value(upper)
        if self.minimum is None:
            return at_lower, at_upper
        place, least = self.minimum
        inside = (lower <= place) & (place <= upper)
        ends = torch.minimum(at_lower, at_upper)
        return torch.where(inside, torch.full_like(ends, least), ends), torch.maximum(at_lower, at_upper)

    def lines(self, lower: Tensor, upper: Tensor) -> tuple[Line, Line]:
        """Return a line below and one above f on the interval from ``lower`` to ``upper``, tensors of one shape.

        Below a convex f it is the tangent at the middle, above it the chord; the other way round where f is concave.
        Where the interval has both, it is what is best at the middle among chord, tangent and constant, each moved
        until it is sound.
        """
        middle = lower / 2 + upper / 2
        tangent = self.derivative(middle)
        chord = self._chord(lower, upper, tangent)
        if len(self.pieces) == 1:
            below = (tangent, self.value(middle) - tangent * middle)
            above = (chord, torch.maximum(self._over(lower, chord), self._over(upper, chord)))
            return below, above
        return self._best(lower, upper, chord, tangent, 1), self._best(lower, upper, chord, tangent, -1)

    def offset(self, slope: Tensor, lower: Tensor, upper: Tensor, side: int) -> Tensor:
        """Return the offset with which a line of this slope is sound.

        Args:
            slope: Of the line, of the shape of the bounds.
            lower: Where the interval starts.
            upper: Where it ends.
            side: 1 for a line below f, -1 for one above it.
        """
        found = torch.minimum(side * self._over(lower, slope), side * self._over(upper, slope))
        for start, end, curvature in self.pieces:
            meets = (lower < end) & (upper > start)
            if curvature == side:
                candidate = self._inside(
                    lower.detach().clamp(start, end), upper.detach().clamp(start, end), slope, side
                )
            elif math.isfinite(end):
                meets = meets & (upper >= end)
                candidate = side * self._over(torch.full_like(upper, end), slope)
            else:
                continue
            # Of equal ones the end of the interval, which has a gradient, is kept.
            found = torch.where(meets & (candidate < found), candidate, found)
        return side * found

    def _over(self, z: Tensor, slope: Tensor) -> Tensor:
        return self.value(z) - slope * z

    def _chord(self, lower: Tensor, upper: Tensor, tangent: Tensor) -> Tensor:
        """The slope from end to end; the tangent's where the interval is too short to tell it from rounding."""
        half = upper / 2 - lower / 2
        least = torch.finfo(lower.dtype).eps ** (1 / 3)
        long = half > least * torch.maximum(upper.abs(), lower.abs()).clamp(min=1.0)
        rise = self.value(upper) / 2 - self.value(lower) / 2
        return torch.where(long, rise / torch.where(long, half, 1.0), tangent)

    def _best(self, lower: Tensor, upper: Tensor, chord: Tensor, tangent: Tensor, side: int) -> Line:
        """Of three sound lines below (above) f, the one that is highest (lowest) at the middle."""
        middle = lower / 2 + upper / 2
        least, greatest = self.interval(lower, upper)
        slope, offset = torch.zeros_like(tangent), least if side > 0 else greatest
        for other in (tangent, chord):
            moved = self.offset(other, lower, upper, side)
            better = side * (other * middle + moved) > side * (slope * middle + offset)
            slope, offset = torch.where(better, other, slope), torch.where(better, moved, offset)
        return slope, offset

    def _inside(self, left: Tensor, right: Tensor, slope: Tensor, side: int) -> Tensor:
        """The least value of side·(f(z) - slope·z), which is convex from left to right, or a number just below it."""

        def rise(z: Tensor) -> Tensor:
            return side * (self.derivative(z) - slope)

        with torch.no_grad():
            rises, falls = rise(left) >= 0, rise(right) <= 0
            low, high = left, right
            for _ in range(_STEPS):
                middle = low / 2 + high / 2
                up = rise(middle) > 0
                low, high = torch.where(up, low, middle), torch.where(up, middle, high)
            before, after = -rise(low), rise(high)
            share = before / torch.where(before + after > 0, before + after, 1.0)
            turn = low + (high - low) * share.clamp(0.0, 1.0)
            place = torch.where(rises, left, torch.where(falls, right, turn))
            slack = torch.where(rises | falls, 0.0, rise(turn).abs() * (high - low))
        return side * self._over(place, slope) - slack


def _around(*inflections: float, first: int) -> tuple[tuple[float, float, int], ...]:
    """Pieces between the inflections, the curvature changing sign at each, with lines far from 0."""
    ends = (-_FAR, *inflections, _FAR)
    inner = [(start, end, first * (-1) ** number) for number, (start, end) in enumerate(pairwise(ends))]
    return (-math.inf, -_FAR, 0), *inner, (_FAR, math.inf, 0)


def _near(z: Tensor) -> Tensor:
    """The same within what is no line, so that products with it do not overflow; beyond, slopes do not change."""
    return z.clamp(-_FAR, _FAR)


def _logistic_slope(z: Tensor) -> Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _silu_slope(z: Tensor) -> Tensor:
    z = _near(z)
    return torch.sigmoid(z) * (z * torch.sigmoid(-z) + 1.0)


def _gelu_slope(z: Tensor) -> Tensor:
    z = _near(z)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below: Tensor = torch.special.ndtr(z)
    return below + z * density


def _gelu_tanh(z: Tensor) -> Tensor:
    # The gradient of torch's own is NaN where z³ overflows.
    return functional.gelu(_near(z), approximate="tanh") + functional.relu(z - _FAR)


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    z, factor, cubic = _near(z), math.sqrt(2 / math.pi), 0.044715
    step = torch.tanh(factor * (z + cubic * z * z * z))
    inner: Tensor = factor * (1 + 3 * cubic * z * z)
    return (1 + step) / 2 + z / 2 * (1 - step * step) * inner


def _mish_slope(z: Tensor) -> Tensor:
    z = _near(z)
    gate = torch.tanh(functional.softplus(z))
    return gate + z * torch.sigmoid(z) * (1 - gate * gate)


TANH = Curve(torch.tanh, lambda z: 1 - torch.tanh(z).square(), _around(0.0, first=1))
SIGMOID = Curve(torch.sigmoid, _logistic_slope, _around(0.0, first=1))
SILU = Curve(
    functional.silu,
    _silu_slope,
    _around(-2.3993572805154676, 2.3993572805154676, first=-1),
    minimum=(-1.278464542761074, -0.27846454276107382),
)
GELU = Curve(
    functional.gelu,
    _gelu_slope,
    _around(-math.sqrt(2), math.sqrt(2), first=-1),
    minimum=(-0.7517915246935645, -0.1699712074799037),
)
GELU_TANH = Curve(
    _gelu_tanh,
    _gelu_tanh_slope,
    _around(-1.4185040087908284, 1.4185040087908284, first=-1),
    minimum=(-0.7524614220710163, -0.1700407505712541),
)
MISH = Curve(
    functional.mish,
    _mish_slope,
    _around(-2.256376396360793, 1.4905711794854284, first=-1),
    minimum=(-1.1924312145154952, -0.3088434130172507),
)


def softplus(beta: float) -> Curve:
    """log(1 + exp(beta z)) / beta, convex, for beta > 0."""
    return Curve(lambda z: functional.softplus(z, beta=beta, threshold=_FAR), lambda z: torch.sigmoid(beta * z))


def elu(alpha: float) -> Curve:
    """The ELU for alpha >= 0: convex for alpha <= 1; a larger alpha has a kink at 0 where the slope drops to 1."""

    def slope(z: Tensor) -> Tensor:
        return torch.where(z > 0, 1.0, alpha * torch.exp(-functional.relu(-z)))

    def value(z: Tensor) -> Tensor:
        return functional.elu(z, alpha=alpha)

    if alpha <= 1:
        return Curve(value, slope)
    return Curve(value, slope, ((-math.inf, -_FAR, 0), (-_FAR, 0.0, 1), (0.0, math.inf, 0)))


def celu(alpha: float) -> Curve:
    """The CELU for alpha > 0: convex and once continuously differentiable."""
    return Curve(lambda z: functional.celu(z, alpha=alpha), lambda z: torch.exp(-functional.relu(-z / alpha)))


def smooth_relu_curve(value: Callable[[Tensor], Tensor], curvature: Callable[[], Tensor]) -> Curve:
    """SmoothReLU of a curvature b, which is asked for at each call: convex, with the slope b z / (1 + b z) above 0."""
    return Curve(value, lambda z: 1 - 1 / (1 + curvature() * functional.relu(z)))
