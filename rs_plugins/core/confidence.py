"""Confidence bounds on a probability, as pure functions of counts."""

import math

from scipy.stats import beta, binomtest

from rs_plugins.core.checks import check_count, check_probability
from rs_plugins.errors import InputError


def clopper_pearson_lower(k: int, n: int, alpha: float) -> float:
    """Return the one-sided (1 - alpha) Clopper-Pearson lower bound on p after ``k`` successes in ``n`` trials.

    It is the p at which P(Bin(n, p) >= k) = alpha; 0 for k = 0 and alpha**(1/n) for k = n.

    Raises:
        InputError: If not 0 <= k <= n, n < 1, or alpha is outside (0, 1).
    """
    n, alpha = check_count(n, "n"), check_probability(alpha, "alpha")
    k = check_count(k, "k", least=0)
    if k > n:
        raise InputError(f"k: expected at most n = {n} successes, got {k}")
    if k == 0:
        return 0.0
    bound = float(alpha ** (1 / n) if k == n else beta.ppf(alpha, k, n - k + 1))
    if math.isnan(bound):  # an alpha beyond what the quantile can be computed for
        return 0.0
    return min(bound, math.nextafter(1, 0))  # rounded to 1 it would buy an infinite radius


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
