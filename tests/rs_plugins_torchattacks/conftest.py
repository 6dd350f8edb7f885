from contextlib import contextmanager

import pytest
import torch
from torch import nn

MEAN, STD = [0.4, 0.5], [0.2, 0.25]
CLASSES = 5
BATCHNORM, DROPOUT = 1, 3  # where they are in `cnn`


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture
def cnn():
    """A network with everything whose mode matters, for images (n, 2, 6, 6), of five classes."""
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(64, CLASSES),
        )
    )


@pytest.fixture
def mlp():
    """A network for vectors (n, 7), of five classes."""
    return seeded(lambda: nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, CLASSES)))


@pytest.fixture
def x():
    return torch.rand(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def y():
    return torch.tensor([0, 4, 2, 1])


class Normalise(nn.Module):
    def forward(self, x):
        return (x - torch.tensor(MEAN).reshape(1, 2, 1, 1)) / torch.tensor(STD).reshape(1, 2, 1, 1)


class Denormalise(nn.Module):
    def forward(self, x):
        return x * torch.tensor(STD).reshape(1, 2, 1, 1) + torch.tensor(MEAN).reshape(1, 2, 1, 1)


@pytest.fixture
def normalisation():
    """Mean, standard deviation, the layer that they stand for, and its inverse."""
    return MEAN, STD, Normalise(), Denormalise()


class Fuse(nn.Module):
    """A layer that fails after so many calls, as memory does in the middle of an attack."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def forward(self, x):
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of memory")
        return x


@pytest.fixture
def undisturbed():
    """A context at whose end the model must be in every respect as it was at its start."""

    @contextmanager
    def watch(model):
        before = picture(model)
        yield
        assert picture(model) == before

    return watch


def picture(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad for p in model.parameters()],
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
    }


@pytest.fixture
def seen():
    """A context that yields the list of inputs (n, *input) that a module is given within it."""

    @contextmanager
    def spy(module):
        inputs = []
        hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
        try:
            yield inputs
        finally:
            hook.remove()

    return spy
