import pytest
import torch
from scipy.stats import kstest, norm

import rs_plugins
from rs_plugins.core.noise import GaussianNoise, make_noise
from rs_plugins.core.noise_families.laplace import LaplaceNoise
from rs_plugins.core.noise_families.uniform import UniformLinfNoise
from rs_plugins.core_plugin import rs_plugins_components
from rs_plugins.errors import InputError

FAMILIES = [getattr(rs_plugins, c.target.partition(":")[2]) for c in rs_plugins_components() if c.kind == "noise"]
# Radii at sigma = 1: Φ⁻¹ of the probability, from tables.
GOLDEN = [(0.5, 0.0), (0.6, 0.253347), (0.75, 0.674490), (0.9, 1.281552), (0.99, 2.326348), (0.999, 3.090232)]


@pytest.mark.parametrize(("p", "radius"), GOLDEN)
@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_radius(p, radius, sigma):
    assert GaussianNoise(sigma).radius(p) == pytest.approx(sigma * radius, abs=1e-6)


@pytest.mark.parametrize("p", [0.4999, -1, 1.1, float("nan")])
def test_no_radius_below_one_half(p):
    with pytest.raises(InputError, match=r"p_lower: expected a probability in \[1/2, 1\], got"):
        GaussianNoise(1).radius(p)


@pytest.mark.parametrize("sigma", [0.12, 1.5])
def test_draws_are_gaussian(sigma):
    draws = GaussianNoise(sigma).draw_(torch.empty(20_000), torch.Generator().manual_seed(3))
    assert kstest(draws.numpy() / sigma, "norm").pvalue > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_draws_in_half_precision_have_tails(dtype):
    """They are those in single precision, rounded; torch's own of old on a CPU stop at 3.4 or 4 sigma."""
    drawn = GaussianNoise(0.5).draw_(torch.empty(300_007, dtype=dtype), torch.Generator().manual_seed(3))
    single = GaussianNoise(0.5).draw_(torch.empty(300_007), torch.Generator().manual_seed(3))
    assert torch.equal(drawn, single.to(dtype))
    assert drawn.abs().max() > 4.2 * 0.5


@pytest.mark.parametrize("sigma", [0, -1, float("nan"), float("inf"), "x"], ids=repr)
def test_sigma_is_checked(sigma):
    with pytest.raises(InputError, match="sigma: expected a finite number > 0, got"):
        GaussianNoise(sigma)


def test_a_family_must_offer_everything_a_certificate_needs():
    with pytest.raises(
        InputError, match=r"family: expected a noise family, got .*, whose noise has no name, norm, sigma"
    ):
        make_noise(lambda sigma: object(), 1.0)
    with pytest.raises(InputError, match=r"expected a noise family such as GaussianNoise, got \{'gaussian'\}$"):
        make_noise({"gaussian"}, 1.0)
    assert make_noise(GaussianNoise, 1) == GaussianNoise(1.0)


@pytest.mark.parametrize(
    ("family", "advice"),
    [
        *((family.name, f"pass the class, rs_plugins.{family.__name__}") for family in FAMILIES),
        ("cauchy", "pass a class, not a name"),
        (LaplaceNoise(0.25), "pass the class, LaplaceNoise: its sigma goes to sigma="),
        (UniformLinfNoise(0.25), "pass the class, UniformLinfNoise: its sigma goes to sigma="),
    ],
    ids=str,
)
def test_the_class_is_asked_for_where_it_is_not_given(family, advice):
    with pytest.raises(InputError) as caught:
        make_noise(family, 1.0)
    assert str(caught.value) == f"family: expected a noise family such as GaussianNoise, got {family!r}; {advice}"


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize("radius", [0.0, 0.25, 0.1, 0.75, 1.7])
def test_the_probability_of_a_radius_buys_it(sigma, radius):
    noise = GaussianNoise(sigma)
    p = noise.probability(radius)
    assert p == pytest.approx(norm.cdf(radius / sigma), rel=1e-14)
    assert p >= norm.cdf(radius / sigma)
    if p < 1:
        assert noise.radius(p) == pytest.approx(radius, rel=1e-5, abs=1e-12)


def test_radii_between_two_bounds():
    noise = GaussianNoise(0.5)
    assert noise.radius_between(0.8, 0.2) == pytest.approx(noise.radius(0.8), rel=1e-12)
    assert noise.radius_between(0.45, 0.3) == pytest.approx(0.25 * (norm.ppf(0.45) - norm.ppf(0.3)), rel=1e-12)
    assert noise.radius_between(0.4, 0.4) == 0
    for p_lower, runner_up in ((0.3, 0.4), (1.0, 0.2), (0.5, 0.0)):
        with pytest.raises(InputError, match="runner_up: expected a probability in"):
            noise.radius_between(p_lower, runner_up)
