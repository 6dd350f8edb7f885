"""Gaussian training: cross-entropy on one fresh noisy copy of each image (Cohen et al. 2019)."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rs_plugins.core.noise import Family, GaussianNoise, make_noise
from rs_plugins.core.training.loop import Objective


def plain(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean cross-entropy on the images as they are; ``generator`` is not used."""
    return cross_entropy(model(x), y)


def gaussian(sigma: float, family: Family = GaussianNoise) -> Objective:
    """Return the objective E[CE(f(x + e), y)], one draw e per image and step, ``sigma`` in pixels.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0.
    """
    noise = make_noise(family, sigma)

    def objective(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return cross_entropy(model(x + noise.draw_(torch.empty_like(x), generator)), y)

    return objective
