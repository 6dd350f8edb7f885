"""The plain convolutional networks of certified training: CNN3, CNN5, CNN7.

Layers and widths are those of public code for such training (CTBench); that the networks of Balauca et al. (2024) with
these names are the same is likely, and not known to us. Kernels of 3 and 4 pixels have a padding of 1, those of 5 one
of 2, as is usual there: a layer of stride 1 keeps the size, one of stride 2 halves it. Bounds grow with depth, so there
is no pooling and, but in CNN7, no batch normalisation.
"""

from itertools import pairwise

from torch import nn

from rs_plugins.core.checks import check_count, check_positive
from rs_plugins.errors import InputError

_Layer = tuple[int, int, int]  # kernel, stride, channels
_CNN3 = ((5, 2, 16), (4, 2, 32))
_CNN5 = ((3, 1, 16), (4, 2, 16), (4, 2, 32))
_CNN7 = ((3, 1, 64), (3, 1, 64), (3, 2, 128), (3, 1, 128), (3, 1, 128))
_HIDDEN = 512


def cnn3(*, classes: int = 10, channels: int = 1, size: int = 28, width: float = 1.0) -> nn.Sequential:
    """Return two convolutions (5×5, stride 2, 16 channels; 4×4, stride 2, 32) and a linear layer, ReLU between.

    Args:
        classes: Number of logits.
        channels: Of the images.
        size: Their height and width.
        width: What the numbers of channels inside are multiplied by.

    Raises:
        InputError: If a setting has an impossible value.
    """
    return _network(_CNN3, 0, classes, channels, size, width)


def cnn5(*, classes: int = 10, channels: int = 1, size: int = 28, width: float = 1.0) -> nn.Sequential:
    """Return three convolutions (3×3, stride 1, 16 channels; 4×4, stride 2, 16; the same, 32), 512 neurons, logits.

    Args:
        classes: Number of logits.
        channels: Of the images.
        size: Their height and width.
        width: What the numbers of channels inside, and of hidden neurons, are multiplied by.

    Raises:
        InputError: If a setting has an impossible value.
    """
    return _network(_CNN5, _HIDDEN, classes, channels, size, width)


def cnn7(*, classes: int = 10, channels: int = 1, size: int = 28, width: float = 1.0) -> nn.Sequential:
    """Return five convolutions of 3×3 (64, 64, 128 with stride 2, 128, 128 channels), 512 neurons, logits.

    Each hidden layer is followed by batch normalisation, before its ReLU.

    Args:
        classes: Number of logits.
        channels: Of the images.
        size: Their height and width.
        width: What the numbers of channels inside, and of hidden neurons, are multiplied by.

    Raises:
        InputError: If a setting has an impossible value.
    """
    return _network(_CNN7, _HIDDEN, classes, channels, size, width, normalised=True)


def _network(
    layers: tuple[_Layer, ...],
    hidden: int,
    classes: int,
    channels: int,
    size: int,
    width: float,
    *,
    normalised: bool = False,
) -> nn.Sequential:
    classes, side = check_count(classes, "classes", least=2), check_count(size, "size")
    channels, width = check_count(channels, "channels"), check_positive(width, "width")
    wide = [channels, *(_scaled(number, width) for _, _, number in layers)]
    parts: list[nn.Module] = []
    for (kernel, stride, _), (before, after) in zip(layers, pairwise(wide), strict=True):
        parts.append(nn.Conv2d(before, after, kernel, stride, padding=(kernel - 1) // 2))
        parts += [nn.BatchNorm2d(after), nn.ReLU()] if normalised else [nn.ReLU()]
        side = (side + 2 * ((kernel - 1) // 2) - kernel) // stride + 1
        if side < 1:
            raise InputError(f"size: images of {size} by {size} pixels are too small for the network")
    parts.append(nn.Flatten())
    flat = wide[-1] * side**2
    if hidden:
        neurons = _scaled(hidden, width)
        parts.append(nn.Linear(flat, neurons))
        parts += [nn.BatchNorm1d(neurons), nn.ReLU()] if normalised else [nn.ReLU()]
        flat = neurons
    return nn.Sequential(*parts, nn.Linear(flat, classes))


def _scaled(number: int, width: float) -> int:
    return max(1, round(number * width))
