"""What every family promises: the spec's numbers, radii that are never above the true ones, draws of its law."""

import math
import random
from decimal import Decimal

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from rs_plugins.core.noise import GaussianNoise, make_noise
from rs_plugins.core.noise_families.gaussian_linf import GaussianLinfNoise
from rs_plugins.core.noise_families.laplace import LaplaceNoise
from rs_plugins.core.noise_families.uniform import UniformLinfNoise, UniformNoise
from rs_plugins.errors import InputError

FAMILIES = [GaussianNoise, GaussianLinfNoise, LaplaceNoise, UniformNoise, UniformLinfNoise]
IMAGE = (3, 32, 32)
DRAWN = random.Random(1)
PROBABILITIES = [
    *(0.5 + 2.0**-k for k in range(3, 54, 5)),
    *(1 - 2.0**-k for k in range(3, 54, 5)),
    *(1 - 1e-16, math.nextafter(1, 0)),
    *(DRAWN.uniform(0.5, 1) for _ in range(60)),
]
# At sigma = 1 and 3072 values: probability → Gaussian l2, Laplace l1, uniform l1, uniform linf, Gaussian linf.
GOLDEN = {
    0.6: (0.253347, 0.157786, 0.346410, 1.188064e-4, 4.570938e-3),
    0.75: (0.674490, 0.490129, 0.866025, 3.243858e-4, 1.216928e-2),
    0.9: (1.281552, 1.138044, 1.385641, 5.759781e-4, 2.312200e-2),
    0.99: (2.326348, 2.766218, 1.697410, 7.592052e-4, 4.197242e-2),
    0.999: (3.090232, 4.394392, 1.728587, 7.792779e-4, 5.575458e-2),
}
COLUMNS = [GaussianNoise, LaplaceNoise, UniformNoise, UniformLinfNoise, GaussianLinfNoise]


@pytest.fixture(autouse=True)
def eighty_digits():
    with mpmath.workdps(80):
        yield


def quantile(p):
    """Φ⁻¹ of a number of mpmath."""
    far = mpmath.mpf(stats.norm.ppf(float(p)))
    return mpmath.findroot(lambda x: mpmath.erfc(-x / mpmath.sqrt(2)) / 2 - p, far) if p != 0.5 else mpmath.mpf(0)


def true_radius(family, p, rest, sigma, d):
    """The radius at which a class with p and one with the rest may change places, by the papers' formulas."""
    p, rest, sigma = (mpmath.mpf(value) for value in (p, rest, sigma))
    laplace, half = sigma / mpmath.sqrt(2), mpmath.sqrt(3) * sigma
    if family in (GaussianNoise, GaussianLinfNoise):
        l2 = sigma / 2 * (quantile(p) - quantile(rest))
        return l2 if family is GaussianNoise else l2 / mpmath.sqrt(d)
    if family is LaplaceNoise:
        return max(laplace / 2 * mpmath.log(p / rest), -laplace * mpmath.log(1 - p + rest))
    if family is UniformNoise:
        return half * (p - rest)
    return 2 * half * (1 - (1 - (p - rest) / 2) ** (mpmath.mpf(1) / d))


