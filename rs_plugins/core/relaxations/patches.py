"""Coefficients of bounds on the outputs of convolutions: each row's are kept on the window that it depends on.

A value of a convolution's output depends on a window of each earlier node, and the coefficients outside are zero. Kept
as windows they are smaller than as one number for each value of the node, and so is what goes through a convolution.
Rows begin as a convolution's own weights, shared by all positions of its output until an activation tells those apart.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from rs_plugins.core.relaxations.activations import Lines
from rs_plugins.core.relaxations.linear import Coefficients, Dense, Kernel
from rs_plugins.core.relaxations.regions import Interval, Region, best, identity

Pair = tuple[int, int]
# Up to so many entries of its matrix, a transposed convolution of many small windows is faster as a matrix product.
_AS_MATRIX = 2**16


class Grid(NamedTuple):
    """Where the windows lie: that of position (i, j) starts at (i, j)·stride - before.

    Attributes:
        size: Height and width of the node whose values are bounded, so of the positions.
        stride: From the window of one position to the next.
        before: How far the first one starts outside the node.
    """

    size: Pair
    stride: Pair = (1, 1)
    before: Pair = (0, 0)


class Patches:
    """Coefficients on windows of a node (channels, height, width).

    Rows come in two arrangements. Either they are all positions of some channels, and ``picked`` is None; ``values``
    have a position for each, or one for all that have the same coefficients. Or ``picked`` are the flat positions of
    single rows, and each has values of its own: (n or 1, rows, 1, …); ``channels`` are then those to take of values
    that all positions share, (1, 1, channels, …), as long as they do.

    Args:
        values: (n or 1, positions or 1, channels of what is bounded, channels of the node, window height, its width).
        grid: Where the windows lie.
        shape: Of the node, (channels, height, width).
        picked: Flat positions in ``grid.size``, (rows,), or None for all.
        channels: Which of the shared values each row takes, (rows,), or None where rows have values of their own.
        clean: Whether coefficients outside the node, of its padding, are known to be zero.
    """

    def __init__(
        self,
        values: Tensor,
        grid: Grid,
        shape: tuple[int, ...],
        *,
        picked: Tensor | None = None,
        channels: Tensor | None = None,
        clean: bool = True,
    ) -> None:
        self.values, self.grid, self._shape = values, grid, shape
        self._picked, self._channels, self._clean = picked, channels, clean

    @classmethod
    def identity(cls, shape: tuple[int, ...], rows: Tensor, like: Tensor) -> "Patches":
        """Return those that bound values of a node (channels, height, width) one by one, as `Dense.identity`.

        Args:
            shape: Of the node.
            rows: Flat positions in the node of what is bounded, (rows,).
            like: A tensor of the same dtype and device.
        """
        channels, height, width = shape
        area = height * width
        eye = identity(channels, like).view(1, 1, channels, channels, 1, 1)
        grid = Grid((height, width))
        first, count = (int(rows[0]) // area, len(rows) // area) if len(rows) else (0, 0)
        whole = torch.arange(first * area, (first + count) * area, device=rows.device)
        if count and torch.equal(rows, whole):
            return cls(eye[:, :, first : first + count], grid, shape)
        return cls(eye, grid, shape, picked=rows % area, channels=rows // area)

    @property
    def shape(self) -> tuple[int, ...]:
        """The node's shape, without the batch."""
        return self._shape

    def through_linear(self, weight: Tensor, bias: Tensor | None) -> tuple[Coefficients, Tensor | None]:
        """Go through a linear layer on the last dimension, in dense form."""
        return self.to_dense().through_linear(weight, bias)

    def through_conv(self, kernel: Kernel, shape: tuple[int, ...]) -> tuple[Coefficients, Tensor | None]:
        """Return the transposed convolution of each window; in dense form where it gets as large as the input."""
        inside = self._cleaned()
        height, width = kernel.window(inside.window)
        if height * width > shape[-2] * shape[-1]:
            return inside.to_dense().through_conv(kernel, shape)
        flat = _transposed(kernel, inside.values.flatten(0, 2), shape[0] * height * width)
        grid = inside.grid
        (down, across), (top, left) = kernel.stride, kernel.before
        moved = Grid(
            grid.size,
            (grid.stride[0] * down, grid.stride[1] * across),
            (grid.before[0] * down + top, grid.before[1] * across + left),
        )
        values = flat.unflatten(0, inside.values.shape[:3])
        offset = None if kernel.bias is None else inside._rows(inside.values.sum((-2, -1)) @ kernel.bias)
        return inside._with(values, grid=moved, shape=shape, clean=False), offset

    def through_diagonal(self, scale: Tensor | None, shift: Tensor | None) -> tuple[Coefficients, Tensor | None]:
        """Return A·scale and A·shift, without what is outside the node."""
        if any(part is not None and max((1, 1, *part.shape)[-2:]) > 1 for part in (scale, shift)):
            return self.to_dense().through_diagonal(scale, shift)
        inside = self._cleaned()
        offset = None
        if shift is not None:
            shifts = shift.expand(inside.shape[0], 1, 1).flatten()
            offset = inside._rows(inside.values.sum((-2, -1)) @ shifts)
        return (inside if scale is None else inside._with(inside.values * scale)), offset

    def through_activation(self, lines: Lines) -> tuple[Coefficients, Tensor | None]:
        """Return A⁺·sl + A⁻·su and A⁺·il + A⁻·iu, for lines that are the same for all rows."""
        if max(lines.lower_slope.ndim, lines.upper_slope.ndim) > len(self._shape) + 1:
            return self.to_dense().through_activation(lines)
        rows = self._spread()
        positive = functional.relu(rows.values)
        lower, upper = (rows.windows(slope).unsqueeze(2) for slope in (lines.lower_slope, lines.upper_slope))
        values = torch.addcmul(rows.values * upper, positive, lower - upper)
        offset = rows._product(rows.values - positive, lines.upper_offset)
        if lines.lower_offset is not None:
            offset = offset + rows._product(positive, lines.lower_offset)
        return rows._with(values, clean=True), offset

    def plus(self, other: Coefficients) -> Coefficients:
        """Return the sum with those that came another way to the same node."""
        if not isinstance(other, Patches) or other.grid.stride != self.grid.stride:
            return Dense(self.to_dense().values + other.to_dense().values)
        first, second = self, other
        if first._channels is not second._channels:
            first, second = first._spread(), second._spread()
        grid = first.grid._replace(before=_pairwise_max(first.grid.before, second.grid.before))
        reach = _pairwise_max(first._reach(), second._reach())
        total = first._widened(grid.before, reach) + second._widened(grid.before, reach)
        return first._with(total, grid=grid, clean=first._clean and second._clean)

    def negative(self) -> "Patches":
        """Return -A."""
        return self._with(-self.values, clean=self._clean)

    def concretise(self, ends: Region | Interval) -> Tensor:
        """Return the least value of A·z over ``ends``, (n, rows)."""
        rows = self._spread()
        least = rows._product(rows.values, ends.centre) - rows._product(rows.values.abs(), ends.radius)
        if not isinstance(ends, Region) or ends.norm == "linf":
            return least
        inside = rows._cleaned()
        norms = inside._rows(torch.linalg.vector_norm(inside.values, dim=(-3, -2, -1)))
        return best(least, inside._product(inside.values, ends.x) - ends.scale.flatten(1)[:, :1] * norms)

    def to_dense(self) -> Dense:
        """Return the same as one number for each value of the node."""
        rows = self._spread()
        (height, width), (before, left) = self._shape[-2:], self.grid.before
        after, right = self._overhang()
        tall, wide = before + height + max(after, 0), left + width + max(right, 0)
        down, across = (torch.arange(size, device=self.values.device) for size in self.window)
        rows_down, rows_across = self._positions().unbind(1)
        start = rows_down * self.grid.stride[0] * wide + rows_across * self.grid.stride[1]
        index = start.view(-1, 1, 1, 1) + (down.unsqueeze(1) * wide + across).flatten()
        values = rows.values.expand(-1, len(index), *rows.values.shape[2:])
        canvas = values.new_zeros(*values.shape[:4], tall * wide)
        full = canvas.scatter(4, index.expand(*values.shape[:4], -1), values.flatten(4))
        cut = full.unflatten(4, (tall, wide))[..., before : before + height, left : left + width]
        return Dense(cut.transpose(1, 2).flatten(1, 2))

    @property
    def window(self) -> Pair:
        """Height and width of the windows."""
        return self.values.shape[-2], self.values.shape[-1]

    def windows(self, z: Tensor) -> Tensor:
        """Return what lies in the window of each row's position, zeros outside the node.

        Args:
            z: Of the node, (n or 1, channels or 1, height, width).

        Returns:
            Of shape (n or 1, positions, channels or 1, window height, window width).
        """
        after, right = self._overhang()
        (before, left), (height, width) = self.grid.before, self.window
        padded = functional.pad(z, (left, max(right, 0), before, max(after, 0)))
        found = padded.unfold(2, height, self.grid.stride[0]).unfold(3, width, self.grid.stride[1])
        found = found[:, :, : self.grid.size[0], : self.grid.size[1]]
        if self._picked is None:
            # in order, or what is multiplied with it, which is larger, would get out of order
            return found.flatten(2, 3).transpose(1, 2).contiguous()
        down, across = self._positions().unbind(1)
        return found[:, :, down, across].transpose(1, 2).contiguous()

    def _positions(self) -> Tensor:
        """Row and column of each position, (positions, 2)."""
        height, width = self.grid.size
        flat = torch.arange(height * width, device=self.values.device) if self._picked is None else self._picked
        return torch.stack((flat // width, flat % width), 1)

    def _overhang(self) -> list[int]:
        """How far the last windows reach outside the node; below 0 if they end inside."""
        reached = [
            (size - 1) * step - before + window
            for size, step, before, window in zip(*self.grid, self.window, strict=True)
        ]
        return [reached[i] - self._shape[i - 2] for i in range(2)]

    def _cleaned(self) -> "Patches":
        """The same without coefficients of padding, which is zero whatever the node is."""
        if self._clean or max(*self.grid.before, *self._overhang()) <= 0:
            return self
        rows = self._spread()
        inside = rows.windows(rows.values.new_ones(1, 1, *self._shape[-2:]))
        return rows._with(rows.values * inside.unsqueeze(2), clean=True)

    def _spread(self) -> "Patches":
        """The same where picked rows have values of their own."""
        if self._channels is None:
            return self
        own = self.values[:, 0, self._channels].unsqueeze(2)
        return Patches(own, self.grid, self._shape, picked=self._picked, clean=self._clean)

    def _rows(self, numbers: Tensor) -> Tensor:
        """Numbers of each row from those as ``values`` have them, (n, positions or 1, channels), as (n, rows)."""
        if self._channels is not None:
            return numbers[:, 0, self._channels]
        if self._picked is None:
            numbers = numbers.expand(-1, self.grid.size[0] * self.grid.size[1], -1)
        return numbers.transpose(1, 2).flatten(1)

    def _product(self, values: Tensor, z: Tensor) -> Tensor:
        """The sum of values·z over each window, z (n, *node), as (n, rows)."""
        column = self.windows(z).flatten(2)
        if values.shape[:2] == (1, 1):
            return self._rows(column @ values[0, 0].flatten(1).mT)
        return self._rows((values.flatten(3) @ column.unsqueeze(3)).squeeze(3))

    def _reach(self) -> Pair:
        """How far a window reaches from where it would start without padding."""
        return self.window[0] - self.grid.before[0], self.window[1] - self.grid.before[1]

    def _widened(self, before: Pair, reach: Pair) -> Tensor:
        """The values on windows that start earlier and reach further, with zeros there."""
        (top, left), (bottom, right) = (
            (before[i] - self.grid.before[i] for i in range(2)),
            (reach[i] - self._reach()[i] for i in range(2)),
        )
        return functional.pad(self.values, (left, right, top, bottom))

    def _with(
        self,
        values: Tensor,
        *,
        grid: Grid | None = None,
        shape: tuple[int, ...] | None = None,
        clean: bool | None = None,
    ) -> "Patches":
        """The same rows with other values."""
        return Patches(
            values,
            self.grid if grid is None else grid,
            self._shape if shape is None else shape,
            picked=self._picked,
            channels=self._channels,
            clean=self._clean if clean is None else clean,
        )


def _transposed(kernel: Kernel, windows: Tensor, size: int) -> Tensor:
    """The transposed convolution of windows (many, channels, height, width), each to ``size`` values."""

    def spread(each: Tensor) -> Tensor:
        return functional.conv_transpose2d(
            each, kernel.weight, None, kernel.stride, 0, 0, kernel.groups, kernel.dilation
        )

    entries = windows[0].numel()
    if len(windows) <= entries or entries * size > _AS_MATRIX:
        return spread(windows)
    units = identity(entries, windows).unflatten(1, windows.shape[1:])
    matrix = spread(units)
    found: Tensor = (windows.flatten(1) @ matrix.flatten(1)).unflatten(1, matrix.shape[1:])
    return found


def _pairwise_max(first: Pair, second: Pair) -> Pair:
    return max(first[0], second[0]), max(first[1], second[1])
