"""OnGrid and AtRadius: exact probabilities of a wrong certificate, over all paths of votes."""

import itertools
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import binom
from torch import nn

from rs_plugins import AtRadius, FixedBudget, GaussianNoise, OnGrid, certify
from rs_plugins.core.plans.protocol import ABSTAIN, Case
from rs_plugins.errors import InputError, RSPluginsWarning

CIFAR = (0.0, 0.25, 0.5, 0.75)  # at sigma 0.25
MNIST = tuple(0.25 * j for j in range(16))  # at sigma 1


@pytest.mark.parametrize("tenths", [1, 3, 6, 7, 11])
def test_a_radius_is_the_decimal_that_is_printed_for_it(tenths):
    """0.3 in floating point is less than 3/10: what is tested is enough for 3/10."""
    plan = OnGrid((tenths / 10,))
    (needed,) = plan.reachable(GaussianNoise(0.5))
    with mpmath.workdps(60):
        exact = mpmath.ncdf(mpmath.mpf(tenths) / 5)
        assert exact <= needed < exact + 1e-15
    assert plan.reachable(GaussianNoise(0.5)) == AtRadius(tenths / 10).grid.reachable(GaussianNoise(0.5))


def test_what_is_asked_for_is_no_less_than_the_decimal():
    asked = []

    class Asked(GaussianNoise):
        def probability(self, radius):
            asked.append(radius)
            return super().probability(radius)

    radii = [k / 1000 for k in range(1, 400)]
    OnGrid(radii).reachable(Asked(0.5))
    assert all(Fraction(one) >= Fraction(repr(radius)) for one, radius in zip(asked, radii, strict=True))


def test_radius_zero_takes_one_half():
    assert OnGrid((0.0,)).reachable(GaussianNoise(0.5)) == (0.5,)


def case(noise):
    return Case(noise, draw=0.5, seconds=lambda: 0.0, report=lambda _verdict: False)


def verdict_on(plan, noise, increments):
    """Return the plan's verdict where the guess wins ``increments`` of the votes asked for, look by look."""
    procedure, wins = plan.procedure(case(noise)), iter(increments)
    procedure.send(None)
    votes = procedure.send(np.array([0, plan.n0]))
    try:
        while True:
            won = next(wins)
            votes = procedure.send(np.array([votes - won, won]))
    except StopIteration as stop:
        return stop.value


def certified_distribution(plan, noise, p):
    """Return P(k radii are certified), for k = 0 … len(radii), of an image with top-class probability ``p``."""
    tests, before = plan.tests(noise), 0
    states = {(frozenset(), len(tests)): (0, np.ones(1))}
    outcome = np.zeros(len(plan.radii) + 1)
    for look in range(max(len(test.looks) for test in tests)):
        votes = next(test.looks[look] for test in tests if look < len(test.looks))
        tosses, before = votes - before, votes
        fewest, most = binom.ppf([1e-17, 1 - 1e-16], tosses, p).astype(int)
        fewest, most = max(0, fewest - 30), min(tosses, most + 3)
        step = binom.pmf(np.arange(fewest, most + 1), tosses, p)
        reached = {}
        for (passed, ceiling), (least, mass) in states.items():
            mass = np.convolve(mass, step)
            for begin, end in segments(tests, look, least + fewest, len(mass)):
                key, certified = after(tests, look, least + fewest + begin, passed, ceiling)
                if key is None:
                    outcome[certified] += mass[begin:end].sum()
                else:
                    add(reached, key, least + fewest + begin, mass[begin:end])
        states = reached
        if not states:
            break
    return outcome


def segments(tests, look, least, length):
    """Split the counts least … least + length - 1 where the answer of some test changes."""
    edges = {0, length}
    for test in tests:
        if look < len(test.looks):
            edges |= {test.certify[look] - least, test.give_up[look] + 1 - least}
    return itertools.pairwise(sorted(edge for edge in edges if 0 <= edge <= length))


