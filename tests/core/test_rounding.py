"""Bounds against the true values, by mpmath to 80 digits and by exact fractions: never on the wrong side, and close."""

import decimal
import math
import random
from decimal import Decimal
from fractions import Fraction

import mpmath
import pytest

from rs_plugins.core.confidence import clopper_pearson_lower, clopper_pearson_upper, randomised_lower
from rs_plugins.core.rounding import (
    LESS,
    MORE,
    binomial_tail_above,
    decimals_below,
    float_above,
    float_below,
    normal_cdf_above,
    normal_quantile_above,
    normal_quantile_below,
    product_below,
    quotient_above,
)

DRAWN = random.Random(0)
NEAR_HALF = [0.5 + 2.0**-k for k in range(2, 54, 3)]
NEAR_ONE = [1 - 2.0**-k for k in range(2, 54, 3)] + [1 - 1e-16, math.nextafter(1, 0)]
BETWEEN = [DRAWN.uniform(0.5, 1) for _ in range(150)]
BELOW_HALF = [1e-24, 1e-12, 0.25, 0.3, math.nextafter(0.5, 0)] + [DRAWN.uniform(0, 0.5) for _ in range(40)]


@pytest.fixture(autouse=True)
def eighty_digits():
    with mpmath.workdps(80):
        yield


def normal_cdf(x):
    return mpmath.erfc(-mpmath.mpf(x) / mpmath.sqrt(2)) / 2


@pytest.mark.parametrize(
    "ps", [NEAR_HALF, NEAR_ONE, BETWEEN, BELOW_HALF], ids=["near 1/2", "near 1", "between", "below 1/2"]
)
def test_normal_quantiles_enclose_the_true_one(ps):
    for p in ps:
        low, high = normal_quantile_below(p), normal_quantile_above(p)
        assert normal_cdf(low) <= p <= normal_cdf(high), p
        tail = min(p, 1 - p)  # what LESS and MORE take off 1/2 is a part of it that can be seen where it is tiny
        assert high - low <= 64 * math.ulp(low) + 1e-34 / tail, p


def test_normal_quantiles_at_the_ends():
    assert normal_quantile_below(0.5) == normal_quantile_above(0.5) == 0
    assert normal_quantile_below(1.0) == math.inf
    assert normal_quantile_below(1e-26) == normal_quantile_below(0.0) == -math.inf
    assert normal_quantile_above(0.0) == normal_quantile_above(1e-25) == pytest.approx(-10.42045, abs=1e-5)


def test_the_normal_distribution_function_is_rounded_up():
    for x in [0.0, 1e-300, 1e-17, 1e-8, 0.3, 1.0, 2.5, 6.0, 8.2, *(DRAWN.uniform(0, 8) for _ in range(60))]:
        p = normal_cdf_above(x)
        assert p >= normal_cdf(x)
        assert math.nextafter(math.nextafter(p, 0), 0) < normal_cdf(x)
    assert normal_cdf_above(0.0) == 0.5
    for x in (5e-324, 1e-300, 1e-61):  # where 60 digits, or 80, do not tell Φ(x) from 1/2
        assert normal_cdf_above(x) == math.nextafter(0.5, 1)
    assert normal_cdf_above(8.5) == normal_cdf_above(1e9) == normal_cdf_above(math.inf) == 1


@pytest.mark.parametrize(
    "value", [Fraction(1, 3), Fraction(3, 10), Fraction(2, 7), Decimal("0.1"), Decimal("1e-400"), Fraction(0)], ids=str
)
def test_floats_on_the_right_side_of_a_number_as_they_are_and_as_printed(value):
    for sign in (1, -1):
        exact = sign * Fraction(value)
        low, high = float_below(exact), float_above(exact)
        assert Fraction(low) <= exact <= Fraction(high)
        assert Fraction(repr(low)) <= exact <= Fraction(repr(high))
        assert high <= math.nextafter(math.nextafter(low, math.inf), math.inf)


def test_the_float_that_is_printed_as_a_little_more_is_not_taken():
    exact = Fraction(0.3)  # which is less than 3/10, but printed so
    assert float_below(exact) == math.nextafter(0.3, 0)
    assert float_below(Fraction(3, 10)) == 0.3


def test_decimals_are_rounded_down():
    assert [decimals_below(value, 2) for value in (0.999, 0.3, 0.29999, 0.0, 1e-9, 12.3456)] == [
        *("0.99", "0.30", "0.29", "0.00", "0.00", "12.34")
    ]
    assert decimals_below(math.nextafter(0.5, 0), 3) == "0.499"
    assert decimals_below(1.9999, 0) == "1"


def test_numbers_beyond_the_floats():
    assert float_below(Fraction(10) ** 400) == float.fromhex("0x1.fffffffffffffp+1023")
    assert float_above(Fraction(10) ** 400) == math.inf
    assert float_below(-(Fraction(10) ** 400)) == -math.inf


def test_what_moves_a_result_to_the_safe_side_is_not_one():
    assert 1 - Fraction(LESS) == Fraction(MORE) - 1 == Fraction(1, 10**34)


