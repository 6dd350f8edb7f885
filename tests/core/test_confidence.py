import math
from fractions import Fraction

import pytest
from scipy.stats import binom, norm

from rs_plugins.core.confidence import (
    clopper_pearson_lower,
    clopper_pearson_upper,
    fewest_for_half,
    majority_p_value,
    randomised_lower,
)
from rs_plugins.errors import InputError

# (k, n, bound, radius at sigma 1) at alpha = .001
GOLDEN = [
    (100_000, 100_000, 0.9999309248, 3.811457),
    (99_999, 100_000, 0.9999076697, 3.739127),
    (99_000, 100_000, 0.9889893404, 2.290000),
    (90_000, 100_000, 0.8970364962, 1.264845),
    (60_000, 100_000, 0.5952010473, 0.240945),
    (50_490, 100_000, 0.5000089488, 0.000022),
    (50_489, 100_000, 0.4999989485, None),
    (1000, 1000, 0.9931160484, 2.463263),
    (990, 1000, 0.9760361872, 1.978010),
    (100, 100, 0.9332543008, 1.500475),
    (10, 10, 0.5011872336, 0.002976),
    (9, 10, 0.3762769109, None),
]
CASES = [(k, n, alpha) for n in (1, 7, 60) for k in range(n + 1) for alpha in (1e-3, 0.05, 0.6)]


@pytest.mark.parametrize(("k", "n", "bound", "radius"), GOLDEN)
def test_golden_values(k, n, bound, radius):
    p = clopper_pearson_lower(k, n, 0.001)
    assert p == pytest.approx(bound, abs=1.1e-10)
    if radius is None:
        assert p < 0.5
    else:
        assert norm.ppf(p) == pytest.approx(radius, abs=1.1e-6)


def test_the_bound_is_the_exact_binomial_tail():
    """P(Bin(n, bound) >= k) = alpha is the definition; the tail is summed here term by term."""
    for k, n, alpha in CASES:
        p = clopper_pearson_lower(k, n, alpha)
        tail = math.fsum(math.comb(n, j) * p**j * (1 - p) ** (n - j) for j in range(k, n + 1))
        assert p == 0 if k == 0 else tail == pytest.approx(alpha, rel=1e-9), (k, n, alpha)


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize("n", [10, 200])
def test_exact_coverage(n, alpha):
    """For every true p, the probability of a bound above p, summed over all counts, is at most alpha."""
    bounds = [clopper_pearson_lower(k, n, alpha) for k in range(n + 1)]
    for p in [i / 100 for i in range(1, 100)]:
        wrong = math.fsum(binom.pmf(k, n, p) for k in range(n + 1) if bounds[k] > p)
        assert wrong <= alpha * (1 + 1e-9)


def test_a_count_more_never_lowers_the_bound():
    bounds = [clopper_pearson_lower(k, 500, 0.001) for k in range(501)]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize(
    ("n", "fewest"), [(10, 10), (11, 11), (100, 66), (1000, 550), (10_000, 5156), (100_000, 50_490)]
)
def test_fewest_votes_that_certify(n, fewest):
    assert clopper_pearson_lower(fewest, n, 0.001) >= 0.5 > clopper_pearson_lower(fewest - 1, n, 0.001)


@pytest.mark.parametrize("alpha", [0.5, 0.3, 0.05, 0.01, 0.001, 1e-9, *(2.0**-k for k in range(2, 300, 9))])
def test_fewest_for_half(alpha):
    n = fewest_for_half(alpha)
    assert alpha ** (1 / n) >= 0.5
    assert n == 1 or alpha ** (1 / (n - 1)) < 0.5


@pytest.mark.parametrize(("n", "first"), [(11, 11), (100, 67), (1000, 553), (10_000, 5166)])
def test_fewest_votes_that_predict(n, first):
    assert majority_p_value(first, n - first) <= 0.001 < majority_p_value(first - 1, n - first + 1)


