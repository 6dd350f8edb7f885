"""The attack on certificates in floating point (Jin et al. 2022, Voráček & Hein 2023), made again."""

import math

import pytest
import torch
from torch import nn

from rs_plugins import FixedBudget, certify
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.lattice import LatticeGaussianNoise

SIGMA, PLAN = 0.25, FixedBudget(n0=100, n=1000)
HERE, THERE = (torch.full((1, 16, 16), level / 255) for level in (128, 127))
DISTANCE = 16 / 255


class Telltale(nn.Module):
    """Class 0 if every pixel can be a sum, in floating point, of the pixel of ``image`` and something; else class 1.

    In real numbers every pixel can. In floating point, the sum of 128/255 and noise of about -1/2 has a last bit that
    can be told from that of 127/255 and noise.
    """

    def __init__(self, image):
        super().__init__()
        self.register_buffer("image", image)

    def forward(self, x):
        step = x - self.image
        possible = self.image + step == x
        for towards in (-math.inf, math.inf):
            possible |= self.image + step.nextafter(x.new_tensor(towards)) == x
        return one_hot(possible.flatten(1).all(1))


class LatticeTelltale(nn.Module):
    """Class 0 if every pixel is, in floating point, the sum of the pixel of ``image`` and a multiple of 1/255."""

    def __init__(self, image):
        super().__init__()
        self.register_buffer("image", image)

    def forward(self, x):
        steps = ((x - self.image) * 255).round() / 255
        return one_hot((self.image + steps == x).flatten(1).all(1))


def one_hot(ours):
    return torch.stack([ours, ~ours], dim=1).float()


class FloatSumNoise(GaussianNoise):
    """Noise on the grid, but added in floating point."""

    def draw_(self, out, generator):
        return LatticeGaussianNoise(self.sigma).draw_(out, generator)


def certificates(model, family):
    return list(certify(model, torch.stack([HERE, THERE]), SIGMA, family=family, plan=PLAN))


def test_they_are_closer_than_what_is_certified():
    assert float((HERE - THERE).norm()) == pytest.approx(DISTANCE, rel=1e-5)
    assert PLAN.n == 1000
    assert GaussianNoise(SIGMA).radius(0.9931) > 2 * DISTANCE  # what 1000 of 1000 votes buy


@pytest.mark.parametrize(
    ("family", "telltale"), [(GaussianNoise, Telltale), (FloatSumNoise, LatticeTelltale)], ids=["gaussian", "float sum"]
)
def test_noise_in_floating_point_is_fooled(family, telltale):
    here, there = certificates(telltale(HERE), family)
    assert (here.prediction, there.prediction) == (0, 1)
    # Each certificate says that the other image is of its own class, and each is sure of the contrary.
    assert min(here.radius, there.radius) > 2 * DISTANCE
    assert min(here.count, there.count) > 990


@pytest.mark.parametrize("telltale", [Telltale, LatticeTelltale])
@pytest.mark.parametrize("image", [HERE, THERE], ids=["here", "there"])
def test_lattice_noise_is_not(telltale, image):
    here, there = certificates(telltale(image), LatticeGaussianNoise)
    assert here.prediction == there.prediction != -1
    assert min(here.radius, there.radius) > DISTANCE


def test_nor_by_a_classifier_that_knows_every_bit():
    """Class 0 for those floats alone that 20,000 sums with the first image gave: the most that bits can tell.

    The smoothed classifier may then change, but by no more than the noise itself allows.
    """
    copies = torch.empty(20_000, 1)
    LatticeGaussianNoise(SIGMA).perturb_(copies, HERE[0, 0, :1], torch.Generator().manual_seed(1))
    known = copies.unique()

    class Knows(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("known", known)

        def forward(self, x):
            return one_hot(torch.isin(x[:, 0, 0, 0], self.known))

    here, there = certificates(Knows(), LatticeGaussianNoise)
    assert here.prediction == there.prediction == 0
    assert abs(here.count - there.count) < 20
    fooled = torch.empty(20_000, 1).normal_(0, SIGMA, generator=torch.Generator().manual_seed(1)) + HERE[0, 0, 0]
    assert len(known) < 600 < 15_000 < len(fooled.unique())
