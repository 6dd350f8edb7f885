from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rs_plugins.core.noise_families import lattice_thresholds as module
from rs_plugins.core.noise_families.lattice_thresholds import (
    computed_thresholds,
    half_width,
    reach,
    rounded_normal,
    upper_thresholds,
)

SHIPPED = (0.12, 0.25, 0.5, 1.0)


def nearest(x, bits=200):
    """2^60 · Φ(x), rounded to the nearest integer by an independent library."""
    with mpmath.workprec(bits):
        return int(mpmath.nint(mpmath.mpf(2) ** 60 * mpmath.ncdf(mpmath.mpf(x.numerator) / x.denominator)))


def independent(sigma, levels):
    """All thresholds from `half_width` below zero to as many above, each rounded from 200 bits."""
    points = [(2 * i + 1) / (2 * levels * Fraction(sigma)) for i in range(-half_width(sigma, levels), 0)]
    lower = [nearest(x) for x in points]
    upper = [nearest(-x) for x in reversed(points)]
    return lower + upper


@pytest.mark.parametrize(
    ("sigma", "levels"), [*((sigma, 255) for sigma in SHIPPED), (0.37, 200), (0.05, 255), (1.3, 16)]
)
def test_all_thresholds_are_those_of_an_independent_computation(sigma, levels):
    upper = list(upper_thresholds(sigma, levels))
    assert [2**60 - t for t in reversed(upper)] + upper == independent(sigma, levels)


@pytest.mark.parametrize("sigma", SHIPPED)
def test_the_file_holds_what_is_computed(sigma):
    assert tuple(module._shipped()[repr(sigma)]) == computed_thresholds(sigma, 255)
    assert set(module._shipped()) == set(map(repr, SHIPPED))


# The reference figures of the thresholds at 0 and 63, and how many there are in all.
GOLDEN = {
    0.25: (580068159508144260, 968908292660777484, 1020),
    0.5: (578264469775074845, 796405661891184900, 2040),
    1.0: (577362612772925535, 689824287478748143, 3570),
}


@pytest.mark.parametrize("sigma", GOLDEN)
def test_golden_thresholds(sigma):
    thresholds = upper_thresholds(sigma, 255)
    assert (thresholds[0], thresholds[63], 2 * len(thresholds)) == GOLDEN[sigma]


def test_a_file_for_255_levels_says_nothing_of_others():
    assert upper_thresholds(0.25, 510)[:2] != upper_thresholds(0.25, 255)[:2]
    assert upper_thresholds(0.25, 510)[1] == rounded_normal(Fraction(3, 255))  # 3 / (2 · 510 · 0.25)


@settings(max_examples=50)
@given(st.fractions(min_value=Fraction(1, 10**6), max_value=Fraction(10**7 - 1, 10**6), max_denominator=10**6))
def test_bounds_hold_the_exact_value_between_them(x):
    for precision in (70, 160):
        low, high = module._normal_between(x, precision)
        with mpmath.workprec(400):
            value = mpmath.ncdf(mpmath.mpf(x.numerator) / x.denominator) * mpmath.mpf(2) ** precision
            assert low <= value <= high
        assert high - low < 2**82  # the largest terms of the series are below 2^72
    assert rounded_normal(x) == nearest(x)


def test_far_out_everything_is_rounded_to_the_end():
    assert rounded_normal(Fraction(10)) == rounded_normal(Fraction(10**9)) == 2**60 == nearest(Fraction(10))
    assert rounded_normal(Fraction(99, 10)) == nearest(Fraction(99, 10))
    assert rounded_normal(Fraction(1, 10**30)) == 2**59


def test_where_the_bounds_are_too_wide_more_bits_decide_or_nothing_does(monkeypatch):
    x = Fraction(7)
    assert module._normal_between(x, 62) != module._normal_between(x, 160)
    monkeypatch.setattr(module, "_PRECISIONS", (62, 160))
    assert rounded_normal(x) == nearest(x)
    monkeypatch.setattr(module, "_PRECISIONS", (62,))
    with pytest.raises(ArithmeticError, match="x: expected a number at which Φ can be rounded, got 7"):
        rounded_normal(x)


def test_pi():
    with mpmath.workprec(400):
        assert mpmath.mpf(module._PI) / 10**99 < mpmath.pi < mpmath.mpf(module._PI + 1) / 10**99
    low, high = module._one_over_root_of_two_pi(100)
    with mpmath.workprec(400):
        assert low <= mpmath.mpf(2) ** 100 / mpmath.sqrt(2 * mpmath.pi) <= high <= low + 2


def test_reach():
    assert [reach(sigma) for sigma in (0.01, 0.12, 0.25, 0.34, 0.5, 1.0)] == [1, 1, 1, 2, 3, 6]
    assert (half_width(0.25, 255), half_width(1.0, 16)) == (510, 112)
