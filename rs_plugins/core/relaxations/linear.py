"""Coefficients of linear bounds and how a layer changes them, from its output back to its input (Zhang et al. 2018).

A bound A·z + b ≤ (what is bounded) has for each image as many rows as there are numbers to be bounded. Coefficients
come in forms that share the protocol `Coefficients`. Each method ``through_…`` takes those of a layer's output and
returns those of its input together with what is added to b, (n or 1, rows) or None for nothing, so that the new bound
holds wherever the old one does. A form that has no better way for a layer turns into `Dense` with ``to_dense``.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from rs_plugins.core.relaxations.activations import Lines
from rs_plugins.core.relaxations.regions import Interval, Region, product

_NARROW = 4  # channels


class Kernel(NamedTuple):
    """A two-dimensional convolution.

    Attributes:
        weight: (outside, inside / groups, height, width).
        bias: (outside,), or None.
        stride: Two numbers, as the following.
        before: Rows of zeros above, columns of zeros to the left.
        after: Rows of zeros below, columns of zeros to the right.
        dilation: Distance of the kernel's taps.
        groups: Into how many parts the channels are cut.
    """

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def apply(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the convolution of ``x`` (n, inside, height, width), with the kernel's own weight if none is given."""
        padding: tuple[int, int] | int = self.before
        if self.before != self.after:
            (top, left), (bottom, right) = self.before, self.after
            x, padding = functional.pad(x, (left, right, top, bottom)), 0
        taps = self.weight if weight is None else weight
        return functional.conv2d(x, taps, bias, self.stride, padding, self.dilation, self.groups)

    def window(self, outside: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of what a window of the output of size ``outside`` depends on."""
        height, width = (
            (outside[i] - 1) * self.stride[i] + self.dilation[i] * (self.weight.shape[i + 2] - 1) + 1 for i in range(2)
        )
        return height, width

    def adjoint(self, y: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the transposed convolution of ``y`` (n, outside, …), (n, inside, *size)."""
        taps = self.weight.shape[2:]
        # pixels at the far ends that no tap reached (+), or zeros that were only there to be reached (-)
        reached = [
            (y.shape[i + 2] - 1) * self.stride[i] + self.dilation[i] * (taps[i] - 1) + 1 - 2 * self.before[i]
            for i in range(2)
        ]
        left_over = [size[i] - reached[i] for i in range(2)]
        fits = all(0 <= rest < step for rest, step in zip(left_over, self.stride, strict=True))
        if fits and self._narrow and y.device.type == "cpu":
            columns = self.weight.flatten(1).mT @ y.flatten(2)
            return functional.fold(columns, size, taps, self.dilation, self.before, self.stride)
        extra = [max(number, 0) for number in left_over]
        x = functional.conv_transpose2d(
            y, self.weight, None, self.stride, self.before, extra, self.groups, self.dilation
        )
        return x[..., : size[0], : size[1]] if min(left_over) < 0 else x

    @property
    def _narrow(self) -> bool:
        """Whether a matrix product and a sum of windows are faster on a CPU: 4 to 9 times in single precision."""
        return self.groups == 1 and self.before == self.after and self.weight.shape[1] <= _NARROW


class Coefficients(Protocol):
    """Coefficients of a linear bound at one node of shape ``shape``, for each image (n, or 1 for all) and each row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The node's shape, without the batch."""

    def through_linear(self, weight: Tensor, bias: Tensor | None) -> "tuple[Coefficients, Tensor | None]":
        """Go through a linear layer on the last dimension, ``weight`` (outside, inside)."""

    def through_conv(self, kernel: Kernel, shape: tuple[int, ...]) -> "tuple[Coefficients, Tensor | None]":
        """Go through a convolution with input (n, *shape)."""

    def through_diagonal(self, scale: Tensor | None, shift: Tensor | None) -> "tuple[Coefficients, Tensor | None]":
        """Go through scale·z + shift, both of as many dimensions as the node, or 0; None is 1 or 0."""

    def through_activation(self, lines: Lines) -> "tuple[Coefficients, Tensor | None]":
        """Go through an activation between ``lines``: the lower one under coefficients > 0, the upper one under < 0."""

    def plus(self, other: "Coefficients") -> "Coefficients":
        """Return the sum with those that came another way to the same node."""

    def negative(self) -> "Coefficients":
        """Return -A."""

    def concretise(self, ends: Region | Interval) -> Tensor:
        """Return the least value of A·z over ``ends``, (n, rows)."""

    def to_dense(self) -> "Dense":
        """Return the same as one number for each value of the node."""


class Dense:
    """One coefficient for each value of the node.

    Args:
        values: (n or 1, rows, *shape).
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def identity(cls, shape: tuple[int, ...], rows: Tensor, like: Tensor) -> "Dense":
        """Return those that bound the values of a node one by one: row k is 1 at the flat position ``rows[k]``."""
        size = int(torch.Size(shape).numel())
        start = torch.zeros(len(rows), size, dtype=like.dtype, device=like.device)
        return cls(start.scatter(1, rows.unsqueeze(1), 1.0).reshape(1, len(rows), *shape))

    @property
    def shape(self) -> tuple[int, ...]:
        """The node's shape, without the batch."""
        return tuple(self.values.shape[2:])

    def through_linear(self, weight: Tensor, bias: Tensor | None) -> "tuple[Dense, Tensor | None]":
        """Return A W and A·bias."""
        return Dense(self.values @ weight), self._constant(bias)

    def through_conv(self, kernel: Kernel, shape: tuple[int, ...]) -> "tuple[Dense, Tensor | None]":
        """Return the transposed convolution of A, and A·bias."""
        flat = kernel.adjoint(self.values.flatten(0, 1), (shape[-2], shape[-1]))
        offset = None if kernel.bias is None else self.values.sum((-2, -1)) @ kernel.bias
        return Dense(flat.unflatten(0, self.values.shape[:2])), offset

    def through_diagonal(self, scale: Tensor | None, shift: Tensor | None) -> "tuple[Dense, Tensor | None]":
        """Return A·scale and A·shift."""
        return (self if scale is None else Dense(self.values * scale)), self._constant(shift)

    def through_activation(self, lines: Lines) -> "tuple[Dense, Tensor | None]":
        """Return A⁺·sl + A⁻·su and A⁺·il + A⁻·iu."""
        lower_slope, upper_slope = self._by_row(lines.lower_slope), self._by_row(lines.upper_slope)
        positive = functional.relu(self.values)
        values = torch.addcmul(self.values * upper_slope, positive, lower_slope - upper_slope)
        offset = product(self.values - positive, lines.upper_offset)
        if lines.lower_offset is not None:
            offset = offset + product(positive, lines.lower_offset)
        return Dense(values), offset

    def through_map(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> "Dense":
        """Go through a linear map of tensors (n, *shape) without offset: apply its transpose."""
        flat = self.values.flatten(0, 1)
        transposed = torch.func.vjp(function, flat.new_zeros(len(flat), *shape))[1]
        return Dense(transposed(flat)[0].unflatten(0, self.values.shape[:2]))

    def reshaped(self, shape: tuple[int, ...]) -> "Dense":
        """Return the same for a node whose values are arranged otherwise."""
        return Dense(self.values.reshape(*self.values.shape[:2], *shape))

    def split(self, sizes: tuple[int, ...], dim: int) -> tuple["Dense", ...]:
        """Return the parts of ``sizes`` along the dimension ``dim`` >= 1 of the batch."""
        return tuple(Dense(part) for part in self.values.split(sizes, dim + 1))

    def plus(self, other: Coefficients) -> "Dense":
        """Return the sum with others of the same node."""
        return Dense(self.values + other.to_dense().values)

    def negative(self) -> "Dense":
        """Return -A."""
        return Dense(-self.values)

    def concretise(self, ends: Region | Interval) -> Tensor:
        """Return the least value of A·z over ``ends``, (n, rows)."""
        return ends.minimum(self.values)

    def to_dense(self) -> "Dense":
        """Return itself."""
        return self

    def _constant(self, shift: Tensor | None) -> Tensor | None:
        """Return A·shift, (n or 1, rows), for a shift that is the same for all images."""
        return None if shift is None else product(self.values, shift.expand(self.shape).unsqueeze(0))

    def _by_row(self, part: Tensor) -> Tensor:
        """Return what belongs to neurons, (n, *node), so that it goes with rows of coefficients."""
        return part.unsqueeze(1) if part.ndim < self.values.ndim else part
