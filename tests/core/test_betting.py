"""The betting sequence against its definition, and its failure probability by dynamic programming over all paths."""

import itertools
import math

import mpmath
import numpy as np
import pytest
from scipy.special import gammaln, ndtr

from rs_plugins.core.betting import betting_interval, fewest_to_exceed, log_wealth, most_to_fall_below
from rs_plugins.errors import InputError


def test_the_wealth_is_the_product_of_the_bets():
    tosses = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]
    wealth, heads = 0.0, 0
    for t, toss in enumerate(tosses):
        predicted = (heads + 0.5) / (t + 1)
        wealth += math.log(predicted / 0.3 if toss else (1 - predicted) / 0.7)
        heads += toss
    assert log_wealth(heads, len(tosses), 0.3) == pytest.approx(wealth, rel=1e-12)


@pytest.mark.parametrize(
    ("h", "t", "lower", "upper"),
    [
        (90, 100, 0.72389107, 0.98230151),
        (500, 1000, 0.42762472, 0.57237528),
        (900, 1000, 0.85079017, 0.93800621),
        (9900, 10_000, 0.98438664, 0.99408439),
        (100, 100, 0.90679438, 1.0),
        (100_000, 100_000, 0.99986764, 1.0),
    ],
)
def test_intervals_computed_elsewhere(h, t, lower, upper):
    assert betting_interval(h, t, 0.001) == pytest.approx((lower, upper), abs=1e-8)


@pytest.mark.parametrize(
    ("p0", "first", "fewest"),
    [
        (0.5, 13, (72, 573, 5243, 50_803)),
        (0.6, 18, (81, 671, 6237, 60_786)),
        (0.8, 42, (96, 856, 8192, 80_640)),
        (float(ndtr(1)), 55, (98, 892, 8588, 84_719)),
        (0.95, 198, (101, 979, 9602, 95_347)),
        (0.99, 1093, (101, 1001, 9945, 99_156)),
    ],
)
def test_thresholds_computed_elsewhere(p0, first, fewest):
    """n + 1 says that no number of successes proves it."""
    assert next(t for t in range(1, 2000) if fewest_to_exceed(p0, t, 0.001) <= t) == first
    assert tuple(fewest_to_exceed(p0, t, 0.001) for t in (100, 1000, 10_000, 100_000)) == fewest


@pytest.mark.parametrize(("h", "t"), [(0, 0), (0, 50), (50, 50), (37, 50)])
def test_ends_are_rounded_outwards(h, t):
    lower, upper = betting_interval(h, t, 0.05)
    for end, outermost in ((lower, 0.0), (upper, 1.0)):
        assert end == outermost or log_wealth(h, t, end) > math.log(1 / 0.05)


@pytest.mark.parametrize("t", [1, 7, 64, 1000, 100_000])
def test_the_true_wealth_at_both_ends_exceeds_the_limit(t):
    """To 60 digits, so that double precision cannot have moved an end inwards."""
    generator = np.random.default_rng(t)
    for h, alpha in itertools.product({0, 1, t, *generator.integers(0, t + 1, 40).tolist()}, (0.001, 0.3)):
        with mpmath.workdps(60):
            bets = mpmath.log(mpmath.beta(h + mpmath.mpf(1) / 2, t - h + mpmath.mpf(1) / 2) / mpmath.pi)
            for end in map(mpmath.mpf, betting_interval(h, t, alpha)):
                if 0 < end < 1:
                    assert bets - h * mpmath.log(end) - (t - h) * mpmath.log(1 - end) > mpmath.log(
                        1 / mpmath.mpf(alpha)
                    )


@pytest.mark.parametrize("p0", [0.3, 0.5, 0.95])
@pytest.mark.parametrize("t", [1, 10, 333])
def test_thresholds_and_intervals_agree(p0, t):
    for h in range(t + 1):
        lower, upper = betting_interval(h, t, 0.01)
        assert (h >= fewest_to_exceed(p0, t, 0.01)) == (lower >= p0)
        assert (h <= most_to_fall_below(p0, t, 0.01)) == (upper <= p0)


def crossing_probabilities(p, p0, horizon, alpha):
    """Return P(ever above p0), P(ever below p0) in ``horizon`` tosses of a coin ``p``, looked at after each toss."""
    alive, least, above, below = np.ones(1), 0, 0.0, 0.0
    for t in range(1, horizon + 1):
        alive = np.convolve(alive, [1 - p, p])
        h = least + np.arange(len(alive))
        crossed = wealth(h, t, p0) > math.log(1 / alpha)
        above += alive[crossed & (h > p0 * t)].sum()
        below += alive[crossed & (h < p0 * t)].sum()
        kept = np.flatnonzero(~crossed & (alive > 1e-20))
        if not len(kept):
            break
        alive, least = np.where(crossed, 0, alive)[kept[0] : kept[-1] + 1], least + kept[0]
    return above, below


def wealth(h, t, p0):
    bets = gammaln(h + 0.5) + gammaln(t - h + 0.5) - gammaln(t + 1) - math.log(math.pi)
    return bets - h * math.log(p0) - (t - h) * math.log(1 - p0)


@pytest.mark.parametrize("p0", [0.5, 0.8, 0.99])
@pytest.mark.parametrize("t", [40, 700, 5000])
def test_thresholds_are_where_the_wealth_crosses(p0, t):
    h = np.arange(t + 1)
    crossed = h[wealth(h, t, p0) > math.log(1 / 0.01)]
    assert fewest_to_exceed(p0, t, 0.01) == min([k for k in crossed if k > p0 * t], default=t + 1)
    assert most_to_fall_below(p0, t, 0.01) == max([k for k in crossed if k < p0 * t], default=-1)


@pytest.mark.parametrize(
    ("p0", "above", "below"), [(0.5, 3.9e-4, 3.9e-4), (0.8, 2.7e-4, 4.2e-4), (0.95, 1.3e-4, 4.1e-4)]
)
def test_crossing_probabilities_computed_elsewhere(p0, above, below):
    """At p = p0 and a horizon of 30,000; both sides together stay below alpha."""
    got = crossing_probabilities(p0, p0, 30_000, 0.001)
    assert got == pytest.approx((above, below), abs=6e-6)
    assert sum(got) <= 0.001


@pytest.mark.parametrize("p0", [0.5, 0.8, 0.99])
def test_no_p_below_ever_exceeds_more_often_than_alpha(p0):
    for p in np.linspace(0.02, 0.999, 25) * p0:
        above, _ = crossing_probabilities(p, p0, 1500, 0.05)
        assert above <= 0.05
    for p in p0 + (1 - p0) * np.linspace(0, 0.95, 15):
        _, below = crossing_probabilities(p, p0, 1500, 0.05)
        assert below <= 0.05


def test_many_votes_and_small_alphas_stay_finite():
    lower, upper = betting_interval(10**7, 10**8, 1e-12)
    assert 0.0997 < lower < 0.1 < upper < 0.1003


@pytest.mark.parametrize(("h", "t", "alpha"), [(3, 2, 0.1), (-1, 2, 0.1), (1, 2, 0.0), (1, 2, 1.5)])
def test_impossible_counts_are_refused(h, t, alpha):
    with pytest.raises(InputError, match="expected"):
        betting_interval(h, t, alpha)
