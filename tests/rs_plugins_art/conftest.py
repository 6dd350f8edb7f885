import pytest
import torch
from torch import nn

CLASSES = 4
SHAPE = (2, 6, 6)


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """On tensors this small, threads that wait for each other on a busy machine take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def cnn(scale=1.0):
    """A network with everything whose mode matters, for images (n, 2, 6, 6), of four classes; logits times scale."""
    network = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, CLASSES)
        )
    ).eval()
    with torch.no_grad():
        network[-1].weight.mul_(scale)
    return network


def mlp():
    """A network for vectors (n, 7), of four classes."""
    return seeded(lambda: nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, CLASSES))).eval()


class Recorder(nn.Module):
    """Passes on to a network and remembers the batches it was given."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.batches = []

    def forward(self, x):
        self.batches.append(x.detach().clone())
        return self.network(x)

    @property
    def inputs(self):
        return sum(map(len, self.batches))

    def seen(self):
        """Return all inputs seen, in one tensor, and forget them."""
        batches, self.batches = torch.cat(self.batches), []
        return batches


class Sharp(nn.Module):
    """Two classes, split where x·direction = threshold: under noise sigma, P(class 1) = Φ((x·d - t)/(sigma·|d|))."""

    def __init__(self, direction, threshold):
        super().__init__()
        self.register_buffer("direction", torch.as_tensor(direction))
        self.threshold = threshold

    def forward(self, x):
        margin = x.flatten(1) @ self.direction - self.threshold
        return torch.stack([-margin, margin], dim=1)


@pytest.fixture
def x():
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1)).numpy()


@pytest.fixture
def y():
    import numpy as np

    return np.array([0, 3, 2, 1, 0])
