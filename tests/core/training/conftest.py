"""A small problem in float64 with given noise, on which objectives are compared with formulas image by image."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from rs_plugins.core.training.objective import Batch

PIXELS, CLASSES = 4, 3


class Known:
    """Hands out given noise (n, m, *input) and uniform numbers (n,), and remembers what was asked for."""

    def __init__(self, e, u=None):
        self.e, self.u, self.asked = e, u, []

    def noise(self, noise, x, samples):
        self.asked.append((noise, samples))
        assert self.e.shape[:2] == (len(x), samples)
        return self.e

    def uniform(self, x):
        assert len(self.u) == len(x)
        return self.u


def network(seed=0):
    """Return a network without batch normalisation: an image's logits do not depend on its neighbours."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


@dataclass
class Problem:
    """Images with pixels at both ends of the box, labels that are right and wrong, noise, and a network."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    u: torch.Tensor
    sigma: float = 0.5
    seen: list = field(default_factory=list)

    def noise(self, samples):
        source = torch.Generator().manual_seed(samples)
        return self.sigma * torch.randn(len(self.x), samples, PIXELS, generator=source, dtype=torch.float64)

    def known(self, samples):
        return Known(self.noise(samples), self.u)

    def value_and_gradient(self, loss):
        assert loss.shape == ()
        return loss.detach(), torch.autograd.grad(loss, list(self.model.parameters()))

    def agree(self, objective, formula, *, samples, epoch=0):
        """Compare ``objective`` with ``formula``, called with f, x, y, e and u where f takes one image."""
        draws = self.known(samples)
        found = self.value_and_gradient(objective(self.model, Batch(self.x, self.y, epoch), draws))
        expected = self.value_and_gradient(
            formula(lambda image: self.model(image.unsqueeze(0))[0], self.x, self.y, draws.e, self.u)
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert all(float(part.abs().max()) > 1e-4 for part in expected[1])
        (asked,) = draws.asked
        assert asked == (objective.noise, samples)
        return expected[0].item()


@pytest.fixture
def problem():
    source = torch.Generator().manual_seed(1)
    x = torch.rand(5, PIXELS, generator=source, dtype=torch.float64)
    x[:, 0], x[1, 1] = 0.0, 1.0
    model = network()
    y = model(x).argmax(dim=1).detach()
    y[3:] = (y[3:] + 1) % CLASSES
    return Problem(model, x, y, torch.rand(5, generator=source, dtype=torch.float64))


@pytest.fixture
def images():
    """Images whose neighbourhoods lie well within the box, in single precision, and their labels."""
    x = 0.4 + 0.2 * torch.rand(6, PIXELS, generator=torch.Generator().manual_seed(2))
    return x, torch.tensor([0, 1, 2, 0, 1, 2])
