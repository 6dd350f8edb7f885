import json
import warnings
from dataclasses import replace

import numpy as np
import pytest

from rs_plugins.core.plans.anytime import Anytime
from rs_plugins.core.plans.at_radius import AtRadius
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.results.comparison import (
    Curve,
    default_radii,
    differing,
    envelope,
    figures,
    incomparable,
    read_log,
)
from rs_plugins.core.results.files import write_results
from rs_plugins.core.results.logged_plan import LoggedPlan, read_plan, understood
from rs_plugins.core.results.table import Results
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


@pytest.mark.parametrize(
    ("text", "short", "radii"),
    [
        (repr(FixedBudget(n=1000)), "FixedBudget n=1000", ()),
        (repr(Anytime(n=500)), "Anytime n=500", ()),
        (repr(AtRadius(0.5, n=500)), "AtRadius 0.5 n=500", (0.5,)),
        (repr(OnGrid([0, 0.25], n=500)), "OnGrid 0/0.25 n=500", (0.0, 0.25)),
        ("OnGrid([0, 0.25], n=500)", "OnGrid 0/0.25 n=500", (0.0, 0.25)),
        ("OnGrid((0.5,))", "OnGrid 0.5", (0.5,)),
        ("AtRadius(0.5)", "AtRadius 0.5", (0.5,)),
        ("Theirs(r=0.5, n=3)", "Theirs n=3", ()),
        ("<theirs at 0x7f>", "<theirs at 0x7f>", ()),
        ("Theirs(what=object)", "Theirs(what=object)", ()),
        ("AtRadius(r='far')", "AtRadius(r='far')", ()),
    ],
)
def test_plans_are_understood(text, short, radii):
    assert understood(text) == LoggedPlan(text, short, radii)


def test_the_plan_is_in_the_record(tmp_path):
    log, record = tmp_path / "x.tsv", tmp_path / "x.tsv.json"
    assert read_plan(log) is None
    for content in ("{", "[]", "{}", '{"plan": 3}', '{"plan": ""}'):
        record.write_text(content)
        assert read_plan(log) is None
    record.write_text(json.dumps({"plan": "Anytime(n=10)"}))
    assert read_plan(log) == LoggedPlan("Anytime(n=10)", "Anytime n=10")


LOG = table([0.5, 0.5, 0.0, 0.5])


def test_what_a_plan_does_not_tell_is_not_shown():
    any_radius = figures("x", LOG, [0, 0.5, 0.7], plan=understood("FixedBudget(n=9)"))
    assert (any_radius.clean, any_radius.acr, any_radius.certified[2].accuracy) == (1, 0.375, 0)
    one = figures("x", LOG, [0, 0.5, 0.7], alpha=0.01, plan=understood("AtRadius(r=0.5)"))
    assert (one.clean, one.acr, one.acr_interval) == (None, None, None)
    assert [at.accuracy for at in one.certified[:2]] == [1, 0.75]
    assert np.isnan(one.certified[2].accuracy)
    assert (one.certified[2].interval, one.certified[2].lower) == (None, None)
    at_zero = figures("x", LOG, [0], plan=understood("AtRadius(r=0)"))
    assert (at_zero.clean, at_zero.acr) == (1, None)
    grid = figures("x", LOG, [0.5, 0.7], plan=understood("OnGrid(radii=(0.0, 0.5))"))
    assert (grid.clean, grid.acr) == (1, 0.375)
    assert np.isnan(grid.certified[1].accuracy)
    assert figures("x", LOG, [0.5], plan=understood("OnGrid(radii=(0.25, 0.5))")).clean is None


def test_a_log_that_cannot_say_is_not_the_best():
    rows = [
        figures("one", table([0.5]), [0.5, 0.75], plan=understood("AtRadius(r=0.5)")),
        figures("any", table([0.1]), [0.5, 0.75]),
    ]
    assert [at.name for at in envelope(rows)] == ["one", "any"]


def test_default_radii_are_those_of_plans():
    one, grid = understood("AtRadius(r=0.3)"), understood("OnGrid(radii=(0.0, 0.3, 0.4))")
    assert default_radii({"a": LOG, "b": LOG}, {"a": one, "b": grid}) == [0, 0.3, 0.4]
    assert default_radii({"a": LOG, "b": LOG}, {"a": one, "b": None}) == [0, 0.25, 0.3, 0.5, 0.75]
    many = LoggedPlan("x", "x", tuple(np.arange(1, 21) / 100))
    assert default_radii({"a": LOG, "b": LOG}, {"a": many, "b": None}) == [0, 0.25, 0.5, 0.75]


def test_what_can_be_compared():
    same, other_images = table([0.1] * 4), replace(LOG, idx=LOG.idx + 1)
    other_labels, empty = replace(LOG, label=LOG.label + 1), table([])
    predictions = replace(other_images, radius=None)
    assert incomparable({"a": LOG, "b": same, "empty": empty, "predictions": predictions}) is None
    for other in (other_images, other_labels, table([0.1])):
        assert incomparable({"a": LOG, "b": same, "c": other}) == "a and c are not of the same images"
    assert incomparable({"a": LOG, "b": CURVE}) == "b is a curve, which does not say of which images it is"


def test_the_lower_bound_compares_radii_as_the_curve_does():
    (at,) = figures("log", table([0.825] * 4), [0.8250000000000001], alpha=0.001, parity=True).certified
    assert (at.accuracy, at.lower) == (0, 0)


@pytest.mark.parametrize(("record", "said"), [({"start": 0, "stop": 6, "skip": 2, "shard": [0, 1]}, 3), (None, 0)])
def test_a_log_that_is_not_finished_is_reported_with_a_warning(tmp_path, record, said):
    log = tmp_path / "log.tsv"
    write_results(log, replace(table([0.5, 0.5]), idx=np.array([0, 2])))
    (tmp_path / "log.tsv.json").write_text(json.dumps({"images": 9, "selection": record}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read_log(log)
    texts = [str(warning.message) for warning in seen]
    assert texts == ([f"{log}: not finished: 2 of 3 images; the figures are of these alone"] if said else [])


def test_settings_in_which_logs_differ_are_told():
    first, second = table([0.5]), table([0.5])
    assert differing({"a": first, "b": second}) == []
    for log, sigma, alpha in ((first, 0.25, 0.001), (second, 0.25, 0.01)):
        object.__setattr__(log, "sigma", sigma)
        object.__setattr__(log, "alpha", alpha)
    (told,) = differing({"a": first, "b": second})
    assert told.startswith("The logs have different failure probabilities alpha: 0.001 (a), 0.01 (b).")
