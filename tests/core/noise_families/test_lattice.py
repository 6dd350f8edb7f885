from bisect import bisect_right
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import mpmath
import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm
from torch import nn

import rs_plugins
from rs_plugins import Anytime, AtRadius, FixedBudget, OnGrid, SmoothedModel, certify, registry
from rs_plugins.core.confidence import clopper_pearson_lower
from rs_plugins.core.noise import GaussianNoise, make_noise
from rs_plugins.core.noise_families.lattice import InverseCdf, LatticeGaussianNoise, inverse_cdf
from rs_plugins.core.perturbing import NoiseOnGrid, perturb_
from rs_plugins.core.plans.protocol import Case, strongest_rival
from rs_plugins.core.procedures import BLOCK
from rs_plugins.core.streams import stream
from rs_plugins.core.training.gaussian import gaussian
from rs_plugins.core.training.objective import Batch, StreamDraws
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError, ModelWarning

Q = 2**60
SETTINGS = [(0.12, 255), (0.25, 255), (0.5, 255), (1.0, 255), (0.3, 510), (0.25, 16)]


def grid(*shape, levels=255, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels + 1, shape, generator=generator).float() / levels


def cut_points(sigma, levels=255):
    return inverse_cdf(sigma, levels).points.tolist()


# ---- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "inc_last", "values"), [(0.25, 1020, 1021), (0.5, 2040, 2041), (1.0, 3570, 3571)])
def test_golden_numbers(sigma, inc_last, values):
    cdf = inverse_cdf(sigma, 255)
    assert cdf.failing == Q - inc_last - 1
    assert len(cdf.points) + 1 == values
    assert cdf.least == -(values // 2)
    draws = cdf.of(torch.tensor([0, Q // 2, Q - 1]))
    assert draws.tolist() == [cdf.least, 0, -cdf.least]


def test_one_standard_deviation_is_64_levels_at_a_quarter():
    with mpmath.workprec(200):
        u = [int(Q * mpmath.ncdf(z)) for z in (-1, 1)]
    assert inverse_cdf(0.25, 255).of(torch.tensor(u)).tolist() == [-64, 64]


@pytest.mark.parametrize(("sigma", "levels"), SETTINGS)
def test_no_value_is_more_likely_than_it_should_be_and_the_rest_are_failures(sigma, levels):
    cdf = inverse_cdf(sigma, levels)
    ends = [min(max(point, 0), cdf.failing) for point in cdf.points.tolist()] + [cdf.failing]
    masses = np.diff([0, *ends])
    assert sum(masses.tolist()) + (Q - cdf.failing) == Q
    assert Q - cdf.failing <= 2 * levels * (max(1, int(6 * sigma)) + 1) + 1 < 2**16  # one for each threshold, and one
    with mpmath.workprec(200):
        edges = [Fraction(2 * i + 1) / (2 * levels * Fraction(sigma)) for i in range(cdf.least, -cdf.least)]
        lower = [Q * mpmath.ncdf(mpmath.mpf(x.numerator) / x.denominator) for x in edges if x < 0]
        below = [*lower, *(Q - mass for mass in reversed(lower))]
        exact = [high - low for low, high in zip([0, *below], [*below, mpmath.mpf(Q)], strict=True)]
        assert all(mass <= bound for mass, bound in zip(masses.tolist(), exact, strict=True))
        assert sum(bound - mass for mass, bound in zip(masses.tolist(), exact, strict=True)) < 2**16


def test_without_the_first_step_the_outermost_bin_would_be_too_likely():
    with mpmath.workprec(200):
        excess = (cut_points(1.0)[0] + 1) - Q * mpmath.ncdf(mpmath.mpf(2 * -1785 + 1) / 510)
        assert float(excess) == pytest.approx(0.015, abs=5e-4)


@pytest.mark.parametrize(("sigma", "levels"), SETTINGS)
def test_draws_are_the_loop_over_cut_points(sigma, levels):
    cdf, points = inverse_cdf(sigma, levels), cut_points(sigma, levels)
    near = {u for point in points for u in (point - 1, point, point + 1) if 0 <= u < Q}
    random = torch.randint(0, Q, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    u = [0, Q - 1, *near, *random]
    assert cdf.of(torch.tensor(u)).tolist() == [cdf.least + bisect_right(points, each) for each in u]
    few = u[:20] + random[:20]
    assert cdf.of(torch.tensor(few)).tolist() == [cdf.least + sum(point <= each for point in points) for each in few]


@pytest.mark.parametrize(("sigma", "levels"), SETTINGS)
def test_the_table_answers_only_where_16_bits_decide(sigma, levels):
    cdf = inverse_cdf(sigma, levels)
    first = torch.arange(2**16) << 44
    last = first + 2**44 - 1
    decided = (cdf.of(first) == cdf.of(last)) & (last < cdf.failing)
    assert torch.equal(cdf.table[decided], cdf.of(first)[decided])
    assert (cdf.table[~decided] == -(2**15)).all()
    assert not decided[-1]  # there the failures are
    assert decided.double().mean() > 0.9


@pytest.mark.parametrize(("sigma", "n"), [(0.25, 100_003), (1.0, 50_000)])
def test_a_lazy_draw_is_that_of_all_60_bits(sigma, n):
    cdf, generator, same = inverse_cdf(sigma, 255), torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    draws, failed = cdf.draw(n, generator)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=same)
    top = bits.view(torch.int16)[:n].long() + 2**15
    rest = torch.randint(0, 2**44, (n,), generator=torch.Generator().manual_seed(6))
    undecided = cdf.table[top] == -(2**15)
    rest[undecided] = torch.empty(int(undecided.sum()), dtype=torch.int64).random_(0, 2**44, generator=same)
    assert undecided.sum() > 100
    assert torch.equal(draws, cdf.of((top << 44) + rest))
    assert failed is None
    assert torch.equal(generator.get_state(), same.get_state())


@pytest.mark.parametrize(("sigma", "levels"), [(0.25, 255), (1.0, 255), (0.5, 1020)])
def test_the_drawn_law_is_the_exact_one(sigma, levels):
    """Chi-square of two million draws over all values with at least 20 expected; tolerance: p > 1e-3."""
    n = 2_000_000
    draws, _ = inverse_cdf(sigma, levels).draw(n, torch.Generator().manual_seed(2))
    reach = levels * (max(1, int(6 * sigma)) + 1)
    values = np.arange(-reach, reach + 1)
    edges = np.concatenate([[-np.inf], (values[:-1] + 0.5) / (levels * sigma), [np.inf]])
    expected = n * (norm.cdf(-edges[:-1]) - norm.cdf(-edges[1:]))
    observed = np.bincount(draws.numpy().astype(np.int64) + reach, minlength=len(values))
    usual = expected >= 20
    first, last = np.flatnonzero(usual)[[0, -1]]
    tails = [slice(None, first), slice(last + 1, None)]
    counts = np.concatenate([observed[usual], [observed[tail].sum() for tail in tails]])
    wanted = np.concatenate([expected[usual], [expected[tail].sum() for tail in tails]])
    assert usual.sum() > 400
    assert chisquare(counts, wanted * (n / wanted.sum())).pvalue > 1e-3


def test_draws_in_full_are_those_of_60_uniform_bits():
    cdf, source = Failing(0.25)._cdf, partial(torch.Generator().manual_seed, 8)
    draws, failed = cdf.draw_in_full(50_000, source())
    u = torch.randint(0, Q, (50_000,), generator=source())
    assert torch.equal(draws, cdf.of(u))
    assert torch.equal(failed, u >= cdf.failing)
    assert 2_000 < failed.sum() < 3_000  # one in 20
    assert u.max() > 0.9999 * Q


@pytest.mark.parametrize("below", [0, 1])
def test_failures_begin_at_one_number(monkeypatch, below):
    """The one that the bins leave over first: with it the outermost bin would be likelier than it should be."""
    cdf = inverse_cdf(0.25, 255)
    u = cdf.failing - below
    top, rest = divmod(u, 2**44)
    lanes = torch.tensor([top - 2**15] * 4, dtype=torch.int16).view(torch.int64)
    numbers = {(-(2**63), None): int(lanes), (0, 2**44): rest, (0, Q): u}
    monkeypatch.setattr(torch.Tensor, "random_", lambda self, low, high, generator: self.fill_(numbers[low, high]))
    draws, failed = cdf.draw(6, torch.Generator())
    assert draws.tolist() == cdf.draw_in_full(6, torch.Generator())[0].tolist() == [510] * 6
    assert (None if failed is None else failed.tolist()) == (None if below else [True] * 6)
    assert cdf.draw_in_full(6, torch.Generator())[1].tolist() == [below == 0] * 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_a_sum_is_one_float():
    noise, image = LatticeGaussianNoise(0.25), grid(3, 8, 8)
    out = torch.empty(64, 3, 8, 8, device="cuda")
    failed = noise.perturb_(out, image.cuda(), torch.Generator("cuda").manual_seed(0))
    draws, _ = noise._cdf.draw(out.numel(), torch.Generator("cuda").manual_seed(0))
    integers, floats = distinct_pairs((image * 255).round() + draws.view(out.shape).cpu(), out.cpu())
    assert len(np.unique(integers)) == len(np.unique(floats)) == len(integers) > 200
    assert not failed.any()
    assert (out.cpu() - image).std() == pytest.approx(0.25, rel=0.05)


def test_neighbouring_draws_are_independent():
    """Four come of one 64-bit number. Chi-square over the 16 patterns of signs of four; tolerance: p > 1e-3."""
    draws, _ = inverse_cdf(0.25, 255).draw(400_000, torch.Generator().manual_seed(3))
    signs = (draws.view(-1, 4) > 0).long() @ torch.tensor([1, 2, 4, 8])
    above = 1 - norm.cdf(0.5 / 255 / 0.25)
    ones = np.array([bin(pattern).count("1") for pattern in range(16)])
    expected = 100_000 * above**ones * (1 - above) ** (4 - ones)
    assert chisquare(signs.bincount(minlength=16).numpy(), expected).pvalue > 1e-3


# ---- the sum ---------------------------------------------------------------------------------------------------------


def distinct_pairs(integers, floats):
    """Two arrays: integers, and floats that came with them, each pair once."""
    pairs = np.unique(integers.flatten().double().numpy() + 1j * floats.flatten().double().numpy())
    return pairs.real, pairs.imag


@pytest.mark.parametrize(
    ("sigma", "levels", "dtype"),
    [(0.5, 255, torch.float32), (0.5, 255, torch.float64), (0.33, 255, torch.float32), (0.25, 510, torch.float32)],
)
def test_one_float_for_each_integer_sum(sigma, levels, dtype):
    """All 256 pixels under 1,003 draws each, whatever the place in memory: a quarter of a million pairs."""
    noise, source = LatticeGaussianNoise(sigma, levels), partial(torch.Generator().manual_seed, 7)
    pixels = torch.arange(0, levels + 1, levels // 255)
    out = torch.empty(1003, 256, dtype=dtype)
    assert noise.perturb_(out, pixels.to(dtype) / levels, source()) is None
    draws, _ = inverse_cdf(sigma, levels).draw(out.numel(), source())
    k = max(1, int(6 * sigma))
    sums = (pixels + draws.view(out.shape)).clamp(-k * levels, (k + 1) * levels)
    integers, floats = distinct_pairs(sums, out)
    assert len(np.unique(integers)) == len(np.unique(floats)) == len(integers) > 700
    exact = np.float32 if dtype == torch.float32 else np.float64
    assert np.array_equal(integers.astype(exact) / exact(levels), floats.astype(exact))
    if sigma == 0.33:  # three standard deviations from an end
        assert (integers.min(), integers.max()) == (-levels, 2 * levels)


@pytest.mark.parametrize(("k", "most", "several"), [(3, 28, 2235), (6, 47, 3800)])
def test_added_in_floating_point_a_sum_would_be_many_floats(k, most, several):
    """The defect of the reference code, by its own arithmetic: x = a/255 and e = b/255 - k - 1 in single precision."""
    a, b = torch.arange(256), torch.arange(510 * (k + 1) + 1)
    total = (a.float() / 255)[:, None] + (b.float() / 255 - k - 1)
    _, counts = np.unique(distinct_pairs(a[:, None] + b, total)[0], return_counts=True)
    assert (counts.max(), (counts > 1).sum()) == (most, several)


def test_an_image_of_its_own_for_each_copy():
    noise, images = LatticeGaussianNoise(0.25), grid(6, 2, 3)
    out = torch.empty(6, 2, 3)
    perturb_(noise, out, images, torch.Generator().manual_seed(1))
    draws = noise.draw_(torch.empty(6, 2, 3), torch.Generator().manual_seed(1))
    assert torch.equal((out * 255).round(), ((images + draws) * 255).round())
    assert not torch.equal(out, images + draws)


@pytest.mark.parametrize("towards", [0.0, 1.0])
def test_a_pixel_stands_for_the_point_that_it_is_next_to(towards):
    noise, source = LatticeGaussianNoise(0.25), partial(torch.Generator().manual_seed, 3)
    exact, beside = torch.empty(5, 256), torch.empty(5, 256)
    pixels = torch.arange(256) / 255
    noise.perturb_(exact, pixels, source())
    noise.perturb_(beside, pixels.nextafter(torch.tensor(towards)), source())
    assert torch.equal(exact, beside)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Bright(nn.Module):
    """Class 1 where the mean of the image is above one half."""

    def __init__(self):
        super().__init__()
        self.register_buffer("middle", torch.tensor(0.5))

    def forward(self, x):
        bright = x.flatten(1).mean(1) - self.middle
        return torch.stack([-bright, bright], dim=1)


def test_images_off_the_grid_are_refused():
    images = grid(300, 1, 2, 2)
    images[280, 0, 1, 0] = 0.3
    message = (
        r"images: expected pixels on the grid k/255, on which alone lattice-gaussian noise certifies, got 0\.3\d* at "
        r"\(0, 1, 0\) of image 1280; keep images in float32, round them, \(x \* 255\)\.round\(\) / 255, or give"
    )
    with pytest.raises(InputError, match=message):
        certify(Bright(), images, 0.25, family=LatticeGaussianNoise, indices=range(1000, 1300))
    with pytest.raises(InputError, match="images: expected pixels on the grid k/255"):
        SmoothedModel(Bright(), 0.25, family=LatticeGaussianNoise).votes(images, 10)
    rounded = (images * 255).round() / 255
    assert len(SmoothedModel(Bright(), 0.25, family=LatticeGaussianNoise).votes(rounded, 10)) == 300


@pytest.mark.parametrize("levels", [16, 255, 510])
def test_the_grid_is_that_of_the_levels(levels):
    noise = LatticeGaussianNoise(0.25, levels)
    for dtype in (torch.float32, torch.float64):
        noise.check_images((torch.arange(levels + 1).to(dtype) / levels)[None], [0])
    noise.check_images(grid(2, 3, levels=levels).nextafter(torch.tensor(2.0)), [0, 1])
    with pytest.raises(InputError, match=f"expected pixels on the grid k/{levels}, .* of image 4;"):
        noise.check_images(torch.full((1, 1), 0.4 / levels), [4])


def test_half_precision_is_too_coarse_for_the_grid():
    with pytest.raises(InputError, match=r"images: .*keep images in float32"):
        LatticeGaussianNoise(0.25).check_images((torch.arange(256) / 255).half()[None], [0])


def test_settings_are_checked():
    for sigma in (0, -1, float("nan"), "x"):
        with pytest.raises(InputError, match="sigma: expected a finite number > 0, got"):
            LatticeGaussianNoise(sigma)
    for levels in (0, 2.5, -255, "many"):
        with pytest.raises(InputError, match="levels: expected an integer >= 1, got"):
            LatticeGaussianNoise(0.25, levels)
    for sigma, levels in ((0.25, 10923), (1.0, 4096), (1e9, 1), (1e308, 255)):
        with pytest.raises(InputError, match=r"levels: expected at most 32767 / \(max\(1, int\(6 sigma\)\) \+ 2\)"):
            LatticeGaussianNoise(sigma, levels)
    LatticeGaussianNoise(1.0, 4095)
    assert isinstance(make_noise(LatticeGaussianNoise, 0.5), NoiseOnGrid)
    assert not isinstance(GaussianNoise(0.5), NoiseOnGrid)


def test_the_largest_sums_fit():
    noise = LatticeGaussianNoise(0.002, 10922)
    assert -noise._cdf.least + 10922 == 3 * 10922 < 2**15
    out = torch.empty(50, 40)
    assert noise.perturb_(out, torch.ones(40), torch.Generator().manual_seed(0)) is None
    assert (out - 1).std() == pytest.approx(0.002, rel=0.1)


# ---- certificates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 64, 150])
def test_votes_are_those_of_the_stream_in_blocks(chunk):
    images = grid(3, 1, 4, 4, seed=4)
    counts = Poll(Bright(), images, 0.25, family=LatticeGaussianNoise, seed=9, chunk=chunk).votes(150)
    for index, image in enumerate(images):
        source, blocks = stream(9, "votes", index), []
        for _ in range(3):
            blocks.append(torch.empty(BLOCK, 1, 4, 4))
            LatticeGaussianNoise(0.25).perturb_(blocks[-1], image, source)
        wanted = Bright()(torch.cat(blocks)[:150]).argmax(1).bincount(minlength=2)
        assert counts[index].tolist() == wanted.tolist()


def test_a_certificate_says_for_which_grid():
    images = torch.full((1, 1, 4, 4), 230 / 255)
    for family, text in (
        (LatticeGaussianNoise, "LatticeGaussianNoise(sigma=0.25, levels=255)"),
        (partial(LatticeGaussianNoise, levels=510), "LatticeGaussianNoise(sigma=0.25, levels=510)"),
    ):
        (certificate,) = certify(Bright(), images, 0.25, family=family, plan=FixedBudget(n=200))
        made = certificate.made_with
        assert (made.family, made.norm, made.sigma, made.noise) == ("lattice-gaussian", "l2", 0.25, text)
        assert certificate.prediction == 1
        assert certificate.radius == GaussianNoise(0.25).radius(certificate.p_lower)


def test_radii_are_gaussian():
    lattice, ordinary = LatticeGaussianNoise(0.5, 510), GaussianNoise(0.5)
    assert lattice.radius(0.9) == ordinary.radius(0.9) == pytest.approx(0.5 * 1.281552, abs=1e-6)
    assert lattice.probability(0.3) == ordinary.probability(0.3)
    assert lattice.radius_between(0.6, 0.3) == ordinary.radius_between(0.6, 0.3)
    with pytest.raises(InputError, match="p_lower: expected a probability"):
        lattice.radius(0.4)


class FirstPixel(nn.Module):
    """Class 1 from level 150 of the first pixel on: under lattice noise, a half-space that begins at 149.5."""

    def __init__(self):
        super().__init__()
        self.register_buffer("edge", torch.tensor(149.5 / 255))

    def forward(self, x):
        beyond = x.flatten(1)[:, 0] - self.edge
        return torch.stack([-beyond, beyond], dim=1)


@pytest.mark.parametrize(
    "plan",
    [
        FixedBudget(n=4000),
        FixedBudget(n=4000, runner_up=True),
        AtRadius(0.1, n=4000),
        OnGrid((0.0, 0.1, 0.15), n=4000),
        Anytime(n=4000),
    ],
    ids=["fixed", "runner-up", "at radius", "on grid", "anytime"],
)
def test_no_certificate_goes_beyond_a_half_space(plan):
    images = torch.tensor([105.0, 141.0, 150.0, 200.0]).div(255).view(4, 1, 1, 1).expand(4, 1, 2, 2)
    certificates = list(certify(FirstPixel(), images, 0.25, family=LatticeGaussianNoise, plan=plan))
    for certificate, distance in zip(certificates, (44.5 / 255, 8.5 / 255, 0.5 / 255, 50.5 / 255), strict=True):
        assert certificate.radius <= distance
    assert [certificates[0].prediction, certificates[3].prediction] == [0, 1]
    assert certificates[3].radius > 0.09  # of 0.198, with few votes


class Failing(LatticeGaussianNoise):
    """Noise on the grid of which a pixel in about 20 is a failure."""

    @property
    def _cdf(self):
        usual = inverse_cdf(self.sigma, self.levels)
        return InverseCdf(usual.points.numpy(), usual.least, failing=Q - Q // 20)


class Constant(nn.Module):
    """Class 1, also of NaN."""

    def __init__(self):
        super().__init__()
        self.register_buffer("answer", torch.tensor([0.0, 5.0, 1.0]))
        self.seen = True

    def forward(self, x):
        assert x.isfinite().all()
        return self.answer.repeat(len(x), 1)


@pytest.mark.parametrize("chunk", [5, 64, 500])
def test_a_failure_is_no_vote_whatever_the_model_says(chunk):
    images = grid(2, 1, 3, 4)
    poll = Poll(Constant(), images, 0.25, family=Failing, seed=3, chunk=chunk)
    with pytest.warns(ModelWarning, match="they count as votes for no class"):
        counts = poll.votes(300)
    for index, image in enumerate(images):
        source = stream(3, "votes", index)
        failed = [Failing(0.25).perturb_(torch.empty(BLOCK, 1, 3, 4), image, source) for _ in range(5)]
        failures = int(torch.cat(failed)[:300].sum())
        assert 90 < failures < 190  # of 300, at 1 - 0.95^12 = 0.46
        assert counts[index].tolist() == [0, 300 - failures, 0]


def test_failures_count_against_the_certificate():
    plan = FixedBudget(n0=20, n=400)
    images = grid(1, 1, 1, 4)
    with pytest.warns(ModelWarning):
        (failing,) = certify(Constant(), images, 0.25, family=Failing, plan=plan)
    (usual,) = certify(Constant(), images, 0.25, family=LatticeGaussianNoise, plan=plan)
    assert (usual.count, usual.n, usual.invalid) == (400, 400, 0)
    assert 300 < failing.count < 350  # 0.95^4 = 0.81
    assert failing.n == 400
    assert failing.invalid >= 400 - failing.count
    assert 0 < failing.radius < usual.radius
    assert failing.p_lower == clopper_pearson_lower(failing.count, 400, 0.001)


class Tied(Constant):
    """All classes alike, so that every copy is decided again: class 0 for each that is no failure."""

    def __init__(self):
        super().__init__()
        self.answer = torch.zeros(3)


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_a_failure_whose_decision_is_close_is_no_vote_either(chunk):
    votes = []
    for model in (Tied(), Constant()):
        with pytest.warns(ModelWarning):
            votes.append(Poll(model, grid(1, 1, 3, 4), 0.25, family=Failing, chunk=chunk).votes(200)[0].tolist())
    assert votes[0][0] == votes[1][1] == sum(votes[0]) < 150
    assert Poll(Tied(), grid(1, 1, 3, 4), 0.25, chunk=7).decide.look(torch.zeros(2, 1, 3, 4))[1].all()


def test_images_that_come_later_are_looked_at_too():
    begun = certify(Bright(), grid(2, 1, 2, 2), 0.25, family=LatticeGaussianNoise, plan=FixedBudget(n=20))
    with pytest.raises(InputError, match=r"expected pixels on the grid k/255, .* of image 7;"):
        begun.go_on(torch.full((1, 1, 2, 2), 0.3), [7])


def test_failures_are_marked_where_a_pixel_fails():
    noise, pixels = Failing(0.25), torch.empty(200, 1, 2, 2)
    failed = noise.perturb_(pixels, grid(1, 2, 2), torch.Generator().manual_seed(3))
    draws, marks = noise._cdf.draw(800, torch.Generator().manual_seed(3))
    assert torch.equal(failed, marks.view(200, 4).any(1))
    assert 0 < failed.sum() < 200
    assert draws[marks].min() > 90  # the upper end is what fails: 1.64 standard deviations are 105 levels


def test_failures_may_have_been_the_rivals():
    lattice, ordinary = (
        Case(noise, 1.0, lambda: 0.0, lambda _: False) for noise in (Failing(0.25), GaussianNoise(0.25))
    )
    votes = np.array([5, 70, 12])
    assert strongest_rival(lattice, votes, 1, 100) == 12 + 13
    assert strongest_rival(ordinary, votes, 1, 100) == 12
    assert strongest_rival(lattice, votes, 0, 87) == 70
    for plan in (FixedBudget(n0=20, n=400, runner_up=True), Anytime(n0=20, n=400, runner_up=True)):
        with pytest.warns(ModelWarning):
            (certificate,) = certify(Constant(), grid(1, 1, 1, 4), 0.25, family=Failing, plan=plan)
        assert certificate.runner_up > 1 - certificate.count / certificate.n  # though no vote went to a rival


class Unchecked(GaussianNoise):
    """Noise of a third party that may fail, but looks at no images: only a part of `NoiseOnGrid`."""

    def perturb_(self, out, images, generator):
        self.draw_(out, generator).add_(images)
        return torch.arange(len(out)) % 4 == 0


def test_failures_count_against_the_runner_up_whatever_else_the_noise_offers():
    assert not isinstance(Unchecked(0.25), NoiseOnGrid)
    with pytest.warns(ModelWarning):
        (certificate,) = certify(
            *(Constant(), grid(1, 1, 1, 4), 0.25), family=Unchecked, plan=FixedBudget(n0=64, n=640, runner_up=True)
        )
    assert (certificate.count, certificate.invalid) == (480, 176)
    assert certificate.runner_up > 160 / 640


class Picky(GaussianNoise):
    """Noise that refuses images, but adds itself in floating point."""

    def check_images(self, images, indices):
        raise InputError(f"images: not {list(indices)}")


def test_noise_that_looks_at_images_is_heard():
    with pytest.raises(InputError, match=r"images: not \[5\]"):
        Poll(Constant(), grid(1, 1, 1, 4), 0.25, family=Picky, indices=[5])


def test_a_device_whose_bits_are_not_known_is_refused():
    elsewhere = SimpleNamespace(device=SimpleNamespace(type="mps"))
    with pytest.raises(InputError, match="device: expected cpu or cuda for integers of 60 bits, got mps"):
        LatticeGaussianNoise(0.25).perturb_(torch.empty(2, 3), grid(3), elsewhere)


def test_it_is_found_by_its_name():
    assert registry.component("noise", "lattice-gaussian") is rs_plugins.LatticeGaussianNoise is LatticeGaussianNoise


# ---- what is no certificate ------------------------------------------------------------------------------------------


def test_the_soft_vote_adds_the_draws_so_that_there_is_a_gradient():
    smoothed = SmoothedModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 0.25, samples=5, family=LatticeGaussianNoise)
    x = torch.rand(2, 1, 2, 2, requires_grad=True)  # on no grid
    draws = smoothed.eval().draws(x)
    assert torch.equal((draws * 255).round() / 255, draws)
    wanted = smoothed.base(x[:, None].add(draws).flatten(0, 1)).softmax(1).view(2, 5, 3).mean(1).log()
    assert torch.allclose(smoothed(x), wanted, atol=1e-6)
    (gradient,) = torch.autograd.grad(smoothed(x).sum(), x)
    assert gradient.abs().min() > 0


def test_training_takes_it():
    draws = StreamDraws(torch.Generator().manual_seed(0))
    loss = gaussian(0.25, LatticeGaussianNoise)(
        Bright(), Batch(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 1, 0])), draws
    )
    assert loss.isfinite()
