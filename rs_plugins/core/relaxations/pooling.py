"""Max-pooling: exact intervals, and a line below and above each window's maximum; average pooling as a convolution."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rs_plugins.core.relaxations.linear import Coefficients, Dense, Kernel
from rs_plugins.core.relaxations.regions import product


class Choice(NamedTuple):
    """The bounds of each window's maximum: one ``entry`` below; above, the same entry or a constant.

    Attributes:
        entry: Flat position in its channel of the entry with the greatest lower bound, (n, channels, height, width).
        alone: Whether no other entry of the window can be greater.
        ceiling: Greatest upper bound of the window.
    """

    entry: Tensor
    alone: Tensor
    ceiling: Tensor


@dataclass(frozen=True)
class MaxPool:
    """Two-dimensional max-pooling of (n, *shape), shape (channels, height, width)."""

    shape: tuple[int, ...]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    def interval(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Return the maxima of both ends, which are exact."""
        return self._pooled(lower)[0], self._pooled(upper)[0]

    def choice(self, lower: Tensor, upper: Tensor) -> Choice:
        """Return the lines for values between ``lower`` and ``upper``, (n, *shape)."""
        floor, index = self._pooled(lower)
        ceiling = self._pooled(upper)[0]
        # in this form an end that is NaN may be greater
        above = (~(self._windows(upper) <= floor.unsqueeze(2))).sum(2)
        itself = ~(upper.flatten(2).gather(2, index.flatten(2)).view_as(floor) <= floor)
        return Choice(index, above <= itself, ceiling)

    def through(self, coefficients: Coefficients, choice: Choice) -> tuple[Coefficients, Tensor]:
        """Return the coefficients of the input for those of the output, and what is added to the constant."""
        values = coefficients.to_dense().values
        index, alone = choice.entry.unsqueeze(1), choice.alone.unsqueeze(1)
        linear = torch.where((values > 0) | alone, values, 0.0)
        offset = product(torch.where((values < 0) & ~alone, values, 0.0), choice.ceiling)
        height, width = self.shape[1:]
        empty = linear.new_zeros(*linear.shape[:3], height * width)
        before = empty.scatter_add(3, index.expand(linear.shape).flatten(3), linear.flatten(3))
        return Dense(before.unflatten(3, (height, width))), offset

    def _pooled(self, z: Tensor) -> tuple[Tensor, Tensor]:
        options = (self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        values, index = functional.max_pool2d_with_indices(z, *options)
        return values, index

    def _windows(self, z: Tensor) -> Tensor:
        """Return the entries of each window, (n, channels, entries, height, width), -inf where there is none."""
        n, channels, height, width = z.shape
        out = self._pooled(z.detach())[0].shape[2:]
        sides = []
        for i, size in enumerate((height, width)):
            reached = (out[i] - 1) * self.stride[i] + self.dilation[i] * (self.kernel[i] - 1) + 1
            sides.append((self.padding[i], max(reached - size - self.padding[i], 0)))
        (top, bottom), (left, right) = sides
        padded = functional.pad(z.detach(), (left, right, top, bottom), value=-torch.inf)
        columns = functional.unfold(padded.flatten(0, 1).unsqueeze(1), self.kernel, self.dilation, 0, self.stride)
        rows = (padded.shape[2] - self.dilation[0] * (self.kernel[0] - 1) - 1) // self.stride[0] + 1
        arranged = columns.unflatten(2, (rows, -1))[..., : out[0], : out[1]]
        windows: Tensor = arranged.unflatten(0, (n, channels))
        return windows


@dataclass(frozen=True)
class MeanPool:
    """An average pooling that treats all windows alike, as a convolution of each channel by itself."""

    channels: int
    taps: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    divisor: float

    def __call__(self, like: Tensor) -> Kernel:
        """Return the convolution, for numbers like those of a tensor."""
        weight = like.new_full((self.channels, 1, *self.taps), 1 / self.divisor)
        return Kernel(weight, None, self.stride, self.padding, self.padding, (1, 1), self.channels)
