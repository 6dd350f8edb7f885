import numpy as np
import pytest

from rs_plugins.core.report import Curve, default_radii, envelope, figures, read_log
from rs_plugins.core.results import Results
from rs_plugins.errors import ResultsError


def table(radius):
    n, label = len(radius), np.zeros(len(radius), dtype=np.int64)
    return Results(np.arange(n), label, label, np.array(radius, dtype=float), label == 0, np.zeros(n))


CURVE = Curve(np.array([0.0, 0.1, 0.2]), np.array([0.9, 0.5, 0.0]))


def test_a_curve_is_never_read_in_its_favour():
    accuracy = CURVE.certified_accuracy([0, 0.05, 0.1, 0.1000000001, 0.15, 0.2, 0.3])
    np.testing.assert_array_equal(accuracy, [0.9, 0.5, 0.5, 0.5, 0.0, 0.0, np.nan])


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_curves_are_read(tmp_path, ends):
    (tmp_path / "acc").write_bytes(ends.join(["0.00000\t0.9", "0.10000\t0.5", ""]).encode())
    curve = read_log(tmp_path / "acc")
    assert (curve.radii.tolist(), curve.accuracy.tolist()) == ([0, 0.1], [0.9, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\t0.9\nx\t0.5\n", r"acc, line 2: expected a radius and an accuracy, got 'x\\t0.5'"),
        ("0\t0.9\n0.1\n", r"acc, line 2: expected a radius and an accuracy, got '0.1'"),
        ("0\t1.2\n", r"acc, line 1: expected a radius and an accuracy"),
        ("-1\t0.2\n", r"acc, line 1: expected a radius and an accuracy"),
        ("0\tnan\n", r"acc, line 1: expected a radius and an accuracy"),
        ("0\t0.9\n0\t0.8\n", r"acc: expected increasing radii"),
    ],
)
def test_curves_that_cannot_be(tmp_path, text, message):
    (tmp_path / "acc").write_text(text)
    with pytest.raises(ResultsError, match=message):
        read_log(tmp_path / "acc")


@pytest.mark.parametrize(
    ("radii", "grid"),
    [
        ([0.953], [0, 0.25, 0.5, 0.75, 1]),
        ([0.25], [0, 0.25, 0.5]),
        ([0.1], [0, 0.0625, 0.125]),
        ([4.5], [0.25 * place for place in range(20)]),
        ([9.9], [1.0 * place for place in range(11)]),
        ([0.0], [0, 0.25]),
        ([], [0, 0.25]),
    ],
)
def test_default_radii(radii, grid):
    assert default_radii({"a": table(radii)}) == grid


def test_default_radii_look_at_all_logs():
    wrong = table([3.0])
    object.__setattr__(wrong, "correct", np.array([False]))
    logs = {"a": table([0.3]), "b": CURVE, "c": wrong}
    assert default_radii(logs) == [0, 0.25, 0.5]
    assert default_radii({"b": CURVE}) == [0, 0.0625, 0.125]
    assert default_radii({}) == [0, 0.25]


def test_the_envelope_leaves_out_what_is_not_known():
    rows = [figures("curve", CURVE, [0.1, 0.5]), figures("log", table([0.2, 0.6, 0.0, 0.0]), [0.1, 0.5])]
    assert [(at.radius, at.accuracy, at.name) for at in envelope(rows)] == [(0.1, 0.5, "log"), (0.5, 0.25, "log")]
    assert envelope([]) == []


def test_a_curve_that_does_not_begin_at_zero_has_no_clean_accuracy():
    assert figures("x", CURVE, [0.1]).clean == 0.9
    assert figures("x", Curve(CURVE.radii + 0.1, CURVE.accuracy), [0.1]).clean is None
