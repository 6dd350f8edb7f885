"""What the bounds need of each activation: an interval that holds its values, and two lines that enclose it."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

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
_MODULES: dict[type[nn.Module], Callable[[Any], Activation]] = {nn.ReLU: lambda module: ReLU()}
_FUNCTIONS: dict[Any, Callable[..., Activation]] = {
    **dict.fromkeys((torch.relu, torch.relu_, "relu", "relu_"), lambda: ReLU()),
    **dict.fromkeys((functional.relu, functional.relu_), lambda inplace=False: ReLU()),
}


def activation_of(source: object, *args: Any, **kwargs: Any) -> Activation | None:
    """Return how to bound an activation: a module, a function of torch, or the name of a method of tensors.

    ``args`` and ``kwargs`` are what a function is called with after its input. None if it is not known here. A module's
    parameters are looked up in it at each call.
    """
    if isinstance(source, nn.Module):
        make = _MODULES.get(type(source))
        return None if make is None else make(source)
    found = _FUNCTIONS.get(source)
    return None if found is None else found(*args, **kwargs)
