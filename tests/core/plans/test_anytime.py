"""Anytime: valid at every look, and it stops when it should."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multinomial, norm
from torch import nn

from rs_plugins import Anytime, GaussianNoise, certify
from rs_plugins.core.betting import betting_interval, fewest_to_exceed
from rs_plugins.core.plans.protocol import ABSTAIN, Case
from rs_plugins.errors import InputError

NOISE = GaussianNoise(0.25)


def drive(plan, shares, *, seconds=lambda votes: 0.0, report=lambda verdict: False, noise=NOISE):
    """Return the verdict where each request is answered with ``shares`` (classes,) of its votes, and the requests."""
    asked = []
    case = Case(noise, draw=0.5, seconds=lambda: seconds(sum(asked)), report=report)
    procedure = plan.procedure(case)
    asked.append(next(procedure))
    try:
        while True:
            counts = np.floor(np.array(shares) * asked[-1]).astype(np.int64)
            counts[0] += asked[-1] - counts.sum()
            asked.append(procedure.send(counts))
    except StopIteration as stop:
        return stop.value, asked


class Weighted(nn.Module):
    """Class k where the first pixel, whose noise is N(0, sigma²), lies in the k-th interval."""

    def __init__(self, edges):
        super().__init__()
        self.register_buffer("edges", torch.tensor(edges))

    def forward(self, x):
        return nn.functional.one_hot(torch.bucketize(x[:, 0].contiguous(), self.edges), len(self.edges) + 1).float()


def test_the_bounds_are_those_of_the_betting_sequence_at_the_best_look():
    seen = []
    verdict, asked = drive(Anytime(n0=10, n=3000, fraction=1.0), [0.9, 0.1], report=lambda v: seen.append(v))
    assert asked[0] == 10
    looks = np.cumsum(asked[1:])
    assert (asked[1], looks[-1]) == (64, 3000)
    assert [v.n for v in seen] == looks.tolist()
    best = 0.0
    for interim in seen:
        best = max(best, betting_interval(interim.count, interim.n, 0.001)[0])
        assert interim.p_lower == best
        assert interim.radius == (pytest.approx(0.25 * norm.ppf(best), rel=1e-13) if best >= 0.5 else 0)
    assert verdict == seen[-1]
    assert verdict.runner_up is None


def test_with_a_runner_up_each_side_has_half_alpha():
    plan = Anytime(n0=10, n=64, alpha=0.01, runner_up=True)
    verdict, _ = drive(plan, [0.7, 0.2, 0.1])
    assert verdict.p_lower == betting_interval(verdict.count, 64, 0.005)[0]
    assert verdict.runner_up == betting_interval(12, 64, 0.005)[1]


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.95])
def test_ever_wrong_with_probability_at_most_alpha(p):
    """By dynamic programming over the looks: the bound passes p where the votes reach `fewest_to_exceed`."""
    alpha, alive, wrong = 0.05, np.ones(1), 0.0
    looks = np.cumsum(drive(Anytime(n=4000, fraction=1.0, alpha=alpha), [0.6, 0.4])[1][1:])
    for votes, before in zip(looks, (0, *looks), strict=False):
        tosses = votes - before
        k = np.arange(tosses + 1)
        log_pmf = [math.lgamma(tosses + 1) - math.lgamma(j + 1) - math.lgamma(tosses - j + 1) for j in k]
        alive = np.convolve(alive, np.exp(np.array(log_pmf) + k * math.log(p) + (tosses - k) * math.log(1 - p)))
        threshold = fewest_to_exceed(p, int(votes), alpha)
        wrong += alive[threshold:].sum()
        alive[threshold:] = 0
    assert 0.001 < wrong <= alpha


def test_it_stops_near_what_is_attainable():
    thorough, _ = drive(Anytime(fraction=1.0), [0.9, 0.1])
    verdict, _ = drive(Anytime(fraction=0.9), [0.9, 0.1])
    assert verdict.n < 0.5 * thorough.n == 50_000
    best = min(betting_interval(verdict.count, verdict.n, 0.001)[1], 1)
    assert 0.9 * norm.ppf(best) * 0.25 <= verdict.radius * 1.02
    assert verdict.radius > 0.9 * thorough.radius


def test_votes_that_all_agree_stop_short_of_the_cap():
    """Nothing more than the lower bound at the end is attainable."""
    verdict, _ = drive(Anytime(n=100_000, fraction=0.9), [1.0, 0.0])
    assert verdict.n < 50_000
    assert verdict.radius >= 0.9 * 0.25 * norm.ppf(betting_interval(100_000, 100_000, 0.001)[0])


def test_it_gives_up_when_nothing_can_be_certified_any_more():
    verdict, _ = drive(Anytime(), [0.4, 0.35, 0.25])
    assert (verdict.prediction, verdict.radius) == (ABSTAIN, 0.0)
    assert verdict.n < 2000


def test_a_budget_of_time_ends_it_and_sizes_the_requests():
    def hundred_per_second(votes):
        return votes / 100

    verdict, asked = drive(Anytime(n0=100, fraction=1.0, seconds=30.0), [0.9, 0.1], seconds=hundred_per_second)
    assert verdict.prediction == 0
    assert 2900 <= verdict.n <= 2964
    assert max(asked) <= 0.1 * verdict.n + 1
    unlimited, _ = drive(Anytime(n=5000, fraction=1.0), [0.9, 0.1], seconds=hundred_per_second)
    assert unlimited.n == 5000


def test_it_stops_when_told_to():
    verdict, _ = drive(Anytime(fraction=1.0), [0.9, 0.1], report=lambda v: v.radius > 0.2)
    assert 0.2 < verdict.radius < 0.25
    assert verdict.n < 1000


def test_watch_sees_certificates_and_can_stop():
    model, image, seen = Weighted([0.0]), torch.full((2, 1), 0.2), []

    def watch(certificate):
        seen.append(certificate)
        return certificate.index == 0 and certificate.radius > 0.1

    first, second = certify(model, image, 0.25, plan=Anytime(n=4000, fraction=1.0), watch=watch, seed=1)
    assert (first.prediction, second.n) == (1, 4000)
    assert first.n < 1000
    assert first in seen
    assert [c.n for c in seen if c.index == 1][-1] == 4000
    assert all(c.made_with == first.made_with for c in seen)
    assert first.made_with.bound == "betting sequence"


def test_the_runner_up_lets_a_class_below_one_half_be_certified():
    """Three classes with probabilities about 0.42, 0.29 and 0.29."""
    edges = [0.25 * float(norm.ppf(0.29)) + 0.5, 0.25 * float(norm.ppf(0.71)) + 0.5]
    model, image = Weighted(edges), torch.full((1, 1), 0.5)
    (without,) = certify(model, image, 0.25, plan=Anytime(n=20_000))
    (certificate,) = certify(model, image, 0.25, plan=Anytime(n=20_000, fraction=1.0, runner_up=True))
    assert without.abstained
    assert (certificate.prediction, certificate.made_with.bound) == (1, "betting sequence with runner-up")
    assert certificate.p_lower < 0.42 < 0.5
    assert 0.29 < certificate.runner_up < certificate.p_lower
    assert 0 < certificate.radius <= 0.125 * (norm.ppf(0.42) - norm.ppf(0.29)) + 1e-4
    earlier, _ = drive(Anytime(n=20_000, fraction=0.7, runner_up=True), [0.42, 0.29, 0.29])
    assert earlier.n < 20_000


@pytest.mark.parametrize("shares", [(0.5, 0.4, 0.1), (0.4, 0.35, 0.25), (0.7, 0.2, 0.1), (0.34, 0.33, 0.33)])
def test_the_runner_up_radius_is_wrong_at_most_with_probability_alpha(shares):
    """Over all outcomes of one look at 64 votes for three classes; the guess is class 0."""
    alpha, wrong, certified = 0.2, 0.0, 0.0
    plan = Anytime(n0=1, n=64, alpha=alpha, runner_up=True)
    second = max(shares[1:])
    true_radius = 0.125 * (norm.ppf(shares[0]) - norm.ppf(second))
    for a, b in itertools.product(range(65), repeat=2):
        if a + b <= 64:
            votes = np.array([a, b, 64 - a - b])
            procedure = plan.procedure(Case(NOISE, 0.5, lambda: 0.0, lambda _: False))
            next(procedure)
            assert procedure.send(np.array([1, 0, 0])) == 64
            with pytest.raises(StopIteration) as stop:
                procedure.send(votes)
            weight = multinomial.pmf(votes, 64, shares)
            certified += weight * (stop.value.value.prediction == 0)
            wrong += weight * (stop.value.value.prediction == 0 and stop.value.value.radius > true_radius)
    assert wrong <= alpha
    assert certified > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n0": 0}, "n0: expected an integer >= 1, got 0"),
        ({"n": 0}, "n: expected an integer >= 1, got 0"),
        ({"alpha": 0}, r"alpha: expected a number in \(0, 1\), got 0"),
        ({"fraction": 0}, "fraction: expected a finite number > 0, got 0"),
        ({"fraction": 1.1}, r"fraction: expected a number in \(0, 1\], got 1.1"),
        ({"seconds": -1}, "seconds: expected a finite number > 0, got -1"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Anytime(**options)


def test_runner_up_is_true_or_false():
    with pytest.raises(InputError, match="runner_up: expected True or False, got 1"):
        Anytime(runner_up=1)