def test_products_and_quotients():
    for _ in range(100):
        a, b = DRAWN.uniform(0, 3), DRAWN.uniform(0.01, 3)
        assert product_below(a, b) <= Fraction(a) * Fraction(b) <= Fraction(a * b) * (1 + Fraction(2) ** -50)
        assert a * b == pytest.approx(product_below(a, b), rel=1e-15)
        assert quotient_above(a, b) >= Fraction(a) / Fraction(b)
        assert a / b == pytest.approx(quotient_above(a, b), rel=1e-15)


def exact_tail(k, n, p):
    """P(Bin(n, p) >= k), p a fraction, in integers alone."""
    rate, other = p.numerator, p.denominator - p.numerator
    return Fraction(sum(math.comb(n, j) * rate**j * other ** (n - j) for j in range(k, n + 1)), p.denominator**n)


@pytest.mark.parametrize(("n", "ks"), [(1, (0, 1)), (13, (1, 6, 13)), (300, (5, 150, 270, 299, 300))])
def test_the_binomial_tail_is_rounded_up_by_next_to_nothing(n, ks):
    for k in ks:
        for p in (0.5, 0.013, 0.9321):
            exact, bound = exact_tail(k, n, Fraction(p)), binomial_tail_above(k, n, Fraction(p))
            assert exact <= bound <= exact * (1 + Fraction(1, 10**25)), (k, p)


def long_tail(k, n, p):
    """The same for many trials: the terms by mpmath's gamma function, up to where they are below 1e-60 of the first."""
    p = mpmath.mpf(p)
    first = mpmath.exp(mpmath.log(p) * k + mpmath.log1p(-p) * (n - k)) * mpmath.binomial(n, k)
    term, total, j = first, first, k
    while j < n and (term > first * mpmath.mpf("1e-60") or j < n * p):
        term *= p / (1 - p) * (n - j) / (j + 1)
        total, j = total + term, j + 1
    return total


def test_the_binomial_tail_of_many_trials():
    for k, n, p in [(90_000, 100_000, 0.897), (50_490, 100_000, 0.50001), (2, 5000, 0.001), (5000, 5000, 0.998)]:
        exact, bound = long_tail(k, n, p), binomial_tail_above(k, n, Fraction(p))
        assert exact <= mpmath.mpf(bound.numerator) / bound.denominator <= exact * (1 + mpmath.mpf("1e-25")), (k, n, p)


def test_the_precision_of_the_caller_does_not_matter():
    ps = [0.6, 0.75, 0.99]
    usual = [normal_quantile_below.__wrapped__(p) for p in ps]
    with decimal.localcontext(decimal.Context(prec=5, traps=[decimal.Inexact])):
        assert [normal_quantile_below.__wrapped__(p) for p in ps] == usual


COUNTS = [(1, 1), (5, 7), (7, 7), (66, 100), (99, 100), (100, 100), (3, 250), (200, 250), (249, 250)]


@pytest.mark.parametrize("alpha", [1e-6, 0.001, 0.05, 0.6])
def test_clopper_pearson_bounds_never_exceed_what_defines_them(alpha):
    """P(Bin(n, p) >= k) <= alpha at the lower bound p, in exact fractions; and a hair above it no more."""
    for k, n in COUNTS:
        low, high = (bound(k, n, alpha) for bound in (clopper_pearson_lower, clopper_pearson_upper))
        assert (
            exact_tail(k, n, Fraction(low)) <= alpha < exact_tail(k, n, min(Fraction(1), Fraction(low * (1 + 1e-13))))
        )
        if k < n:
            assert exact_tail(n - k, n, 1 - Fraction(high)) <= alpha
            assert exact_tail(n - k, n, 1 - Fraction(high * (1 - 1e-13))) > alpha


@pytest.mark.parametrize("k", [50_490, 60_000, 90_000, 99_999, 100_000])
def test_clopper_pearson_bounds_of_many_votes(k):
    n, alpha = 100_000, 0.001
    low = mpmath.mpf(clopper_pearson_lower(k, n, alpha))
    assert long_tail(k, n, low) <= alpha < long_tail(k, n, low * (1 + mpmath.mpf("1e-13")))


def test_a_bound_that_is_a_float_is_met():
    """n votes that all agree prove 1/2 at alpha = 2**-n, and not a little less."""
    for n in (1, 10, 60, 1000):
        assert clopper_pearson_lower(n, n, 2.0**-n) == 0.5


@pytest.mark.parametrize("draw", [1e-4, 0.1, 0.5, 1.0])
def test_the_randomised_bound_never_exceeds_what_defines_it(draw):
    for k, n in [(0, 5), *COUNTS]:
        for alpha in (0.001, 0.3):
            p = Fraction(randomised_lower(k, n, alpha, draw))
            if k == 0 and draw > alpha:  # every p has its tail above alpha
                assert p == 0
                continue
            more = exact_tail(k + 1, n, p) if k < n else 0
            assert (1 - Fraction(draw)) * more + Fraction(draw) * exact_tail(k, n, p) <= alpha, (k, n, alpha)
