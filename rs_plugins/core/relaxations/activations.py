"""What the bounds need of each activation: an interval that holds its values, and two lines that enclose it."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from rs_plugins.core.activations import IDENTITY_ABOVE, ParametricSoftplus, SmoothReLU
from rs_plugins.core.relaxations.curves import (
    GELU,
    GELU_TANH,
    MISH,
    SIGMOID,
    SILU,
    TANH,
    Curve,
    celu,
    elu,
    smooth_relu_curve,
    softplus,
)

_NO_OVERFLOW = 80.0  # torch's softplus takes the exponential of all below its threshold

Slope = Literal["adaptive", "parallel"] | Tensor


class Lines(NamedTuple):
    """Two lines of each neuron: lower_slope·z + lower_offset ≤ f(z) ≤ upper_slope·z + upper_offset.

    All are of shape (n, *node), or (n, rows, *node) where each row of coefficients has its own; ``lower_offset`` is
    None if it is zero everywhere.
    """

    lower_slope: Tensor
    lower_offset: Tensor | None
    upper_slope: Tensor
    upper_offset: Tensor


class Activation(Protocol):
    """An activation, element by element. No method branches on values, so that all work under torch.func.vmap."""

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest value of f on [lower, upper], of the same shape, differentiably."""

    def lines(self, lower: Tensor, upper: Tensor, lower_slope: Slope) -> Lines:
        """Return lines that enclose f on [lower, upper], differentiably; where lower = upper they meet in f(lower).

        A tensor as ``lower_slope`` is one number in [0, 1] for each neuron, (n, *node) or (n, rows, *node), that
        chooses among the lower lines (for ReLU it is the slope where the sign is open); any is sound. Only
        `adjustable` activations are asked for it.
        """

    @property
    def adjustable(self) -> bool:
        """Whether ``lines`` takes a tensor as ``lower_slope``."""

    def settled(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return where tighter bounds would give the same lines, as a mask; None if that is nowhere."""


class ReLU:
    """max(0, z)."""

    adjustable = True

    def __call__(self, z: Tensor) -> Tensor:
        """Return max(0, z)."""
        return functional.relu(z)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends after the ReLU, which is monotone."""
        return functional.relu(lower), functional.relu(upper)

    def lines(self, lower: Tensor, upper: Tensor, lower_slope: Slope) -> Lines:
        """Return the chord as upper line, and a line through 0 as lower one (Zhang et al. 2018)."""
        below, above = functional.relu(-lower), functional.relu(upper)
        width = below + above
        chord = above / torch.where(width > 0, width, 1.0)
        if isinstance(lower_slope, Tensor):
            rows_first = lower_slope.ndim > lower.ndim
            low, high, chords = (t.unsqueeze(1) if rows_first else t for t in (lower, upper, chord))
            slope = torch.where((low < 0) & (high > 0), lower_slope, chords)
        elif lower_slope == "parallel":
            slope = chord
        else:
            slope = (upper > -lower).to(lower.dtype)
        return Lines(slope, None, chord, chord * below)

    def settled(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return where the sign is known."""
        return (lower >= 0) | (upper <= 0)


# What each takes beyond its input is passed on; ``inplace`` makes no difference to the bounds.
class LeakyReLU:
    """z for z > 0, else a·z: a·z + (1 - a)·max(0, z), for a in [0, 1]."""

    adjustable = True

    def __init__(self, leak: float) -> None:
        self._leak, self._relu = leak, ReLU()

    def __call__(self, z: Tensor) -> Tensor:
        """Return the leaky ReLU of z."""
        return functional.leaky_relu(z, self._leak)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends after it, as it is monotone."""
        return self(lower), self(upper)

    def lines(self, lower: Tensor, upper: Tensor, lower_slope: Slope) -> Lines:
        """Return those of the ReLU in it, plus a·z; a number for a neuron is the slope of that ReLU."""
        low, _, high, offset = self._relu.lines(lower, upper, lower_slope)
        leak, rest = self._leak, 1 - self._leak
        return Lines(leak + rest * low, None, leak + rest * high, rest * offset)

    def settled(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return where the sign is known."""
        return self._relu.settled(lower, upper)


class Smooth:
    """An activation with a `Curve`: parts of known curvature between numbers that are known."""

    adjustable = False

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    def __call__(self, z: Tensor) -> Tensor:
        """Return f(z)."""
        return self.curve.value(z)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return f at both ends, or at its minimum where that lies between them."""
        return self.curve.interval(lower, upper)

    def lines(self, lower: Tensor, upper: Tensor, lower_slope: Slope) -> Lines:
        """Return tangent and chord, moved where the curvature changes; ``lower_slope`` is not asked."""
        below, above = self.curve.lines(lower, upper)
        return Lines(*below, *above)

    def settled(self, lower: Tensor, upper: Tensor) -> Tensor | None:
        """Return None: nowhere is a smooth activation a line."""
        return None


class Softplus(Smooth):
    """log(1 + exp(beta z)) / beta as torch computes it: z itself where beta z > threshold, a small step down."""

    def __init__(self, beta: float, threshold: float) -> None:
        super().__init__(softplus(beta))
        self._beta, self._threshold = beta, threshold
        self._step = math.log1p(math.exp(-threshold)) / beta

    def __call__(self, z: Tensor) -> Tensor:
        """Return the softplus of z."""
        return functional.softplus(z, beta=self._beta, threshold=self._threshold)

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return both ends, with the step where it lies between them."""
        low, high = self(lower), self(upper)
        stepped = self._stepped(lower, upper)
        edge = self._threshold / self._beta
        return (
            torch.where(stepped & (low > edge), edge, low),
            torch.where(stepped & (high < edge + self._step), edge + self._step, high),
        )

    def lines(self, lower: Tensor, upper: Tensor, lower_slope: Slope) -> Lines:
        """Return tangent and chord of the softplus without a step, the tangent less the step where that is needed."""
        (low, low_offset), (high, high_offset) = self.curve.lines(lower, upper)
        low_offset = torch.where(self._stepped(lower, upper), low_offset - self._step, low_offset)
        line = lower * self._beta > self._threshold
        one, zero = torch.ones_like(low), torch.zeros_like(low)
        return Lines(
            torch.where(line, one, low),
            torch.where(line, zero, low_offset),
            torch.where(line, one, high),
            torch.where(line, zero, high_offset),
        )

    def _stepped(self, lower: Tensor, upper: Tensor) -> Tensor:
        return (lower * self._beta <= self._threshold) & (upper * self._beta > self._threshold)


def _elu(module: nn.ELU) -> Activation | None:
    return Smooth(elu(module.alpha)) if module.alpha >= 0 else None


def _celu(module: nn.CELU) -> Activation | None:
    return Smooth(celu(module.alpha)) if module.alpha > 0 else None


def _leaky_relu(module: nn.LeakyReLU) -> Activation | None:
    return LeakyReLU(module.negative_slope) if 0 <= module.negative_slope <= 1 else None


def _softplus(module: nn.Softplus) -> Activation | None:
    return (
        Softplus(module.beta, module.threshold) if module.beta > 0 and 0 <= module.threshold <= _NO_OVERFLOW else None
    )


def _gelu(module: nn.GELU) -> Activation:
    return Smooth(GELU_TANH if module.approximate == "tanh" else GELU)


def _smooth_relu(module: SmoothReLU) -> Activation:
    return Smooth(smooth_relu_curve(module, lambda: module.curvature))


# A module outside what is proven (an ELU that falls, a leaky ReLU that is no maximum) has no bounds here: None.
_MODULES: dict[type[nn.Module], Callable[[Any], Activation | None]] = {
    nn.ReLU: lambda module: ReLU(),
    nn.LeakyReLU: _leaky_relu,
    nn.Sigmoid: lambda module: Smooth(SIGMOID),
    nn.Tanh: lambda module: Smooth(TANH),
    nn.Softplus: _softplus,
    nn.ELU: _elu,
    nn.CELU: _celu,
    nn.SiLU: lambda module: Smooth(SILU),
    nn.GELU: _gelu,
    nn.Mish: lambda module: Smooth(MISH),
    SmoothReLU: _smooth_relu,
    ParametricSoftplus: lambda module: Softplus(module.sharpness, IDENTITY_ABOVE),
}
_FUNCTIONS: dict[Any, Activation] = {
    **dict.fromkeys((torch.relu, torch.relu_, functional.relu, functional.relu_, "relu", "relu_"), ReLU()),
    **dict.fromkeys((torch.tanh, torch.tanh_, functional.tanh, "tanh", "tanh_"), Smooth(TANH)),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, functional.sigmoid, "sigmoid", "sigmoid_"), Smooth(SIGMOID)),
    functional.silu: Smooth(SILU),
    functional.mish: Smooth(MISH),
}


def activation_of(source: object) -> Activation | None:
    """Return how to bound an activation: a module, a function of torch, or the name of a method of tensors.

    None if it is not known here, or has options for which nothing is proven. A module's parameters are looked up in it
    at each call. Functions with options (leaky_relu, gelu, softplus, …) are known as modules only.
    """
    if isinstance(source, nn.Module):
        make = _MODULES.get(type(source))
        return None if make is None else make(source)
    return _FUNCTIONS.get(source)
