"""The ResNets for CIFAR-10 of He et al. (2016), section 4.2: three stages of 16, 32 and 64 channels."""

from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from rs_plugins.core.checks import check_count
from rs_plugins.errors import InputError

Shortcut = Literal["pad", "conv"]

# What published checkpoints call the last layer.
_HEAD: dict[Shortcut, str] = {"pad": "linear", "conv": "fc"}


class CifarResNet(nn.Module):
    """A ResNet of 6n + 2 layers: (batch, channels, height, width), say 32x32 pixels, to logits (batch, classes).

    Args:
        depth: Number of layers, 6n + 2 for n blocks in each stage.
        classes: Number of logits.
        channels: Of the images.
        shortcut: What goes past the first block of the stages 2 and 3. ``"pad"``: every other pixel, new channels are
            zero (He et al.'s option A, no parameters). ``"conv"``: a 1x1 convolution with batch normalisation, as in
            the ResNet-110 of Cohen et al. (2019) and those who followed. Parameters are named as in the checkpoints
            published for either.

    Raises:
        InputError: If an argument has an impossible value.
    """

    def __init__(self, depth: int, *, classes: int = 10, channels: int = 3, shortcut: Shortcut = "conv") -> None:
        super().__init__()
        if check_count(depth, "depth", least=8) % 6 != 2:
            raise InputError(f"depth: expected 6n + 2 layers (8, 14, 20, …), got {depth}")
        if shortcut not in get_args(Shortcut):
            raise InputError(f"shortcut: expected one of {', '.join(map(repr, get_args(Shortcut)))}, got {shortcut!r}")
        self.conv1 = _conv(check_count(channels, "channels"), 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = stage(depth // 6, 16, 16, 1, shortcut)
        self.layer2 = stage(depth // 6, 16, 32, 2, shortcut)
        self.layer3 = stage(depth // 6, 32, 64, 2, shortcut)
        self._head = _HEAD[shortcut]
        self.add_module(self._head, nn.Linear(64, check_count(classes, "classes", least=2)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, classes) of images (batch, channels, height, width)."""
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = getattr(self, self._head)(x.mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation, and a shortcut around them."""

    def __init__(self, inside: int, outside: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv(inside, outside, stride)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = _conv(outside, outside)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = _shortcut(inside, outside, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the block makes of (batch, inside, height, width): (batch, outside, height / stride, …)."""
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.downsample(x))


class Pad(nn.Module):
    """Every ``stride``-th pixel in each direction, between ``new`` channels of zeros, half of them on each side."""

    def __init__(self, new: int, stride: int) -> None:
        super().__init__()
        self.new, self.stride = new, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, channels + new, height / stride, width / stride), rounded up."""
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))

    def extra_repr(self) -> str:
        """Return the settings, for the printed form."""
        return f"new={self.new}, stride={self.stride}"


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, stride, 1, bias=False)


def stage(blocks: int, inside: int, outside: int, stride: int, shortcut: Shortcut) -> nn.Sequential:
    """Return ``blocks`` of them, the first of which makes ``outside`` channels of ``inside`` in steps of ``stride``."""
    first = Block(inside, outside, stride, shortcut)
    return nn.Sequential(first, *(Block(outside, outside, 1, shortcut) for _ in range(blocks - 1)))


def _shortcut(inside: int, outside: int, stride: int, shortcut: Shortcut) -> nn.Module:
    if inside == outside and stride == 1:
        return nn.Identity()
    if shortcut == "pad":
        return Pad(outside - inside, stride)
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
