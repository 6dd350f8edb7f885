"""Affine layers: what each makes of an interval, and of the coefficients of a linear bound on its output."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rs_plugins.core.relaxations.linear import Coefficients, Kernel
from rs_plugins.core.relaxations.regions import Ball, Interval, best
from rs_plugins.errors import ModelError

Statistics = Mapping[str, tuple[Tensor, Tensor]]


class Call(NamedTuple):
    """What one call hands to the layers besides their own parameters.

    Attributes:
        constants: Tensors of the model that do not depend on its input, by name.
        statistics: Mean and variance that a batch normalisation takes instead of its own, by module name.
        like: A tensor of the type and on the device of the computation.
    """

    constants: Mapping[str, Tensor]
    statistics: Statistics
    like: Tensor


Pulled = tuple[tuple[Coefficients, ...], Tensor | None]


class Affine(Protocol):
    """A layer that is affine in all its inputs together. Parameters are looked up at each call."""

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return an interval that holds the outputs for all inputs within ``inputs``."""

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return the coefficients of each input for those of the output, and what is added to the constant, or None."""


@dataclass(frozen=True)
class Convolution:
    """A convolution with input (n, *shape) and zero padding."""

    module: nn.Conv2d
    shape: tuple[int, ...]

    def kernel(self) -> Kernel:
        """Return the module's present parameters."""
        module = self.module
        stride, dilation = _pair(module.stride), _pair(module.dilation)
        before = after = (0, 0)
        if module.padding == "same":
            total = [step * (taps - 1) for step, taps in zip(dilation, module.kernel_size, strict=True)]
            before, after = _pair([pad // 2 for pad in total]), _pair([pad - pad // 2 for pad in total])
        elif module.padding != "valid":
            before = after = _pair(module.padding)
        return Kernel(module.weight, module.bias, stride, before, after, dilation, module.groups)

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return W c + b ± |W| r."""
        kernel = self.kernel()
        return mix(inputs[0], lambda x, weight, bias: kernel.apply(x, weight, bias), kernel.weight, kernel.bias)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return A W and A·b."""
        before, offset = coefficients.through_conv(self.kernel(), self.shape)
        return (before,), offset


@dataclass(frozen=True)
class FullyConnected:
    """A linear layer on the last dimension."""

    module: nn.Linear

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return W c + b ± |W| r."""
        return mix(inputs[0], nn.functional.linear, self.module.weight, self.module.bias)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return A W and A·b."""
        before, offset = coefficients.through_linear(self.module.weight, self.module.bias)
        return (before,), offset


@dataclass(frozen=True)
class Diagonal:
    """scale·z + shift, value by value.

    Attributes:
        numbers: Returns scale and shift in a call, either None (1 or 0) or with as many dimensions as the node, or 0.
    """

    numbers: Callable[[Call], tuple[Tensor | None, Tensor | None]]

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return scale·c + shift ± |scale|·r."""
        scale, shift = self.numbers(call)

        def moved(centre: Tensor) -> Tensor:
            centre = centre if scale is None else centre * scale
            return centre if shift is None else centre + shift

        def stretched(radius: Tensor) -> Tensor:
            return radius if scale is None else radius * scale.abs()

        (x,) = inputs
        ball = None if x.ball is None else Ball(moved(x.ball.centre), stretched(x.ball.scale))
        return Interval(moved(x.centre), stretched(x.radius), ball, x.mixed)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return A·scale and A·shift."""
        before, offset = coefficients.through_diagonal(*self.numbers(call))
        return (before,), offset


@dataclass(frozen=True)
class Reshape:
    """The same values, arranged otherwise: from (n, *inside) to (n, *outside)."""

    inside: tuple[int, ...]
    outside: tuple[int, ...]

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return both parts, rearranged."""

        def arranged(z: Tensor) -> Tensor:
            return z.reshape(len(z), *self.outside)

        (x,) = inputs
        ball = None if x.ball is None else Ball(arranged(x.ball.centre), arranged(x.ball.scale))
        return Interval(arranged(x.centre), arranged(x.radius), ball, x.mixed)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return the coefficients, rearranged."""
        if self.inside == self.outside:
            return (coefficients,), None
        return (coefficients.to_dense().reshaped(self.inside),), None


@dataclass(frozen=True)
class Dropout:
    """Dropout, which does nothing when ``module`` is in eval mode; ``where`` is its place, for the message."""

    module: nn.Module
    where: str

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return the interval as it is.

        Raises:
            ModelError: In train mode, where it is random.
        """
        self._check()
        return inputs[0]

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return the coefficients as they are.

        Raises:
            ModelError: In train mode, where it is random.
        """
        self._check()
        return (coefficients,), None

    def _check(self) -> None:
        if self.module.training:
            raise ModelError(
                f"model: {self.where}: bounds go through dropout in eval mode alone; it is in train mode (leave it "
                "out to train with bounds)"
            )


@dataclass(frozen=True)
class Combination:
    """A linear map with no negative entry and no offset, such as a mean: any function of torch that is one.

    Attributes:
        function: From (n, *shape) to the output; image by image.
        shape: Of the input, without the batch.
        kernel: Returns the convolution that it is, for numbers like a tensor's; None if it is none.
    """

    function: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    kernel: Callable[[Tensor], Kernel] | None = None

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return the map of both parts."""
        (x,) = inputs
        mixed = 2 if x.ball is not None else min(x.mixed + 1, 2)
        return Interval(self.function(x.centre), self.function(x.radius), mixed=mixed)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return the transposed map of A."""
        if self.kernel is not None:
            before, _ = coefficients.through_conv(self.kernel(call.like), self.shape)
            return (before,), None
        return (coefficients.to_dense().through_map(self.function, self.shape),), None


@dataclass(frozen=True)
class Sum:
    """The sum of two nodes of the same shape, or their difference."""

    minus: bool = False

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return the sum of centres and the sum of radii."""
        first, second = inputs
        centre = first.centre - second.centre if self.minus else first.centre + second.centre
        return Interval(centre, first.radius + second.radius, mixed=2)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return A for both, or A and -A."""
        return (coefficients, coefficients.negative() if self.minus else coefficients), None


@dataclass(frozen=True)
class Concatenation:
    """Several nodes one after the other along a dimension of the batch, with ``sizes`` there."""

    dim: int
    sizes: tuple[int, ...]

    def interval(self, call: Call, *inputs: Interval) -> Interval:
        """Return both parts, one after the other."""
        centre = torch.cat([x.centre for x in inputs], self.dim)
        return Interval(centre, torch.cat([x.radius for x in inputs], self.dim), mixed=2)

    def pull(self, call: Call, coefficients: Coefficients) -> Pulled:
        """Return the part of A that belongs to each."""
        return coefficients.to_dense().split(self.sizes, self.dim), None


def mix(x: Interval, layer: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> Interval:
    """Return W c + b ± |W| r; of an l2 ball also W c + b ± ‖row of W‖₂, whichever is tighter."""
    mixed = min(x.mixed + 1, 2)
    box = Interval(layer(x.centre, weight, bias), layer(x.radius, weight.abs(), None), mixed=mixed)
    if x.ball is None:
        return box
    centre, radius = layer(x.ball.centre, weight, bias), _root(layer(x.ball.scale.square(), weight.square(), None))
    upper = -best(-box.upper, -(centre + radius))
    return Interval.between(best(box.lower, centre - radius), upper, mixed=mixed)


def _root(squares: Tensor) -> Tensor:
    """Return the square root; its gradient at 0 is 0, not infinite."""
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)
