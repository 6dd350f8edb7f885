"""Sequential tests of "p >= p0": after so many votes, so many successes certify it, and so few give it up.

Both kinds of boundary are integers computed once for each p0. More successes can only certify earlier and give up
later, so a test errs most often at p0 itself, and its error there bounds the error at every smaller p.

`exact_boundary` computes the distribution of all paths that are still undecided, look by look, and so spends the
failure probability to the last grain (error spending, Lan & DeMets 1983, with the binomial distribution itself in place
of its normal limit). `betting_boundary` reads its integers off the betting confidence sequence.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from rs_plugins.core.betting import fewest_to_exceed, most_to_fall_below

Floats = npt.NDArray[np.float64]

FIRST, STEP, GROWTH = 32, 32, 1.05  # the first look, the least and the relative distance between looks
CERTIFY_POWER, GIVE_UP_POWER = 0.35, 0.5  # below 1 the budgets are spent early rather than late
DUST = 1e-13  # the share of alpha that may be lost in the tails at each look
ROUNDING = 1e-9  # the share of alpha set aside for the tails and for rounding


@dataclass(frozen=True)
class Boundary:
    """Where a sequential test stops; its last look always decides.

    Attributes:
        looks: Votes in all at each look, increasing.
        certify: The fewest successes at each look that certify.
        give_up: The most successes at each look that give up; -1 where none do.
    """

    looks: tuple[int, ...]
    certify: tuple[int, ...]
    give_up: tuple[int, ...]


def schedule(n: int) -> tuple[int, ...]:
    """Return the looks of every test that may spend ``n`` votes: 32, 64, … and from 640 on 5 % apart."""
    looks = [min(FIRST, n)]
    while looks[-1] < n:
        looks.append(min(n, looks[-1] + max(STEP, math.ceil(looks[-1] * (GROWTH - 1)))))
    return tuple(looks)


@lru_cache(maxsize=1024)
def exact_boundary(p0: float, *, n: int, alpha: float, beta: float, slack: float) -> Boundary:
    """Return the boundary whose probability of certifying at p0, hence at any p <= p0, is at most ``alpha``.

    Of the p whose normal deviate exceeds that of p0 by ``slack``, or by as much more as a test of ``n`` votes needs, it
    gives up at most the share ``beta`` before the last look.

    Args:
        p0: The probability to be exceeded, in (0, 1).
        n: The most votes it may spend.
        alpha: Probability of certifying a p below p0.
        beta: Probability of giving up a p well above p0.
        slack: How far above, in standard deviations of the noise.
    """
    reachable, p1 = _horizon(p0, n=n, alpha=alpha, beta=beta, slack=slack)
    every = schedule(n)
    looks = every[: 1 + next(i for i, look in enumerate(every) if look >= min(n, reachable))]
    below, above = _Paths(p0, DUST * alpha), _Paths(p1, DUST * alpha)
    certify, give_up = [], []
    for step, look in zip(np.diff(looks, prepend=0), looks, strict=True):
        spent = look / looks[-1]
        below.advance(int(step))
        above.advance(int(step))
        certify.append(below.fewest_within(alpha * (1 - ROUNDING) * spent**CERTIFY_POWER))
        give_up.append(min(above.most_within(beta * spent**GIVE_UP_POWER), certify[-1] - 1))
        if look == looks[-1]:
            give_up[-1] = certify[-1] - 1
        for paths in (below, above):
            paths.stop(certify[-1], give_up[-1])
    return Boundary(looks, tuple(certify), tuple(give_up))


@lru_cache(maxsize=1024)
def betting_boundary(p0: float, *, n: int, alpha: float, beta: float, slack: float) -> Boundary:
    """Return the boundary that certifies where the betting sequence excludes all p <= p0, with the same arguments.

    It gives up where the sequence at level ``beta`` excludes all p whose normal deviate exceeds that of p0 by
    ``slack``, and at the last look.
    """
    p1, looks = _beyond(p0, slack), schedule(n)
    certify = tuple(fewest_to_exceed(p0, look, alpha) for look in looks)
    give_up = [min(most_to_fall_below(p1, look, beta), least - 1) for look, least in zip(looks, certify, strict=True)]
    return Boundary(looks, certify, (*give_up[:-1], certify[-1] - 1))


def fewest_to_certify(p0: float, n: int, alpha: float) -> int:
    """Return the fewest successes in ``n`` votes, looked at once, that prove p >= p0 at level ``alpha``, or n + 1."""
    k = int(binom.isf(alpha, n, p0)) + 1  # P(X >= k) = P(X > k - 1)
    return k if binom.sf(k - 1, n, p0) <= alpha else k + 1


def _beyond(p0: float, slack: float) -> float:
    """Return the probability whose normal deviate exceeds that of ``p0`` by ``slack``."""
    return min(float(ndtr(ndtri(p0) + slack)), math.nextafter(1, 0))


def _horizon(p0: float, *, n: int, alpha: float, beta: float, slack: float) -> tuple[int, float]:
    """Return the votes with which a test has power 1 - beta at p1, and p1: as slack asks, or where n votes suffice."""

    def power(votes: int, further: float) -> float:
        return float(binom.sf(fewest_to_certify(p0, votes, alpha) - 1, votes, _beyond(p0, further)))

    if power(n, slack) >= 1 - beta:
        few, many = 1, n
        while many - few > 1 + few // 100:
            middle = (few + many) // 2
            few, many = (few, middle) if power(middle, slack) >= 1 - beta else (middle, many)
        return math.ceil(1.15 * many), _beyond(p0, slack)  # many looks cost about a seventh of one look's power
    near, far = slack, slack + 40.0
    for _ in range(50):
        middle_slack = (near + far) / 2
        near, far = (near, middle_slack) if power(n, middle_slack) >= 1 - beta else (middle_slack, far)
    return n, _beyond(p0, far)


class _Paths:
    """The paths of a coin of probability ``p`` that have not stopped: how likely each number of successes is."""

    def __init__(self, p: float, dust: float) -> None:
        self._p, self._dust = p, dust
        self._least, self._mass = 0, np.ones(1)
        self._certified = self._given_up = 0.0

    def advance(self, votes: int) -> None:
        """Toss the coin ``votes`` times more. Successes whose probability is below ``dust`` are left out."""
        few = max(0, int(binom.ppf(self._dust, votes, self._p)) - 1)
        many = min(votes, int(binom.isf(self._dust, votes, self._p)) + 1)
        step = binom.pmf(np.arange(few, many + 1), votes, self._p)
        self._least, self._mass = self._least + few, np.convolve(self._mass, step)

    def fewest_within(self, budget: float) -> int:
        """Return the fewest successes at which stopping all paths above keeps what was certified within ``budget``."""
        affordable = int(np.searchsorted(np.cumsum(self._mass[::-1]), budget - self._certified, side="right"))
        return self._least + len(self._mass) - affordable

    def most_within(self, budget: float) -> int:
        """Return the most successes at which stopping all paths below keeps what was given up within ``budget``."""
        return self._least - 1 + int(np.searchsorted(np.cumsum(self._mass), budget - self._given_up, side="right"))

    def stop(self, certify: int, give_up: int) -> None:
        """Stop the paths with at least ``certify`` or at most ``give_up`` successes."""
        successes = self._least + np.arange(len(self._mass))
        self._certified += float(self._mass[successes >= certify].sum())
        self._given_up += float(self._mass[successes <= give_up].sum())
        alive = (successes < certify) & (successes > give_up)
        self._mass = self._mass[alive] if alive.any() else np.zeros(1)
        self._least = int(successes[alive][0]) if alive.any() else self._least
