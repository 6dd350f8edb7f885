"""The normal distribution function in integers: where the bins of lattice noise end, each rounded provably.

Everything is computed between a lower and an upper bound in Python's integers, so nothing rests on floating point. The
thresholds of common standard deviations lie beside this file, as decimal integers; others are computed when asked for.
"""

import json
from fractions import Fraction
from functools import lru_cache
from importlib import resources
from math import isqrt

BITS = 60  # probabilities are in units of 2**-BITS
SHIPPED = "lattice_thresholds.json"
_DIGITS = 99
_PI = 3141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825342117067  # 1e99 * pi
_FAR = 10  # standard deviations at which the upper tail, below exp(-50)/25, rounds to nothing in units of 2**-60
_PRECISIONS = (160, 320)  # bits after the point: the first has always been enough, as far as was tried


def half_width(sigma: float, levels: int) -> int:
    """Return the number of thresholds on each side of zero, ``levels`` · (k + 1)."""
    return levels * (reach(sigma) + 1)


def reach(sigma: float) -> int:
    """Return k = max(1, int(6 sigma)): noisy pixels are kept in [-k, k + 1]."""
    return max(1, int(6 * sigma))


@lru_cache(maxsize=16)
def upper_thresholds(sigma: float, levels: int) -> tuple[int, ...]:
    """Return t_i = round(2^60 · Φ((2i + 1)/(2 · levels · sigma))) for i = 0, …, `half_width` - 1.

    Those below zero follow from t_(-i-1) = 2^60 - t_i: Φ is irrational there, so nothing is rounded at a tie.

    Args:
        sigma: Standard deviation in pixels; the number that the float is, exactly.
        levels: Steps of the grid in one pixel unit.
    """
    if levels == 255 and (shipped := _shipped().get(repr(sigma))) is not None:
        return tuple(shipped)
    return computed_thresholds(sigma, levels)


def computed_thresholds(sigma: float, levels: int) -> tuple[int, ...]:
    """Return the same numbers, computed."""
    unit = 1 / (2 * levels * Fraction(sigma))
    return tuple(rounded_normal((2 * i + 1) * unit) for i in range(half_width(sigma, levels)))


def rounded_normal(x: Fraction) -> int:
    """Return 2^60 · Φ(x), rounded to the nearest integer, for a rational ``x`` > 0.

    Raises:
        ArithmeticError: If the precision does not decide which integer is the nearest.
    """
    if x >= _FAR:
        return 1 << BITS
    for precision in _PRECISIONS:
        low, high = (_nearest(bound, precision) for bound in _normal_between(x, precision))
        if low == high:
            return low
    raise ArithmeticError(f"x: expected a number at which Φ can be rounded, got {x}")


def _normal_between(x: Fraction, precision: int) -> tuple[int, int]:
    """Return integers below and above 2^precision · Φ(x), for ``x`` in (0, `_FAR`).

    Φ(x) = 1/2 + (1/√(2π)) Σ_n (-1)^n x y^n / (n! (2n + 1)) with y = x²/2. The terms are bounded from both sides; once
    they fall, what is left out is between zero and the next term.
    """
    low, high = _between(x, precision)
    y_low, y_high = _between(x * x / 2, precision)
    sum_low, sum_high, n = 0, 0, 0
    while high > 1 or n << precision <= y_high:
        if n % 2:
            sum_low, sum_high = sum_low - _up(high, 2 * n + 1), sum_high - low // (2 * n + 1)
        else:
            sum_low, sum_high = sum_low + low // (2 * n + 1), sum_high + _up(high, 2 * n + 1)
        n += 1
        low, high = low * y_low // (n << precision), _up(high * y_high, n << precision)
    factor_low, factor_high = _one_over_root_of_two_pi(precision)
    half = 1 << 2 * precision - 1
    below, above = half + factor_low * (sum_low - 1), half + factor_high * (sum_high + 1)  # 1 for what is left out
    return below >> precision, _up(above, 1 << precision)


@lru_cache(maxsize=len(_PRECISIONS))
def _one_over_root_of_two_pi(precision: int) -> tuple[int, int]:
    """Return integers below and above 2^precision / √(2π)."""
    scaled = 10**_DIGITS << 2 * precision
    return isqrt(scaled // (2 * (_PI + 1))), isqrt(scaled // (2 * _PI)) + 1


def _between(value: Fraction, precision: int) -> tuple[int, int]:
    """Return integers below and above 2^precision · ``value``."""
    below = (value.numerator << precision) // value.denominator
    return below, below + 1


def _up(value: int, divisor: int) -> int:
    """Return ``value`` / ``divisor``, rounded up."""
    return -(-value // divisor)


def _nearest(bound: int, precision: int) -> int:
    """Return the integer nearest to 2^BITS · ``bound`` / 2^precision."""
    return ((bound >> precision - BITS - 1) + 1) >> 1


@lru_cache(maxsize=1)
def _shipped() -> dict[str, list[int]]:
    text = resources.files(__package__).joinpath(SHIPPED).read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]
