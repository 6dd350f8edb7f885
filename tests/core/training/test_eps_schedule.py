"""The ramp of the radius: golden values of the specification, and its formula with other numbers."""

from fractions import Fraction

import pytest

from rs_plugins.core.training.eps_schedule import SmoothEps, clean_weight
from rs_plugins.errors import InputError

GOLDEN = {
    "smooth": [Fraction(0), Fraction(1, 208), Fraction(1, 13), Fraction(5, 13), Fraction(9, 13), Fraction(1)],
    "linear": [Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)],
}
PLACES = [Fraction(0), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), Fraction(1)]


@pytest.mark.parametrize("shape", GOLDEN)
@pytest.mark.parametrize(("start", "length"), [(0, 20), (1, 80), (2.5, 3)])
def test_golden_values(shape, start, length):
    ramp = SmoothEps(0.3, start, length, shape)
    for place, share in zip(PLACES, GOLDEN[shape], strict=True):
        elapsed = start + float(place) * length
        assert ramp.share(elapsed) == pytest.approx(float(share), abs=1e-12)
        assert ramp(elapsed) == pytest.approx(0.3 * float(share), abs=1e-12)


def test_the_formula_of_the_smooth_ramp():
    eps, start, length = 0.2, 1.0, 7.0
    ramp, t1 = SmoothEps(eps, start, length), length / 4
    q = eps / (t1**4 + 4 * t1**3 * (length - t1))
    for t in (0.1, 0.9, 1.7, 1.8, 3.3, 6.9):
        expected = q * t**4 if t <= t1 else q * t1**4 + 4 * q * t1**3 * (t - t1)
        assert ramp(start + t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", GOLDEN)
def test_nothing_before_and_all_of_it_after(shape):
    ramp = SmoothEps(0.1, 2, 3, shape)
    assert [ramp(elapsed) for elapsed in (0, 1.9, 2.0)] == [0, 0, 0]
    assert ramp(2.01) > 0
    assert [ramp(elapsed) for elapsed in (ramp.end, 5.01, 70)] == [0.1] * 3
    assert ramp(4.99) < 0.1


def test_without_a_ramp_it_begins_at_once():
    ramp = SmoothEps(0.1, 2, 0)
    assert [ramp(elapsed) for elapsed in (0, 1.99, 2, 3)] == [0, 0, 0.1, 0.1]
    assert SmoothEps(0.1, 0, 0)(0) == 0.1


def test_the_clean_loss_gives_way_along_the_ramp():
    assert [clean_weight(share, 0.75) for share in (0, 0.5, 1)] == [1, 0.625, 0.25]
    assert clean_weight(1, 1) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((-0.1,), "eps: expected a finite number >= 0, got -0.1"),
        ((0.1, -1), "start: expected a finite number >= 0, got -1"),
        ((0.1, 0, float("inf")), "length: expected a finite number >= 0, got inf"),
        ((0.1, 0, 1, "cosine"), "shape: expected one of 'smooth', 'linear', got 'cosine'"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SmoothEps(*settings)
