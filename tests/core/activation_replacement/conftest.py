"""Networks that call ReLU in every way, each beside the same formula with another activation written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """As in torchvision's ResNet-18: one ReLU module that works in place, called twice."""

    def __init__(self, inside, outside, stride, relu):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = relu()
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if inside != outside:
            self.downsample = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResidualNetwork(nn.Module):
    """ResNet-18's shape, a few channels wide: 9 ReLU modules, 17 calls."""

    def __init__(self, relu=lambda: nn.ReLU(inplace=True)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = relu()
        widths = (4, 4, 5, 6, 7)
        for number in range(1, 5):
            inside, outside = widths[number - 1], widths[number]
            blocks = (
                ResidualBlock(inside, outside, 1 + (number > 1), relu),
                ResidualBlock(outside, outside, 1, relu),
            )
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.fc = nn.Linear(7, 3)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Functions(nn.Module):
    """Calls ReLU by each of its names, and as a module."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        x = F.relu(self.first(x)) - 0.1
        x = torch.relu(x) - 0.2
        x = x.relu() - 0.1
        x = F.relu_(x) - 0.2
        x = torch.relu_(x) - 0.1
        x = x.relu_() - 0.2
        x = F.relu(x, inplace=True) - 0.1
        x = F.relu(input=x, inplace=False) - 0.2
        x = self.relu(x) - 0.1
        return self.last(self.relu(x))

    def written_out(self, x, activation):
        x = self.first(x)
        for number in range(9):
            x = activation(x) - (0.1, 0.2)[number % 2]
        return self.last(activation(x))


class Branching(Functions):
    """Goes one of two ways, by values."""

    def forward(self, x):
        x = F.relu(self.first(x))
        if x.sum() > 1:
            x = torch.Tensor.relu(x - 0.5)
        return self.last(self.relu(x))

    def written_out(self, x, activation):
        x = activation(self.first(x))
        if x.sum() > 1:
            x = activation(x - 0.5)
        return self.last(activation(x))


class Statements(Functions):
    """Calls ReLU in place and goes on with what it handed in; also a view, and a tensor that has another name."""

    def forward(self, x):
        x = self.first(x)
        x.relu_()
        x = x - 0.1
        x[:, 1:3].relu_()
        x = x - 0.1
        other = x
        x = F.relu(x, inplace=True)
        x = x - 0.1 + other
        self.relu(x)
        return self.last(x)

    def written_out(self, x, activation):
        x = activation(self.first(x)) - 0.1
        x = torch.cat([x[:, :1], activation(x[:, 1:3]), x[:, 3:]], dim=1) - 0.1
        x = activation(x)
        return self.last(activation(x - 0.1 + x))


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.fixture
def networks():
    """Return the classes, by name; made with the same initial weights each time."""
    kinds = {kind.__name__: kind for kind in (ResidualNetwork, Functions, Branching, Statements)}
    return {name: lambda *args, kind=kind: seeded(lambda: kind(*args)) for name, kind in kinds.items()}


@pytest.fixture
def vectors():
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def encoder():
    layer = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))
    return nn.Sequential(layer, nn.Flatten(), seeded(lambda: nn.Linear(40, 3))).eval()
