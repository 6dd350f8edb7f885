"""The pretrained CIFAR-10 ResNet-20 (He et al. 2016) and test images, where their files are there."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.data_sets.opening import open_data_set

SHARED = Path(__file__).parents[2] / "shared"
DATA = Path(os.environ.get("RS_PLUGINS_DATA", SHARED / "data"))
MODELS = Path(os.environ.get("RS_PLUGINS_MODELS", SHARED / "models"))


class Normalise(nn.Module):
    """Subtracts the mean of the training images and divides by their standard deviation, per channel."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std  # type: ignore[no-any-return]


class Block(nn.Module):
    """Two convolutions and a shortcut without parameters (option A: every other pixel, new channels are zero)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.new = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new:
            shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + shortcut)


class ResNet20(nn.Module):
    """He et al.'s CIFAR ResNet with 3 blocks in each of 3 stages: (n, 3, 32, 32) to logits (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inside, outside) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            first = Block(inside, outside, stride=1 if stage == 1 else 2)
            self.add_module(f"layer{stage}", nn.Sequential(first, *(Block(outside, outside, 1) for _ in range(2))))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def cifar10_resnet20(images: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network with its normalisation, in eval mode, the first ``images`` test images, and their labels.

    Raises:
        InputError: If the weights or the images are not there.
    """
    network = ResNet20()
    load_weights(network, MODELS / "cifar10_resnet20.safetensors")
    data = open_data_set(f"npz-jpeg:{DATA / 'cifar10_jpeg.npz'}")
    normalise = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    chosen = list(range(images))
    return nn.Sequential(normalise, network).eval(), data.read(chosen), torch.tensor(data.labels[:images])
