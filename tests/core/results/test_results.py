import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from rs_plugins.core.certification import certify
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.files import format_down, read_results, write_results
from rs_plugins.core.results.table import Results, as_logged, radius_text
from rs_plugins.errors import InputError, ResultsError, ResultsWarning


def table(*rows):
    """A table of rows (label, prediction, radius)."""
    label, predict, radius = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    label, predict = np.asarray(label, dtype=np.int64), np.asarray(predict, dtype=np.int64)
    radius = np.asarray(radius, dtype=np.float64)
    return Results(np.arange(len(label)), label, predict, radius, predict == label, np.zeros(len(label)))


def certain(n):
    return table(*[(1, 1, 1.0)] * n)


def test_figures_by_hand():
    results = table((1, 1, 0.5), (1, 2, 0.9), (1, -1, 0.0), (2, 2, 0.1))
    assert results.certified_accuracy([0, 0.1, 0.1000001, 0.5, 0.51]).tolist() == [0.5, 0.5, 0.25, 0.25, 0]
    assert results.average_certified_radius == pytest.approx(0.6 / 4)
    assert (results.accuracy, results.abstention) == (0.5, 0.25)


def test_radii_are_decimals_unless_parity_is_asked_for():
    results, r = table((1, 1, 0.825)), 165 * 0.005
    assert r > 0.825
    assert results.certified_accuracy([r]).tolist() == [1]
    assert results.certified_accuracy([r], parity=True).tolist() == [0]


@pytest.mark.parametrize("figure", ["accuracy", "abstention"])
def test_figures_of_an_empty_table_are_nan(figure):
    with pytest.warns(ResultsWarning, match=f"{figure} is undefined: the table has no rows"):
        assert math.isnan(getattr(table(), figure))
    with pytest.warns(ResultsWarning, match="ACR is undefined"):
        assert math.isnan(table().average_certified_radius)
    with pytest.warns(ResultsWarning, match="certified accuracy is undefined"):
        assert np.isnan(table().certified_accuracy([0, 1])).tolist() == [True, True]


@pytest.mark.parametrize("confidence", [0.9, 0.99])
@pytest.mark.parametrize("hits", [0, 1, 17, 39, 40])
def test_intervals_of_certified_accuracy_are_clopper_pearson(hits, confidence):
    results = table(*[(1, 1, 1.0)] * hits, *[(1, 0, 1.0)] * (40 - hits))
    low, high = results.certified_accuracy_interval([0.5, 2.0], confidence=confidence)
    exact = [binomtest(k, 40).proportion_ci(confidence) for k in (hits, 0)]
    np.testing.assert_allclose(low, [interval.low for interval in exact], atol=1e-12)
    np.testing.assert_allclose(high, [interval.high for interval in exact], atol=1e-12)


def test_intervals_know_parity():
    results, r = table((1, 1, 0.825)), 165 * 0.005
    assert results.certified_accuracy_interval([r])[1].tolist() == [1]
    assert results.certified_accuracy_interval([r], parity=True)[0].tolist() == [0]


def test_interval_of_acr():
    draws = np.random.default_rng(1)
    right, radius = draws.random(2000) < 0.7, draws.random(2000)
    results = table(*((1, int(ok), r) for ok, r in zip(right, radius, strict=True)))
    low, high = results.average_certified_radius_interval(confidence=0.9)
    gains = right * radius
    width = 1.645 * gains.std() / math.sqrt(2000)
    assert low == pytest.approx(gains.mean() - width, abs=0.1 * width)
    assert high == pytest.approx(gains.mean() + width, abs=0.1 * width)
    assert results.average_certified_radius_interval(confidence=0.9) == (low, high)
    assert results.average_certified_radius_interval(confidence=0.9, seed=1) != (low, high)
    wide = results.average_certified_radius_interval(confidence=0.99)
    assert wide[0] < low < high < wide[1]
    alone = results.average_certified_radius_interval(resamples=1)
    assert alone[0] == alone[1]


@pytest.mark.filterwarnings("ignore:certified accuracy is undefined:rs_plugins.errors.ResultsWarning")
def test_intervals_of_an_empty_table_are_nan():
    assert np.isnan(table().certified_accuracy_interval([0, 1])).all()
    assert np.isnan(table().average_certified_radius_interval()).all()


