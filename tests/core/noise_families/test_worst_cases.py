"""Classifiers of known probabilities and distances to the next class: no certificate goes beyond the distance."""

import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import norm
from torch import nn

from rs_plugins import Anytime, AtRadius, FixedBudget, OnGrid, certify
from rs_plugins.core.noise import GaussianNoise, make_noise
from rs_plugins.core.noise_families.gaussian_linf import GaussianLinfNoise
from rs_plugins.core.noise_families.laplace import LaplaceNoise
from rs_plugins.core.noise_families.uniform import UniformLinfNoise, UniformNoise
from rs_plugins.errors import InputError

SIGMA = 0.3
S_LAPLACE, S_UNIFORM = SIGMA / math.sqrt(2), math.sqrt(3) * SIGMA
DISTANCES = [0.01, 0.1, 0.25, 0.4]
LESS = 1 - 1e-12  # a probability that was computed in floating point may be too large by its last digits


def uniform_cdf(t):
    return min(1.0, (t + S_UNIFORM) / (2 * S_UNIFORM))


def laplace_cdf(t):
    return 1 - math.exp(-t / S_LAPLACE) / 2


@pytest.mark.parametrize("t", DISTANCES)
@pytest.mark.parametrize(("family", "cdf"), [(LaplaceNoise, laplace_cdf), (UniformNoise, uniform_cdf)])
def test_a_threshold_on_one_coordinate_is_the_worst_case_of_l1(family, cdf, t):
    """It turns where the coordinate has gone t, that is at the l1 distance t: certified is that and no more."""
    radius = family(SIGMA).radius(cdf(t) * LESS)
    assert radius <= t
    assert radius == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("t", DISTANCES)
def test_a_sum_of_two_coordinates_is_further_off_than_certified(t):
    """e1 + e2 <= t turns at the l1 distance t, and at t/2 in linf; here are the tails of sums of two draws."""
    laplace = math.exp(-t / S_LAPLACE) * (2 + t / S_LAPLACE) / 4
    uniform = (2 * S_UNIFORM - t) ** 2 / (8 * S_UNIFORM**2)
    assert 0.5 * t < LaplaceNoise(SIGMA).radius(1 - laplace) < t
    assert 0.5 * t < UniformNoise(SIGMA).radius(1 - uniform) < t
    assert 0.25 * t < UniformLinfNoise(SIGMA, 2).radius(1 - uniform) < t / 2


@pytest.mark.parametrize(("d", "t"), [(1, 0.2), (2, 0.1), (3, 0.08), (50, 0.004)])
def test_the_worst_case_of_uniform_noise_in_linf(d, t):
    """It names another class on all noise that the cube around x lacks and that around x + (r, …, r) has.

    And on a slab of both, of probability 1 - p. So at x the class has p, and at x + (r, …, r) what both share, less
    that slab. Exact fractions, of a cube of side 1.
    """
    moved = Fraction(t) / Fraction(2 * S_UNIFORM)
    shared = (1 - moved) ** d
    p = Fraction(3, 2) - shared
    slab = 1 - p
    assert 0 < slab < shared
    assert shared - slab == Fraction(1, 2)  # the tie is at t
    radius = UniformLinfNoise(SIGMA, d).radius(float(p) * LESS)
    assert radius <= t
    assert radius == pytest.approx(t, rel=1e-8)


@pytest.mark.parametrize("d", [1, 4, 3072])
@pytest.mark.parametrize("t", DISTANCES)
def test_linear_classifiers_under_gaussian_noise(d, t):
    """The half-space w·x <= b at margin m turns at m/‖w‖₂ in l2 and at m/‖w‖₁ in linf; P is Φ(m/(sigma·‖w‖₂))."""
    p = float(norm.cdf(t / SIGMA)) * LESS
    assert GaussianNoise(SIGMA).radius(p) <= t
    assert GaussianNoise(SIGMA).radius(p) == pytest.approx(t, rel=1e-9)
    equal = t / math.sqrt(d)  # all weights as large: m = t·√d and ‖w‖₁ = d
    assert GaussianLinfNoise(SIGMA, d).radius(p) <= equal
    assert GaussianLinfNoise(SIGMA, d).radius(p) == pytest.approx(equal, rel=1e-9)
    w = 1 + torch.rand(d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    unequal = t * float(w.norm() / w.sum())
    assert GaussianLinfNoise(SIGMA, d).radius(p) <= unequal * (1 + 1e-12)


class Threshold(nn.Module):
    """Class 1 where the first of four values is below 1/2, else class 0."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        above = self.scale * (x.flatten(1)[:, :1] - 0.5)
        return torch.cat([above, -above], dim=1)


PLANS = {
    "fixed": FixedBudget(n=3000),
    "runner-up": FixedBudget(n=3000, runner_up=True),
    "at radius": AtRadius(0.05, n=3000),
    "on grid": OnGrid((0.0, 0.02, 0.05, 0.1), n=3000),
    "anytime": Anytime(n=3000),
}
FAMILIES = [GaussianNoise, GaussianLinfNoise, LaplaceNoise, UniformNoise, UniformLinfNoise]


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_certificates_of_every_plan_stay_within_the_distance(family, plan):
    """In each of the norms the threshold is as far as the first value is from it."""
    first = torch.tensor([0.2, 0.35, 0.45, 0.62, 0.9])
    images = torch.full((5, 1, 2, 2), 0.5)
    images[:, 0, 0, 0] = first
    found = list(certify(Threshold(), images, SIGMA, plan=plan, family=family))
    for certificate, distance in zip(found, (first - 0.5).abs().tolist(), strict=True):
        assert certificate.radius <= distance
        assert certificate.abstained or certificate.prediction == int(first[certificate.index] < 0.5)
    noise = make_noise(family, SIGMA, (1, 2, 2))
    assert {(c.made_with.family, c.made_with.norm, c.made_with.noise) for c in found} == {
        (noise.name, noise.norm, repr(noise))
    }
    within = [certificate.radius for certificate in found[::4]]  # the two that are furthest from the threshold
    assert min(within) >= 0.05 or family in (GaussianLinfNoise, UniformLinfNoise)
    assert min(within) > 0 or isinstance(plan, AtRadius)


def test_linf_radii_go_by_all_values_of_an_image():
    images = torch.full((1, 3, 4, 5), 0.1)
    (l2,) = certify(Threshold(), images, SIGMA, plan=FixedBudget(n=500))
    (linf,) = certify(Threshold(), images, SIGMA, plan=FixedBudget(n=500), family=GaussianLinfNoise)
    assert (linf.count, linf.made_with.noise) == (l2.count, "GaussianLinfNoise(sigma=0.3, dimension=60)")
    assert linf.radius == pytest.approx(l2.radius / math.sqrt(60), rel=1e-12)


def test_a_radius_out_of_reach_is_refused_before_any_work():
    with pytest.raises(InputError, match=r"radii: expected one that can be certified, got 0\.6: even if all agree"):
        certify(Threshold(), torch.zeros(1, 4), SIGMA, plan=AtRadius(0.6), family=UniformNoise)
    with pytest.raises(InputError, match=r"radii: expected one that can be certified, got 0\.2: even if all agree"):
        certify(Threshold(), torch.zeros(1, 4), SIGMA, plan=AtRadius(0.2), family=UniformLinfNoise)
