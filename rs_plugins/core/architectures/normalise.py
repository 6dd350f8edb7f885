"""Normalisation as the first layer of a network, so that noise goes on in pixels before it."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_positive
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.errors import InputError

_MOST_IMAGES = 10_000
_READ_AT_ONCE = 64


class Statistics(NamedTuple):
    """Mean and standard deviation of the pixels of each channel, pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


STATISTICS: Mapping[str, Statistics] = MappingProxyType(
    {
        "cifar10": Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "imagenet": Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
)


class Normalise(nn.Module):
    """Subtracts a mean and divides by a standard deviation, per channel: (n, channels, …) to the same shape.

    Both are buffers ``mean`` and ``std``, (channels,): they move with the module and are in its state_dict.

    Args:
        mean: What is subtracted, one number per channel, in pixels.
        std: What is divided by, one number > 0 per channel, in pixels; None only centres, as in the networks that
            Salman et al. (2019) trained from scratch.

    Raises:
        InputError: If a number is not finite, a standard deviation not above 0, or there are not as many of both.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float] | None = None) -> None:
        super().__init__()
        means = _numbers(mean, "mean")
        stds = [1.0] * len(means) if std is None else [check_positive(value, "std") for value in _numbers(std, "std")]
        if len(stds) != len(means):
            raise InputError(
                f"std: expected one number per channel, as many as in mean ({len(means)}), got {len(stds)}"
            )
        self.register_buffer("mean", torch.tensor(means))
        self.register_buffer("std", torch.tensor(stds))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (n, channels, …) normalised.

        Raises:
            InputError: If it has another number of channels.
        """
        if x.ndim < 2 or x.shape[1] != len(self.mean):
            raise InputError(f"x: expected shape (n, {len(self.mean)}, …) to normalise, got shape {tuple(x.shape)}")
        per_channel = (-1, *(1,) * (x.ndim - 2))
        return (x - self.mean.view(per_channel)) / self.std.view(per_channel)

    def extra_repr(self) -> str:
        """Return the numbers, for the printed form."""
        mean, std = (", ".join(f"{value:.6g}" for value in values.tolist()) for values in (self.mean, self.std))
        return f"mean=({mean}), std=({std})"


def statistics(data: DataSet) -> Statistics:
    """Return mean and standard deviation of each channel of ``data``, of at most 10,000 evenly spaced images.

    Raises:
        InputError: If a channel is the same in all pixels, which cannot be normalised.
    """
    count = min(len(data), _MOST_IMAGES)
    positions = [number * len(data) // count for number in range(count)]
    first = _pixels(data, positions[:1])[:, :1]
    sums, squares = torch.zeros_like(first[:, 0]), torch.zeros_like(first[:, 0])
    for start in range(0, count, _READ_AT_ONCE):
        # less one pixel of each channel, so that the difference of two large numbers below loses no digits
        pixels = _pixels(data, positions[start : start + _READ_AT_ONCE]) - first
        sums += pixels.sum(1)
        squares += pixels.square().sum(1)
    pixels_per_channel = count * math.prod(data.shape[1:])
    mean = sums / pixels_per_channel
    std = (squares / pixels_per_channel - mean.square()).clamp(min=0).sqrt()
    for channel, value in enumerate(std.tolist()):
        if not value:
            raise InputError(f"data: {data.name}: channel {channel} is the same in all pixels, so it has no std > 0")
    return Statistics(tuple((mean + first[:, 0]).tolist()), tuple(std.tolist()))


def _pixels(data: DataSet, positions: list[int]) -> Tensor:
    """Return the pixels of each channel, (channels, pixels), float64."""
    return data.read(positions).double().transpose(0, 1).flatten(1)


def _numbers(values: Sequence[float], name: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected one number per channel, got {values!r}") from None
    if isinstance(values, str) or not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"{name}: expected one finite number per channel, got {values!r}")
    return numbers