def after(tests, look, count, passed, ceiling):
    """Return the new state, or None, and how many radii are certified."""
    undecided = [j for j in range(ceiling) if j not in passed]
    ceiling = min([j for j in undecided if count <= tests[j].give_up[look]], default=ceiling)
    passed = passed | {j for j in undecided if count >= tests[j].certify[look]}
    certified = next(j for j in range(ceiling + 1) if j == ceiling or j not in passed)
    if certified == ceiling:
        return None, certified
    return (frozenset(j for j in passed if j < ceiling), ceiling), certified


def add(states, key, least, mass):
    if key in states:
        other_least, other = states[key]
        first, last = min(least, other_least), max(least + len(mass), other_least + len(other))
        total = np.zeros(last - first)
        total[least - first :][: len(mass)] += mass
        total[other_least - first :][: len(other)] += other
        least, mass = first, total
    states[key] = (least, mass)


@pytest.mark.parametrize("test", ["exact", "betting"])
@pytest.mark.parametrize(
    ("radii", "sigma"),
    [pytest.param(CIFAR, 0.25, id="four"), pytest.param(MNIST, 1.0, id="sixteen", marks=pytest.mark.slow)],
)
def test_no_radius_beyond_the_true_one_is_certified_more_often_than_alpha(radii, sigma, test):
    """At the defaults, over all 100,000 votes, simultaneously over the grid."""
    plan, noise = OnGrid(radii, test=test), GaussianNoise(sigma)
    needed = np.array([noise.probability(radius) for radius in radii])
    every = 1 if len(radii) == 4 else 5
    for true_z in [z - gap for z in (np.array(radii) / sigma)[::every] for gap in (0.001, 0.03, 0.2)]:
        p = float(ndtr(true_z))
        outcome = certified_distribution(plan, noise, p)
        assert outcome.sum() == pytest.approx(1, abs=1e-9)
        assert outcome[1 + np.count_nonzero(needed <= p) :].sum() <= 0.001


@pytest.mark.parametrize("test", ["exact", "betting"])
def test_on_a_fine_grid_of_p(test):
    plan, noise = OnGrid((0.0, 0.1, 0.3, 0.4), n=1000, alpha=0.05, slack=0.1, beta=0.2, test=test), GaussianNoise(0.25)
    needed = np.array([noise.probability(radius) for radius in plan.radii])
    worst = 0.0
    for p in np.concatenate([np.linspace(0.02, 0.99, 60), needed - 1e-9]):
        outcome = certified_distribution(plan, noise, p)
        worst = max(worst, outcome[1 + np.count_nonzero(needed <= p) :].sum())
    assert (0.04 if test == "exact" else 0.002) < worst <= 0.05


