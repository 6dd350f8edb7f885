"""Arithmetic that errs on the safe side: numbers of double precision that are proved to be below or above a true value.

A bound is found in double precision and then compared with the true value, computed to 60 digits by series whose terms
are all positive, so that nothing cancels, and whose rest is bounded. What that computation itself may be off by, less
than 1e-37 of it, is below `LESS` and `MORE`, by which the result is moved to the safe side.
"""

import decimal
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache

from scipy.special import ndtri

# 1 - 1e-34 and 1 + 1e-34, written out: a sum would be rounded to the 28 digits of the usual context, that is to 1.
LESS, MORE = Decimal(f"0.{'9' * 34}"), Decimal(f"1.{'0' * 33}1")
_CONTEXT = decimal.Context(
    prec=60,
    rounding=decimal.ROUND_HALF_EVEN,
    Emin=decimal.MIN_EMIN,
    Emax=decimal.MAX_EMAX,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_TWO_PI = Decimal("6.28318530717958647692528676655900576839433879875021164194988918")
_FARTHEST = 9.0  # from here on the normal distribution function is 1 in double precision
_RAREST, _OUTERMOST = 1e-25, 12.0  # of a smaller probability the quantile is not computed; it lies beyond -12
_EXACT_FACTORIALS = 256
_STIRLING = (  # B_2i / (2i·(2i - 1)), i = 1 … 10
    *((1, 12), (-1, 360), (1, 1260), (-1, 1680), (1, 1188), (-691, 360360)),
    *((1, 156), (-3617, 122400), (43867, 244188), (-174611, 125400)),
)
_ONE = 2**128  # a term of 1 in a sum of integers


@contextmanager
def sixty_digits() -> Iterator[None]:
    """Compute with `decimal.Decimal` to 60 digits, whatever the caller's context says."""
    with decimal.localcontext(_CONTEXT):
        yield


def float_below(value: Decimal | Fraction) -> float:
    """Return the largest float that is at most ``value``, as it is and as it is printed (`repr`)."""
    exact = Fraction(value)
    try:
        number = float(exact)
    except OverflowError:
        number = sys.float_info.max if exact > 0 else -math.inf
    while number > -math.inf and max(Fraction(number), Fraction(repr(number))) > exact:
        number = math.nextafter(number, -math.inf)
    return number


def float_above(value: Decimal | Fraction) -> float:
    """Return the smallest float that is at least ``value``, as it is and as it is printed (`repr`)."""
    return -float_below(-Fraction(value))


def decimals_below(value: float, places: int) -> str:
    """Return a number >= 0 to so many decimals, rounded down: of what `repr` prints, so that 0.3 stays 0.3."""
    step = Decimal(1).scaleb(-places)
    return f"{Decimal(repr(float(value))).quantize(step, rounding=decimal.ROUND_DOWN):f}"


def digits_below(value: float, digits: int) -> str:
    """Return a number >= 0 as a decimal of at most so many significant digits, rounded down: 0.3 stays 0.3, too."""
    rounded = decimal.Context(prec=digits, rounding=decimal.ROUND_DOWN).create_decimal(Decimal(repr(float(value))))
    return f"{rounded:f}"


def product_below(*factors: float) -> float:
    """Return a product of finite numbers, rounded down."""
    return float_below(math.prod(map(Fraction, factors), start=Fraction(1)))


def quotient_above(dividend: float, divisor: float) -> float:
    """Return a quotient of finite numbers, rounded up."""
    return float_above(Fraction(dividend) / Fraction(divisor))


def lowered(bound: float, fits: Callable[[float], bool]) -> float:
    """Return the first number at or a little below ``bound`` that fits: the distance doubles, from one rounding on."""
    step, number = max(abs(bound) * 2**-52, 5e-324), bound
    while not fits(number):
        number, step = bound - step, 2 * step
    return number


def normal_cdf_above(x: float) -> float:
    """Return Φ(x), x >= 0, rounded up; 1 from 9 on."""
    with sixty_digits():
        if x >= _FARTHEST:
            return 1.0
        return min(1.0, float_above(Fraction(1, 2) + Fraction(_central(x) * MORE)))  # 60 digits may not hold the sum


@lru_cache(maxsize=4096)
def normal_quantile_below(p: float) -> float:
    """Return Φ⁻¹(p) for p in (0, 1], rounded down; -infinity for p < 1e-25."""
    if p >= 1:
        return math.inf
    return -math.inf if p < _RAREST else _quantile_below(float(ndtri(p)), Fraction(p))


@lru_cache(maxsize=4096)
def normal_quantile_above(p: float) -> float:
    """Return Φ⁻¹(p) for p in [0, 1), rounded up; of p < 1e-25 that of 1e-25."""
    p = max(p, _RAREST)
    return -_quantile_below(-float(ndtri(p)), 1 - Fraction(p))


def binomial_tail_above(k: int, n: int, p: Fraction) -> Fraction:
    """Return P(Bin(n, p) >= k), 0 <= k <= n, 0 < p < 1, rounded up, by less than one part in 1e25.

    Where it can be a float, which takes k = n and n <= 1100, it is exact: such a bound may be met.
    """
    if k == 0 or k == n <= 1100:
        return p**k
    with sixty_digits():
        log = _log_factorial(n) - _log_factorial(k) - _log_factorial(n - k)
        log += k * _log(p) + (n - k) * _log(1 - p)
        return Fraction(log.exp() * _sum_of_ratios(k, n, p) * MORE)


def _central(x: float) -> Decimal:
    """Return Φ(x) - 1/2, 0 <= x <= 12: φ(x)·(x + x³/3 + x⁵/(3·5) + …), to a relative error below 1e-50."""
    exact = Decimal(x)
    square, term, total, odd = exact * exact, exact, exact, 1
    while odd < 2 * square or term > total * Decimal("1e-58"):  # later on the rest is less than the last term
        odd += 2
        term = term * square / odd
        total += term
    return total * (-square / 2).exp() / _TWO_PI.sqrt()


def _quantile_below(guess: float, p: Fraction) -> float:
    def fits(x: float) -> bool:
        """Whether Φ(x) <= p for sure."""
        if x >= 0:
            return x < _OUTERMOST and Fraction(_central(x) * MORE) <= p - Fraction(1, 2)
        return Fraction(_central(min(-x, _OUTERMOST)) * LESS) >= Fraction(1, 2) - p

    with sixty_digits():
        return lowered(guess, fits)


def _log(value: Fraction) -> Decimal:
    return (Decimal(value.numerator) / Decimal(value.denominator)).ln()


@lru_cache(maxsize=4096)
def _log_factorial(n: int) -> Decimal:
    """Return ln n!, from 256 on by Stirling's series, whose error is below its first term left out, here 1e-48."""
    if n < _EXACT_FACTORIALS:
        return Decimal(math.factorial(n)).ln()
    m = Decimal(n)
    total = (m + Decimal("0.5")) * m.ln() - m + _TWO_PI.ln() / 2
    power = m
    for above, below in _STIRLING:
        total += Decimal(above) / (below * power)
        power *= m * m
    return total


def _sum_of_ratios(k: int, n: int, p: Fraction) -> Decimal:
    """Return Σ_{j >= k} P(Bin = j) / P(Bin = k), rounded up.

    Each term is rounded up to a multiple of 2**-128, and the rest is at most a geometric series.
    """
    rate, other = p.numerator, p.denominator - p.numerator
    total, term = 0, _ONE
    for j in range(k, n + 1):
        total += term
        up, down = (n - j) * rate, (j + 1) * other
        term = term * up // down + 1
        if up < down and term < total >> 90:
            total += term * down // (down - up) + 1
            break
    return Decimal(total) / _ONE
