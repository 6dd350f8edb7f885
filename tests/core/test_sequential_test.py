"""Sequential tests: the probability of ever certifying, by dynamic programming over the whole horizon."""

import numpy as np
import pytest
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from rs_plugins.core.sequential_test import betting_boundary, exact_boundary, fewest_to_certify, schedule

KINDS = {"exact": exact_boundary, "betting": betting_boundary}
DEFAULT = {"n": 100_000, "alpha": 0.001, "beta": 0.3, "slack": 0.04}
SMALL = {"n": 1500, "alpha": 0.05, "beta": 0.2, "slack": 0.1}


def outcome(boundary, p):
    """Return P(certify), P(give up) and the mean votes of a coin ``p``, by following every number of failures."""
    alive, fewest, certified, given_up, votes, before = np.ones(1), 0, 0.0, 0.0, 0.0, 0
    for look, certify, give_up in zip(boundary.looks, boundary.certify, boundary.give_up, strict=True):
        tosses = look - before
        few, many = binom.ppf([1e-17, 1 - 1e-16], tosses, 1 - p).astype(int)
        few, many = max(0, few - 3), min(tosses, many + 40)
        alive = np.convolve(alive, binom.pmf(np.arange(few, many + 1), tosses, 1 - p))
        fewest += few
        successes = look - fewest - np.arange(len(alive))
        up, down = successes >= certify, successes <= give_up
        certified, given_up = certified + alive[up].sum(), given_up + alive[down].sum()
        votes += look * alive[up | down].sum()
        kept = np.flatnonzero(~(up | down))
        if not len(kept):
            break
        alive, fewest, before = alive[kept[0] : kept[-1] + 1], fewest + kept[0], look
    return certified, given_up, votes


def test_the_schedule_begins_with_32_and_ends_with_n():
    assert schedule(100) == (32, 64, 96, 100)
    assert schedule(20) == (20,)
    looks = np.array(schedule(100_000))
    assert (looks[0], looks[-1]) == (32, 100_000)
    assert (np.diff(looks)[:-1] >= 32).all()
    assert (np.diff(looks)[20:-1] / looks[20:-2]).max() < 0.052


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p0", [0.5, 0.6, float(ndtr(1)), float(ndtr(2)), float(ndtr(3)), 0.9995])
def test_at_its_defaults_no_p_below_p0_is_certified_more_often_than_alpha(kind, p0):
    boundary = KINDS[kind](p0, **DEFAULT)
    z0 = float(ndtri(p0))
    wrong = [outcome(boundary, float(ndtr(z)))[0] for z in (z0 - 1, z0 - 0.3, z0 - 0.1, z0 - 0.02, z0 - 0.003)]
    wrong.append(outcome(boundary, p0)[0])
    assert max(wrong) <= 0.001
    assert wrong == sorted(wrong)
    if kind == "exact":
        assert wrong[-1] > 0.0009  # next to nothing of alpha is wasted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p0", [0.5, 0.7, 0.9, 0.98])
def test_on_a_fine_grid_of_p(kind, p0):
    boundary = KINDS[kind](p0, **SMALL)
    for p in np.linspace(0.01, 1, 120) * p0:
        certified, given_up, _ = outcome(boundary, p)
        assert certified <= 0.05
        assert certified + given_up == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    "options", [{"n": 300}, {"alpha": 0.2}, {"alpha": 1e-6}, {"beta": 0.9}, {"slack": 0.0}], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_keeps_the_error_below_alpha(kind, options):
    options = SMALL | options
    for p0 in (0.5, 0.8, 0.97):
        assert outcome(KINDS[kind](p0, **options), p0)[0] <= options["alpha"]


@pytest.mark.parametrize("p0", [0.5, float(ndtr(1)), float(ndtr(2))])
def test_what_lies_slack_above_is_mostly_certified(p0):
    p1 = float(ndtr(ndtri(p0) + 0.04))
    assert outcome(exact_boundary(p0, **DEFAULT), p1)[0] > 0.55
    certified, _, votes = outcome(exact_boundary(p0, **DEFAULT | {"beta": 0.05}), p1)
    assert certified > 0.75
    assert votes > outcome(exact_boundary(p0, **DEFAULT), p1)[2]


def test_the_betting_test_gives_up_p1_before_the_end_at_most_with_probability_beta():
    boundary = betting_boundary(0.8, **SMALL)
    p1 = float(ndtr(ndtri(0.8) + 0.1))
    *looks, _ = zip(boundary.looks, boundary.certify, boundary.give_up, strict=True)
    early = type(boundary)(*(tuple(column) for column in zip(*looks, strict=True)))
    assert 0 < outcome(early, p1)[1] <= 0.2


def test_the_exact_test_needs_fewer_votes_than_the_betting_one():
    exact, betting = (outcome(KINDS[kind](float(ndtr(3)), **DEFAULT), 0.9999)[2] for kind in ("exact", "betting"))
    assert exact < 0.75 * betting


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_look_decides(kind):
    boundary = KINDS[kind](0.9, **SMALL)
    assert boundary.give_up[-1] == boundary.certify[-1] - 1
    assert all(g < c for g, c in zip(boundary.give_up, boundary.certify, strict=True))


@pytest.mark.parametrize(("p0", "n", "alpha"), [(0.5, 100, 0.001), (0.9, 50, 0.05), (0.99, 10, 0.01)])
def test_one_look(p0, n, alpha):
    k = fewest_to_certify(p0, n, alpha)
    tail = [binom.pmf(range(j, n + 1), n, p0).sum() for j in (k, k - 1)]
    assert tail[0] <= alpha < tail[1]