@pytest.mark.parametrize("p", [0.5, 0.9, 0.97, *(pytest.param(p, marks=pytest.mark.slow) for p in (0.35, 0.6, 0.7))])
def test_the_procedure_does_what_the_recursion_says(p):
    """All 33³ paths of three looks, through the plan itself."""
    plan, noise = OnGrid((0.0, 0.1, 0.2, 0.3), n0=1, n=96, alpha=0.1), GaussianNoise(0.25)
    weight = binom.pmf(np.arange(33), 32, p)
    outcome, mean = np.zeros(5), 0.0
    first_two = {}
    for path in itertools.product(range(0, 33), repeat=3):
        verdict = first_two.get(path[:1]) or first_two.get(path[:2]) or verdict_on(plan, noise, path)
        if verdict.n < 96:
            first_two[path[: verdict.n // 32]] = verdict
        probability = weight[list(path)].prod()
        outcome[0 if verdict.prediction == ABSTAIN else 1 + plan.radii.index(verdict.radius)] += probability
        mean += probability * verdict.n
    assert outcome == pytest.approx(certified_distribution(plan, noise, p), abs=1e-12)
    assert 32 <= mean <= 96


def test_a_verdict_says_what_was_found():
    plan, noise = OnGrid(CIFAR), GaussianNoise(0.25)
    verdict = verdict_on(plan, noise, [32] * 400)  # of every request 32 votes for the guess, which is class 1
    assert verdict.prediction == ABSTAIN or verdict.radius in CIFAR
    everything = OnGrid(CIFAR, n=10_000)
    looks = np.diff(everything.tests(noise)[-1].looks, prepend=0)
    verdict = verdict_on(everything, noise, looks)
    assert (verdict.prediction, verdict.guess, verdict.radius) == (1, 1, 0.75)
    assert verdict.p_lower == noise.probability(0.75)
    assert (verdict.count, verdict.n0) == (verdict.n, 100)
    assert verdict.n < 8000


def test_radii_out_of_reach_are_never_certified_and_cost_nothing():
    noise = GaussianNoise(0.25)
    near, far = OnGrid(CIFAR, n=2000), OnGrid((*CIFAR[:3], 2.0, 9.0), n=2000)
    looks = [32] * 62
    assert verdict_on(near, noise, looks).radius == verdict_on(far, noise, looks).radius == 0.5
    assert verdict_on(near, noise, looks).n == verdict_on(far, noise, looks).n < 2000
    reason = "even if all agree, n = 2000 votes at sigma = 0.25 prove no radius above 0.6755 pixels"
    with pytest.raises(InputError, match=f"radii: expected one that can be certified, got 0.75: {reason}"):
        AtRadius(0.75, n=2000).check(noise)
    with pytest.warns(RSPluginsWarning, match=f"radii: 2, 9 will never be certified: {reason}"):
        far.check(noise)
    assert OnGrid(CIFAR, n=6000).reachable(noise)[3] == noise.probability(0.75)


def test_at_radius_is_a_grid_of_one():
    noise = GaussianNoise(0.5)
    plan = AtRadius(0.5, n0=3, n=3000, alpha=0.01, slack=0.1, beta=0.2, test="betting")
    assert plan.grid == OnGrid((0.5,), n0=3, n=3000, alpha=0.01, slack=0.1, beta=0.2, test="betting")
    assert (plan.most, plan.bound) == (3003, "betting sequential test")
    for wins in (8, 20, 32):
        assert verdict_on(plan, noise, [wins] * 90) == verdict_on(plan.grid, noise, [wins] * 90)
    assert AtRadius(1).r == 1.0
    assert AtRadius(0.25).bound == "exact sequential test"


class HalfSpace(nn.Module):
    """Class 1 where the first pixel exceeds 1/2: the smoothed classifier's radius is its distance from 1/2."""

    def __init__(self):
        super().__init__()
        self.register_buffer("middle", torch.tensor(0.5))

    def forward(self, x):
        score = x.flatten(1)[:, :1] - self.middle
        return torch.cat([-score, score], 1)


def test_certificates_on_a_half_space():
    """True radii 0, 0.02, … 0.5; none beyond is certified, and all but those close to a grid point are found."""
    images = torch.zeros(26, 3)
    images[:, 0] = 0.5 + torch.arange(26) / 50
    grid = (0.0, 0.1, 0.2, 0.3, 0.4)
    certificates = list(certify(HalfSpace(), images, 0.25, plan=OnGrid(grid, alpha=1e-6), seed=3))
    budget = list(certify(HalfSpace(), images, 0.25, plan=FixedBudget(n=20_000, alpha=1e-6), seed=3))
    for index, (certificate, fixed) in enumerate(zip(certificates, budget, strict=True)):
        true_radius = index / 50
        assert certificate.radius <= true_radius + 1e-6
        assert certificate.radius in grid
        assert certificate.n < 100_000
        if index % 5 > 1:  # at least 0.04 away from the grid point below
            assert certificate.radius == max(r for r in grid if r <= true_radius)
            assert certificate.radius <= fixed.radius
    assert certificates[3].made_with.bound == "exact sequential test"
    assert certificates[3].made_with.plan == repr(OnGrid(grid, alpha=1e-6))


def test_the_same_certificates_for_every_chunk_and_order():
    images = torch.rand(7, 3, generator=torch.Generator().manual_seed(0))
    plan = OnGrid((0.0, 0.05, 0.1, 0.2), n=3000)

    def figures(certificates):
        return sorted((c.index, c.prediction, c.radius, c.count, c.n) for c in certificates)

    expected = figures(certify(HalfSpace(), images, 0.25, plan=plan))
    assert len({n for *_, n in expected}) > 3
    assert figures(certify(HalfSpace(), images, 0.25, plan=plan, chunk=50)) == expected
    order = [6, 2, 0, 4, 5, 1, 3]
    assert figures(certify(HalfSpace(), images[order], 0.25, plan=plan, indices=order, chunk=11)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radii": ()}, r"radii: expected one or more increasing radii in pixels, got \(\)"),
        ({"radii": (0.5, 0.25)}, "radii: expected one or more increasing radii"),
        ({"radii": (0.25, 0.25)}, "radii: expected one or more increasing radii"),
        ({"radii": (-0.1,)}, "radii: expected a finite number >= 0, got -0.1"),
        ({"radii": (float("nan"),)}, "radii: expected a finite number >= 0, got nan"),
        ({"n0": 0}, "n0: expected an integer >= 1, got 0"),
        ({"n": 2.5}, "n: expected an integer >= 1, got 2.5"),
        ({"alpha": 1}, r"alpha: expected a number in \(0, 1\), got 1"),
        ({"slack": -1}, "slack: expected a finite number >= 0, got -1"),
        ({"beta": 0}, r"beta: expected a number in \(0, 1\), got 0"),
        ({"test": "kt"}, "test: expected one of 'exact', 'betting', got 'kt'"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        OnGrid(**({"radii": (0.25,)} | options))
    if "radii" not in options:
        with pytest.raises(InputError, match=message):
            AtRadius(0.25, **options)


def test_at_radius_names_its_own_argument():
    with pytest.raises(InputError, match="r: expected a finite number >= 0, got -1"):
        AtRadius(-1)


def test_radii_may_come_as_a_list_or_an_array():
    assert OnGrid([0, 0.5]) == OnGrid(np.array([0, 0.5])) == OnGrid((0.0, 0.5))
    assert OnGrid(np.arange(0, 1, 0.1)).radii == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert AtRadius(0.1 + 0.2).r == 0.3


def test_noise_that_cannot_be_inverted_is_refused():
    class OneWay:
        name, norm, sigma = "one-way", "l2", 0.25

        def draw_(self, out, generator):
            return out.normal_(generator=generator)

        def radius(self, p_lower):
            return p_lower

    with pytest.raises(
        InputError, match=r"family: expected noise with probability\(radius\) for this plan, got one-way"
    ):
        certify(HalfSpace(), torch.zeros(1, 3), 0.25, plan=OnGrid(CIFAR), family=lambda sigma: OneWay())


def test_stopping_early_keeps_what_is_certified():
    image, seen = torch.full((1, 3), 1.0), []

    def watch(certificate):
        seen.append(certificate)
        return certificate.radius == 0.2

    (whole,) = certify(HalfSpace(), image, 0.25, plan=OnGrid((0.0, 0.1, 0.2, 0.4)))
    (stopped,) = certify(HalfSpace(), image, 0.25, plan=OnGrid((0.0, 0.1, 0.2, 0.4)), watch=watch)
    assert (whole.radius, stopped.radius) == (0.4, 0.2)
    assert stopped.n < whole.n
    assert [c.n for c in seen] == sorted({c.n for c in seen})
    assert stopped == seen[-1]


def test_watch_needs_a_function_and_a_plan_that_can_stop():
    with pytest.raises(InputError, match="watch: expected a function of a certificate, got 5"):
        certify(HalfSpace(), torch.zeros(1, 3), 0.25, plan=AtRadius(0.1), watch=5)
    with pytest.raises(InputError, match="watch: FixedBudget has no certificate before its end; use Anytime or OnGrid"):
        certify(HalfSpace(), torch.zeros(1, 3), 0.25, plan=FixedBudget(n=100), watch=print)


def test_zero_has_no_sign():
    assert repr(OnGrid((-0.0, 0.5))).startswith("OnGrid(radii=(0.0, 0.5)")
    assert repr(AtRadius(-0.0)).startswith("AtRadius(r=0.0,")
