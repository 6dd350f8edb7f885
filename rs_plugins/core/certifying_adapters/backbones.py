"""Networks that certifying adapters read images with, by size."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import relu

from rs_plugins.core.architectures.cifar_resnet import stage
from rs_plugins.core.checks import check_count
from rs_plugins.errors import InputError

_LARGE = 64  # images with more pixels a side are made smaller first


class Size(NamedTuple):
    """Channels of the first of four stages, which double from stage to stage, and blocks in each."""

    width: int
    blocks: int


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "tiny": Size(8, 1),
        "small": Size(16, 2),
        "medium": Size(32, 2),
        "paper": Size(64, 2),
    }
)


class ImageBackbone(nn.Module):
    """A ResNet without a head: (n, channels, height, width) to features (n, 8 · width).

    Four stages of ``width``, 2, 4 and 8 times as many channels; 64 channels and 2 blocks make the ResNet-18 that Deng
    et al. (2024) put beside a ResNet-110.

    Args:
        channels: Of the images.
        width: Channels of the first stage.
        blocks: In each stage.
        large: Whether the images are made 4 times smaller first, as in the ResNets for ImageNet.

    Raises:
        InputError: If an argument has an impossible value.
    """

    def __init__(self, channels: int, *, width: int = 16, blocks: int = 2, large: bool = False) -> None:
        super().__init__()
        check_count(blocks, "blocks")
        self.features = 8 * check_count(width, "width")
        kernel, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(check_count(channels, "channels"), width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.Sequential(
            *(stage(blocks, widths[place], widths[place + 1], min(place, 1) + 1, "conv") for place in range(4))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the features (n, 8 · width) of images (n, channels, height, width)."""
        x = self.stages(self.pool(relu(self.bn1(self.conv1(x)))))
        return x.mean(dim=(2, 3))


def image_backbone(shape: tuple[int, ...], size: str) -> ImageBackbone:
    """Return the backbone of that ``size`` for images of ``shape``, (channels, height, width).

    Raises:
        InputError: If there is no such size, or the images have another number of axes.
    """
    if size not in SIZES:
        raise InputError(f"size: expected one of {', '.join(map(repr, SIZES))}, got {size!r}")
    if len(shape) != 3:
        raise InputError(f"shape: expected images (channels, height, width), got {tuple(shape)}")
    return ImageBackbone(shape[0], **SIZES[size]._asdict(), large=max(shape[1:]) > _LARGE)
