"""Confidence bounds on a probability, as pure functions of counts.

They are rounded to the safe side: the tail of the binomial distribution that defines them is at most ``alpha`` at the
very number that is returned (`rs_plugins.core.rounding`).
"""

import math
from fractions import Fraction
from functools import lru_cache

from scipy.special import betainc
from scipy.stats import beta, binomtest

from rs_plugins.core.checks import check_count, check_probability
from rs_plugins.core.rounding import binomial_tail_above, lowered
from rs_plugins.errors import InputError


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """Return the one-sided (1 - alpha) Clopper-Pearson lower bound on p after ``k`` successes in ``n`` trials.

    It is the p at which P(Bin(n, p) >= k) = alpha, rounded down; 0 for k = 0 and alpha**(1/n) for k = n.

    Raises:
        InputError: If not 0 <= k <= n, n < 1, or alpha is outside (0, 1).
    """
    n, alpha = check_count(n, "n"), check_probability(alpha, "alpha")
    k = check_count(k, "k", least=0, most=n)
    if k == 0:
        return 0.0
    bound = float(alpha ** (1 / n) if k == n else beta.ppf(alpha, k, n - k + 1))
    if math.isnan(bound):  # an alpha beyond what the quantile can be computed for
        return 0.0
    return _safe_lower(k, n, alpha, min(bound, math.nextafter(1, 0)))  # rounded to 1 it would buy an infinite radius


def clopper_pearson_upper(k: int, n: int, alpha: float) -> float:
    """Return the one-sided (1 - alpha) Clopper-Pearson upper bound on p after ``k`` successes in ``n`` trials.

    It is the p at which P(Bin(n, p) <= k) = alpha, rounded up; 1 for k = n.

    Raises:
        InputError: If not 0 <= k <= n, n < 1, or alpha is outside (0, 1).
    """
    n, alpha = check_count(n, "n"), check_probability(alpha, "alpha")
    k = check_count(k, "k", least=0, most=n)
    if k == n:
        return 1.0
    bound = float(-math.expm1(math.log(alpha) / n) if k == 0 else beta.isf(alpha, k + 1, n - k))
    return 1.0 if math.isnan(bound) else _safe_upper(k, n, alpha, bound)


def randomised_lower(k: int, n: int, alpha: float, draw: float) -> float:
    """Return the randomised (1 - alpha) Clopper-Pearson lower bound on p after ``k`` successes in ``n`` trials.

    It is the smallest p with P(Bin(n, p) > k) + draw · P(Bin(n, p) = k) > alpha, and covers p with probability
    1 - alpha exactly (Voráček & Hein 2024, Definition 2.3). For draw = 1 it is the ordinary bound. Where it would be 1,
    which buys an infinite radius, it is a number just below 1.

    Args:
        k: Successes.
        n: Trials.
        alpha: Failure probability.
        draw: A uniform draw from (0, 1], made before the trials.

    Raises:
        InputError: If not 0 <= k <= n, n < 1, alpha is outside (0, 1) or draw outside (0, 1].
    """
    if not 0 < draw <= 1:
        raise InputError(f"draw: expected a number in (0, 1], got {draw}")
    low = clopper_pearson_lower(k, n, alpha)
    if k == 0 and draw > alpha:
        return low
    high = clopper_pearson_lower(k + 1, n, alpha) if k < n else math.nextafter(1, 0)
    while (middle := (low + high) / 2) not in (low, high):
        more = float(betainc(k + 1, n - k, middle)) if k < n else 0.0
        at_least = float(betainc(k, n - k + 1, middle)) if k else 1.0
        if more + draw * (at_least - more) > alpha:
            high = middle
        else:
            low = middle

    def fits(p: float) -> bool:
        more = 0 if k == n else _tail(k + 1, n, Fraction(p))
        return (1 - Fraction(draw)) * more + Fraction(draw) * _tail(k, n, Fraction(p)) <= alpha

    return max(0.0, lowered(low, fits))


def fewest_for_half(alpha: float) -> int:
    """Return the smallest n whose bound reaches 1/2 if all n votes agree; below it nothing can be certified."""
    n = max(1, math.ceil(math.log(check_probability(alpha, "alpha")) / math.log(0.5)) - 1)
    while alpha ** (1 / n) < 0.5:  # at most once or twice: the logarithms are rounded
        n += 1
    return n


def majority_p_value(first: int, second: int) -> float:
    """Return the two-sided binomial p-value of the two largest counts under "both are equally likely".

    This is the test of PREDICT (Cohen et al. 2019). With no votes at all it is 1.
    """
    total = check_count(first, "first", least=0) + check_count(second, "second", least=0)
    return float(binomtest(first, total, 0.5).pvalue) if total else 1.0


@lru_cache(maxsize=4096)
def _safe_lower(k: int, n: int, alpha: float, bound: float) -> float:
    return max(0.0, lowered(bound, lambda p: _tail(k, n, Fraction(p)) <= alpha))


@lru_cache(maxsize=4096)
def _safe_upper(k: int, n: int, alpha: float, bound: float) -> float:
    # P(Bin(n, p) <= k) = P(Bin(n, 1 - p) >= n - k)
    return min(1.0, -lowered(-bound, lambda minus_p: _tail(n - k, n, 1 + Fraction(minus_p)) <= alpha))


def _tail(k: int, n: int, p: Fraction) -> Fraction:
    """Return P(Bin(n, p) >= k), rounded up, also where p is not in (0, 1)."""
    return binomial_tail_above(k, n, p) if 0 < p < 1 else Fraction(k == 0 or p >= 1)