@pytest.mark.parametrize("p", GOLDEN)
@pytest.mark.parametrize("sigma", [1.0, 0.25])
def test_radii_of_the_spec(p, sigma):
    for family, radius in zip(COLUMNS, GOLDEN[p], strict=True):
        digits = 6 if family in (GaussianNoise, LaplaceNoise, UniformNoise) else 6 - math.floor(math.log10(radius))
        found = make_noise(family, sigma, IMAGE).radius(p) / sigma
        assert found == pytest.approx(radius, abs=1.1 * 10.0**-digits), family


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("shape", [IMAGE, (5,)], ids=str)
def test_no_radius_is_above_the_true_one(family, shape):
    for p in PROBABILITIES:
        sigma = DRAWN.choice([0.1, 0.25, 0.5, 1.0])
        radius = make_noise(family, sigma, shape).radius(p)
        exact = true_radius(family, p, 1 - mpmath.mpf(p), sigma, math.prod(shape))
        assert 0 < radius <= exact, (p, sigma)
        assert mpmath.mpf(repr(radius)) <= exact, "as printed"
        assert radius >= exact * (1 - mpmath.mpf(2) ** -45), (p, sigma)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_radius_between_two_bounds_is_above_the_true_one(family):
    for _ in range(60):
        p, rest = sorted((DRAWN.random(), DRAWN.uniform(0, 0.5) ** 3), reverse=True)
        radius = make_noise(family, 0.3, IMAGE).radius_between(p, rest)
        exact = true_radius(family, p, rest, 0.3, 3072)
        assert radius <= exact
        assert radius == pytest.approx(float(exact), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_between_p_and_its_complement_is_the_radius_of_p(family):
    noise = make_noise(family, 0.5, IMAGE)
    for p in (0.5, 0.625, 0.75, 0.9375):
        assert noise.radius_between(p, 1 - p) == pytest.approx(noise.radius(p), rel=1e-13, abs=1e-16)
    assert noise.radius_between(0.4, 0.4) == 0


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_the_probability_of_a_radius_buys_it(family):
    """By the exact formula, so the rounding is upwards; and the next smaller numbers do not, so it is no more."""
    noise = make_noise(family, 0.5, IMAGE)
    reach = noise.radius(0.999)
    assert noise.probability(0.0) in (0.5, math.nextafter(0.5, 1))
    for radius in [reach * share for share in (1e-6, 0.01, 0.3, 0.5, 0.77, 1.0)]:
        p = noise.probability(radius)
        assert true_radius(family, p, 1 - mpmath.mpf(p), 0.5, 3072) >= radius
        less = p - 4e-16
        assert less < 0.5 or true_radius(family, less, 1 - mpmath.mpf(less), 0.5, 3072) < radius


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_no_probability_of_a_radius_is_too_small(family):
    source = random.Random(3)
    for d in (2, 3, 3072):
        noise = make_noise(family, 0.5, (d,))
        for _ in range(150):
            radius = noise.radius(0.995) * source.random() ** 3
            p = noise.probability(radius)
            assert true_radius(family, p, 1 - mpmath.mpf(p), 0.5, d) >= radius


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_p_equal_to_one_half_and_to_one_buy(family):
    noise, unbounded = make_noise(family, 0.5, IMAGE), family not in (UniformNoise, UniformLinfNoise)
    assert noise.radius(0.5) == 0
    assert noise.probability(1e6) == 1
    assert math.isinf(noise.radius(1.0)) == unbounded
    if not unbounded:
        exact = true_radius(family, 1, 0, 0.5, 3072)
        assert exact * (1 - mpmath.mpf(2) ** -50) <= noise.radius(1.0) <= exact


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("p", [0.4999, -1, 1.1, float("nan")], ids=str)
def test_below_one_half_nothing_is_certified(family, p):
    with pytest.raises(InputError, match=r"p_lower: expected a probability in \[1/2, 1\], got"):
        make_noise(family, 0.5, IMAGE).radius(p)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_what_is_impossible_is_refused(family):
    for sigma in (0, -1, float("nan"), float("inf"), "x"):
        with pytest.raises(InputError, match="sigma: expected a finite number > 0, got"):
            family(sigma)
    for p_lower, runner_up in ((0.3, 0.4), (1.0, 0.2), (0.5, 0.0)):
        with pytest.raises(InputError, match=r"runner_up: expected a probability in \(0, p_lower = "):
            make_noise(family, 0.5, IMAGE).radius_between(p_lower, runner_up)


@pytest.mark.parametrize("family", [GaussianLinfNoise, UniformLinfNoise], ids=lambda family: family.__name__)
def test_a_certificate_in_linf_needs_the_shape_of_an_image(family):
    noise = family(0.5)
    message = "dimension: expected the number of values of an image for a radius in linf, got None"
    for ask in (lambda: noise.radius(0.9), lambda: noise.probability(0.1), lambda: noise.radius_between(0.9, 0.1)):
        with pytest.raises(InputError, match=message):
            ask()
    assert noise.for_shape((3, 4, 4)) == family(0.5, dimension=48)
    assert noise.for_shape((3, 4, 4)).for_shape((48,)).radius(0.9) == family(0.5, 48).radius(0.9)
    with pytest.raises(InputError, match=r"dimension: expected 9, as images of shape \(3, 3\) have, got 48"):
        family(0.5, 48).for_shape((3, 3))
    with pytest.raises(InputError, match="dimension: expected an integer >= 1, got 0"):
        family(0.5, 0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("radius", [5e-324, 1e-100, 1e-61, 1e-20])
def test_no_radius_above_zero_comes_with_one_half(family, radius):
    """At 1/2 the class may lose at any distance, however small, also where 60 digits do not show it."""
    assert make_noise(family, 0.5, IMAGE).probability(radius) > 0.5
    assert make_noise(family, 0.5, IMAGE).probability(0.0) == 0.5


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_radius_is_no_negative_number(family):
    noise = make_noise(family, 0.5, IMAGE)
    for radius in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="radius: expected a finite number >= 0, got"):
            noise.probability(radius)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_numbers_of_numpy_are_taken(family):
    noise = make_noise(family, 0.5, IMAGE)
    assert noise.radius(np.float32(0.75)) == noise.radius(np.float64(0.75)) == noise.radius(0.75)
    assert noise.radius_between(np.float32(0.75), np.float32(0.25)) == noise.radius_between(0.75, 0.25)
    assert noise.probability(np.float32(0.125)) == noise.probability(0.125)
    assert type(noise.radius(np.float64(0.75))) is float


def test_names_and_norms():
    assert {(family.name, family.norm) for family in FAMILIES} == {
        ("gaussian", "l2"),
        ("gaussian-linf", "linf"),
        ("laplace", "l1"),
        ("uniform", "l1"),
        ("uniform-linf", "linf"),
    }


LAWS = {
    GaussianNoise: stats.norm(),
    GaussianLinfNoise: stats.norm(),
    LaplaceNoise: stats.laplace(scale=0.5**0.5),
    UniformNoise: stats.uniform(-(3**0.5), 2 * 3**0.5),
    UniformLinfNoise: stats.uniform(-(3**0.5), 2 * 3**0.5),
}


@pytest.mark.parametrize("family", LAWS, ids=lambda family: family.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_draws_are_of_the_law(family, dtype):
    sigma = 0.25
    out = torch.empty(40_000, dtype=dtype)
    drawn = family(sigma).draw_(out, torch.Generator().manual_seed(5))
    assert drawn is out
    values = drawn.double().numpy() / sigma
    if dtype != torch.float16:  # which has too few numbers to be called continuous
        assert stats.kstest(values, LAWS[family].cdf).pvalue > 1e-3
    kurtosis = float(LAWS[family].stats("k")) + 3
    assert abs(values.mean()) < 5 / 200
    assert abs((values**2).mean() - 1) < 5 * math.sqrt(kurtosis - 1) / 200
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / 200


@pytest.mark.parametrize("family", LAWS, ids=lambda family: family.__name__)
def test_draws_come_from_the_generator_alone(family):
    before = torch.get_rng_state()
    one, same, other = (family(1.0).draw_(torch.empty(50), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sigma", [0.25, 0.1, 1.0, 0.123])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_no_uniform_draw_is_outside_of_the_cube(sigma, dtype):
    drawn = UniformNoise(sigma).draw_(torch.empty(400_000, dtype=dtype), torch.Generator().manual_seed(2))
    farthest = Decimal(drawn.abs().max().item())
    assert 0 < Decimal(3).sqrt() * Decimal(sigma) - farthest < Decimal("0.01") * Decimal(sigma)


@pytest.mark.parametrize(("dtype", "farthest"), [(torch.float32, 24), (torch.float64, 53)], ids=str)
def test_no_laplace_draw_is_infinite(monkeypatch, dtype, farthest):
    """torch's uniform numbers from [-1, 1) include -1, about once in 2**24 draws in single precision."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high, generator: self.fill_(low))
    drawn = LaplaceNoise(2**0.5).draw_(torch.empty(3, dtype=dtype), torch.Generator())
    assert drawn.tolist() == pytest.approx([-farthest * math.log(2)] * 3, rel=1e-6)