def test_intervals_are_checked():
    for interval in (
        partial(certain(3).certified_accuracy_interval, [0.5]),
        certain(3).average_certified_radius_interval,
    ):
        with pytest.raises(InputError, match=r"confidence: expected a number in \(0, 1\), got 1"):
            interval(confidence=1)
    with pytest.raises(InputError, match="resamples: expected an integer >= 1, got 0"):
        certain(3).average_certified_radius_interval(resamples=0)


def test_a_log_of_predictions_has_no_radii():
    results = certain(3)
    predictions = Results(results.idx, results.label, results.predict, None, results.correct, results.seconds)
    assert predictions.accuracy == 1
    with pytest.raises(ResultsError, match="radius: this is a log of predictions, which has no radii"):
        predictions.certified_accuracy([0.5])


@pytest.mark.parametrize("n", [1, 100, 500, 10_000])
@pytest.mark.parametrize("alpha", [0.001, 0.01])
@pytest.mark.parametrize("rho", [0.001, 0.05])
def test_the_lower_bound_is_wrong_no_more_often_than_rho(n, alpha, rho):
    """Exact: more certificates are wrong than were subtracted with probability at most rho, and it is tight."""
    subtracted = round(n * (1 - certain(n).certified_accuracy_lower([0.5], alpha=alpha, rho=rho)[0]))
    assert binom.sf(subtracted, n, alpha) <= rho
    assert subtracted == 0 or binom.sf(subtracted - 1, n, alpha) > rho


@pytest.mark.parametrize(("n", "subtracted"), [(10_000, 0.0020610), (500, 0.0093202)])
def test_the_published_lower_bound(n, subtracted):
    published = certain(n).certified_accuracy_lower([0.5], alpha=0.001, parity=True)
    assert 1 - published[0] == pytest.approx(subtracted, abs=1e-7)


def test_the_published_lower_bound_fails_too_often():
    """Why it is not the default."""
    subtracted = 1 - certain(10_000).certified_accuracy_lower([0.5], alpha=0.001, rho=0.001, parity=True)[0]
    assert binom.sf(math.floor(10_000 * subtracted), 10_000, 0.001) > 0.001


@pytest.mark.parametrize("name", ["alpha", "rho"])
def test_probabilities_of_the_lower_bound_are_checked(name):
    with pytest.raises(InputError, match=rf"{name}: expected a number in \(0, 1\), got 0"):
        certain(3).certified_accuracy_lower([0.5], **({"alpha": 0.1} | {name: 0}))


def test_the_published_lower_bound_compares_radii_as_published():
    table, radii = certain(4), [0.8250000000000001]
    object.__setattr__(table, "radius", np.full(4, 0.825))
    assert table.certified_accuracy(radii, parity=True) == [0]
    assert table.certified_accuracy_lower(radii, alpha=0.001, parity=True) < 0
    assert table.certified_accuracy_lower(radii, alpha=0.001) > 0


AWKWARD = [128 / 255, 1 / 3, 2 / 3, math.sqrt(3) / 2, 8 / 255, math.sqrt(14) / 255, 0.3, 0.1 + 0.2, 0.7999999999999999]


@pytest.mark.parametrize("radius", AWKWARD, ids=repr)
def test_what_is_certified_at_a_radius_is_so_in_memory_and_in_its_log(radius, tmp_path):
    def sure(images):
        return np.tile([1.0, 0.0], (len(images), 1))

    images = torch.zeros(2, 1, 2, 2)
    found = list(certify(sure, images, 0.5, plan=OnGrid([radius / 2, radius], n=2000), classes=2))
    table = Results.of(found, [0, 1])
    write_results(tmp_path / "log.tsv", table)
    for results in (table, read_results(tmp_path / "log.tsv")):
        assert results.certified_accuracy([radius / 2, radius, radius * (1 + 1e-6)]).tolist() == [0.5, 0.5, 0.0]


@given(st.floats(0, 1e3, allow_subnormal=False))
def test_a_radius_as_it_is_logged(radius):
    logged = as_logged(radius)
    assert radius * (1 - 2e-7) - 1e-12 <= logged <= radius + 1e-12
    assert float(radius_text(radius)) == logged == as_logged(logged)
    assert logged == float(format_down(round(radius, 12)))  # out of a grid of floats 1.9999999999998863 is 2


@pytest.mark.parametrize(("radius", "text"), [(0.25, "0.25"), (2, "2"), (128 / 255, "0.50196078"), (1e-5, "1e-05")])
def test_a_radius_in_a_table(radius, text):
    assert radius_text(radius) == text