@pytest.mark.filterwarnings("ignore:Error in function boost:RuntimeWarning")  # scipy gives up here, and returns NaN
def test_extreme_confidence_is_conservative():
    p = Fraction(clopper_pearson_lower(9, 10, 1e-300))
    assert 10 * p**9 - 9 * p**10 <= Fraction(1e-300)
    assert clopper_pearson_lower(10**6, 10**6, 1 - 1e-15) < 1


@pytest.mark.parametrize(("k", "n"), [(0, 7), (3, 7), (7, 7), (50, 1000)])
def test_the_upper_bound_mirrors_the_lower_one(k, n):
    assert clopper_pearson_upper(k, n, 0.01) == pytest.approx(1 - clopper_pearson_lower(n - k, n, 0.01), abs=1e-14)


def test_the_upper_bound_is_where_the_lower_tail_is_alpha():
    bound = clopper_pearson_upper(3, 20, 0.05)
    tail = sum(math.comb(20, j) * bound**j * (1 - bound) ** (20 - j) for j in range(4))
    assert tail == pytest.approx(0.05, rel=1e-9)


@pytest.mark.parametrize(
    ("k", "n", "half", "tenth"),
    [
        (100_000, 100_000, 0.9999378559, 0.9999539494),
        (99_000, 100_000, 0.9889944544, 0.9889987262),
        (1000, 1000, 0.9938046626, 0.9954054174),
        (990, 1000, 0.9766188282, 0.9772843570),
        (100, 100, 0.9397455978, 0.9549925860),
    ],
)
def test_published_values_of_the_randomised_bound(k, n, half, tenth):
    assert randomised_lower(k, n, 0.001, 0.5) == pytest.approx(half, abs=1e-10)
    assert randomised_lower(k, n, 0.001, 0.1) == pytest.approx(tenth, abs=1e-10)
    assert randomised_lower(k, n, 0.001, 1.0) == pytest.approx(clopper_pearson_lower(k, n, 0.001), rel=1e-12)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83, 0.999])
def test_the_randomised_bound_fails_exactly_as_often_as_alpha(p):
    """For each count, bisect the draw at which the bound passes p; below it the bound is wrong."""
    n, alpha, wrong = 30, 0.05, 0.0
    for k in range(n + 1):
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if randomised_lower(k, n, alpha, middle) > p else (low, middle)
        wrong += low * math.comb(n, k) * p**k * (1 - p) ** (n - k)
    assert wrong == pytest.approx(alpha, rel=1e-6)


def test_the_randomised_bound_never_buys_an_infinite_radius():
    assert 0.999 < randomised_lower(100, 100, 0.001, 0.0005) < 1


@pytest.mark.parametrize("draw", [0.0, -0.1, 1.5, float("nan")])
def test_draws_outside_their_range_are_refused(draw):
    with pytest.raises(InputError, match=r"draw: expected a number in \(0, 1\], got"):
        randomised_lower(1, 2, 0.1, draw)


def test_majority_p_value_is_the_two_sided_tail():
    assert majority_p_value(8, 2) == pytest.approx(2 * sum(math.comb(10, j) for j in (8, 9, 10)) / 2**10)
    assert majority_p_value(0, 0) == 1


@pytest.mark.parametrize(
    ("k", "n", "alpha", "message"),
    [
        (3, 2, 0.1, "k: expected an integer from 0 to 2, got 3"),
        (-1, 2, 0.1, "k: expected an integer from 0 to 2, got -1"),
        (0, 0, 0.1, "n: expected an integer >= 1, got 0"),
        (1, 2, 0.0, r"alpha: expected a number in \(0, 1\), got 0.0"),
        (1, 2, 1, r"alpha: expected a number in \(0, 1\), got 1"),
    ],
)
def test_bad_counts_are_refused(k, n, alpha, message):
    with pytest.raises(InputError, match=message):
        clopper_pearson_lower(k, n, alpha)
