"""The betting confidence sequence of a coin: bounds on its probability that hold at all times at once.

A gambler bets on every toss by the predictor of Krichevsky and Trofimov. Were p the true probability, her wealth
against it would be a martingale, so by Ville's inequality it ever reaches 1/alpha with probability at most alpha. The
p against which it has not done so are kept (Voráček & Hein 2024, Algorithm 2, with the threshold log(1/alpha)).
"""

import math
from collections.abc import Callable

from rs_plugins.core.checks import check_count, check_probability

_LOG_BETA_HALVES = math.log(math.pi)  # ln B(1/2, 1/2)


def log_wealth(successes: int, n: int, p: float) -> float:
    """Return the log of the gambler's wealth against ``p`` after ``successes`` in ``n`` tosses.

    It is convex in p, with its minimum at successes / n.
    """
    failures = n - successes
    return _log_bets(successes, n) - _times_log(successes, p) - _times_log(failures, 1 - p)


def betting_interval(successes: int, n: int, alpha: float) -> tuple[float, float]:
    """Return (lower, upper) of the p that are kept, rounded outwards; [0, 1] before the first toss.

    With probability at least 1 - alpha the true p lies in these intervals for all n, so they may be intersected.

    Raises:
        InputError: If not 0 <= successes <= n, or alpha is outside (0, 1).
    """
    alpha = check_probability(alpha, "alpha")
    n = check_count(n, "n", least=0)
    successes = check_count(successes, "successes", least=0, most=n)
    if not n:
        return 0.0, 1.0
    limit, middle = _limit(n, alpha), successes / n
    lower = 0.0 if successes == 0 else _crossing(successes, n, limit, inside=middle, outside=0.0)
    upper = 1.0 if successes == n else _crossing(successes, n, limit, inside=middle, outside=1.0)
    return lower, upper


def fewest_to_exceed(p: float, n: int, alpha: float) -> int:
    """Return the fewest successes in ``n`` tosses that prove a probability above ``p``; n + 1 if none do."""
    return _first(lambda k: k > p * n and log_wealth(k, n, p) > _limit(n, alpha), n)


def most_to_fall_below(p: float, n: int, alpha: float) -> int:
    """Return the most successes in ``n`` tosses that prove a probability below ``p``; -1 if none do."""
    return n - _first(lambda k: k > (1 - p) * n and log_wealth(n - k, n, p) > _limit(n, alpha), n)


def _limit(n: int, alpha: float) -> float:
    """Return log(1/alpha), and a little more than the wealth can be off by in double precision."""
    return math.log(1 / alpha) + 1e-14 * n


def _log_bets(successes: int, n: int) -> float:
    """Return ln B(h + 1/2, t - h + 1/2) - ln B(1/2, 1/2): the bets of all tosses, whatever their order."""
    tails = n - successes + 0.5
    return math.lgamma(successes + 0.5) + math.lgamma(tails) - math.lgamma(n + 1) - _LOG_BETA_HALVES


def _times_log(times: int, p: float) -> float:
    return times * math.log(p) if times and p > 0 else (-math.inf if times else 0.0)


def _crossing(successes: int, n: int, limit: float, *, inside: float, outside: float) -> float:
    """Return the p between ``inside`` and ``outside`` at which the wealth reaches the limit, or one further out."""
    while (middle := (inside + outside) / 2) not in (inside, outside):
        if log_wealth(successes, n, middle) > limit:
            outside = middle
        else:
            inside = middle
    return outside


def _first(proves: Callable[[int], bool], n: int) -> int:
    """Return the smallest of 0 … n that proves it, given that every larger one does too; n + 1 if none do."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if proves(middle):
            high = middle
        else:
            low = middle + 1
    return low
