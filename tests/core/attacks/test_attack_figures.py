import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from rs_plugins.core.attacks.figures import AttackEvaluation, Predictions, Violations
from rs_plugins.core.proportions import Proportion
from rs_plugins.errors import InputError

LABEL = np.array([0, 1, 2, 0, 1])
BEFORE = np.array([0, 1, 2, -1, 2])  # three correct, one abstention, one wrong
AFTER = np.array([1, 1, -1, 0, 0])  # of the three correct ones: one turned, one kept, one undecided
COUNTS = np.array([[60, 30, 10], [0, 99, 0], [10, 10, 80], [50, 50, 0], [20, 20, 60]])  # one vote was NaN
L2 = np.array([0.5, 0.1, 0.2, 0.3, 0.4])


def evaluation(**changes):
    settings = {
        "before": Predictions(LABEL, BEFORE, COUNTS, 100),
        "after": Predictions(LABEL, AFTER, COUNTS[::-1], 100),
        "l2": L2,
        "linf": L2 / 2,
        "indices": np.array([10, 11, 12, 13, 14]),
        "sigma": 0.25,
        "alpha": 0.001,
        "confidence": 0.95,
        "seed": 3,
    }
    return AttackEvaluation(**{**settings, **changes})


@pytest.mark.parametrize("confidence", [0.95, 0.8])
@pytest.mark.parametrize(("count", "total"), [(0, 7), (3, 7), (7, 7), (1, 1), (980, 1000)])
def test_the_interval_is_clopper_and_pearsons(count, total, confidence):
    low, high = binomtest(count, total).proportion_ci(confidence, method="exact")
    share = Proportion(count, total, confidence)
    assert share.interval == pytest.approx((low, high), abs=1e-12)
    assert share.share == count / total


def test_a_share_of_nothing():
    assert math.isnan(Proportion(0, 0).share)
    assert Proportion(0, 0).as_dict() == {"count": 0, "total": 0, "share": None, "interval": [0.0, 1.0]}


def test_an_abstention_is_neither_correct_nor_wrong():
    before = evaluation().before
    assert before.correct.tolist() == [True, True, True, False, False]
    assert before.abstained.tolist() == [False, False, False, True, False]
    assert before.wrong.tolist() == [False, False, False, False, True]


def test_votes_that_failed_lower_the_share():
    assert evaluation().before.share.tolist() == [0.6, 0.99, 0.8, 0.5, 0.2]


def test_figures():
    found = evaluation(confidence=0.9)
    assert len(found) == 5
    assert found.success.tolist() == [True, False, False, False, False]
    assert found.clean_accuracy == Proportion(3, 5, 0.9)
    assert found.robust_accuracy == Proportion(2, 5, 0.9)
    assert found.success_rate == Proportion(1, 3, 0.9)
    assert found.abstention_rate == Proportion(1, 3, 0.9)


def test_plain_data_says_all_that_is_known():
    found = json.loads(json.dumps(evaluation().as_dict(), allow_nan=False))
    assert found["settings"] == {
        **{"images": 5, "votes": 100, "sigma": 0.25, "alpha": 0.001, "confidence": 0.95, "seed": 3}
    }
    figures = found["figures"]
    assert figures["success_rate"] == {
        **{"count": 1, "total": 3, "share": 1 / 3},
        "interval": list(Proportion(1, 3).interval),
    }
    counts = {name: value["count"] for name, value in figures.items() if isinstance(value, dict) and "count" in value}
    assert counts == {
        **{"clean_accuracy": 3, "robust_accuracy": 2, "success_rate": 1, "abstention_rate": 1},
        **{"abstained_before": 1, "abstained_after": 1, "wrong_before": 1, "wrong_after": 2},
    }
    assert figures["mean_share_before"] == pytest.approx((0.6 + 0.99 + 0.8 + 0.5 + 0.2) / 5)
    assert figures["mean_share_after"] == pytest.approx((0.2 + 0.5 + 0.8 + 0.0 + 0.3) / 5)
    assert figures["l2"] == pytest.approx({"mean": 0.3, "median": 0.3, "max": 0.5})
    assert figures["l2_of_successes"] == {"mean": 0.5, "median": 0.5, "max": 0.5}
    assert figures["linf"] == pytest.approx({"mean": 0.15, "median": 0.15, "max": 0.25})
    assert found["images"] == {
        **{"index": [10, 11, 12, 13, 14], "label": LABEL.tolist()},
        **{"prediction_before": BEFORE.tolist(), "prediction_after": AFTER.tolist()},
        **{"counts_before": COUNTS.tolist(), "counts_after": COUNTS[::-1].tolist()},
        **{"l2": L2.tolist(), "linf": (L2 / 2).tolist()},
    }


TEXT = """\
% of images                        before  90% interval  after  90% interval
correct                             60.00     18.9-92.4  40.00      7.6-81.1
abstained                           20.00      1.0-65.7  20.00      1.0-65.7
wrong                               20.00      1.0-65.7  40.00      7.6-81.1
mean share of votes for the label   61.80                36.00

% of those correct before       after  90% interval  images
attack success (another class)  33.33      1.7-86.5  1 of 3
abstained instead               33.33      1.7-86.5  1 of 3

perturbation, pixels    mean  median     max
l2                    0.3000  0.3000  0.5000
l2 of the successes   0.5000  0.5000  0.5000
linf                  0.1500  0.1500  0.2500

5 images, sigma 0.25; PREDICT with 100 votes at alpha 0.001, which may abstain; Clopper-Pearson intervals over images"""


def test_the_tables():
    assert str(evaluation(confidence=0.9)) == TEXT


def test_nothing_correct_before_leaves_rates_open():
    found = evaluation(before=Predictions(LABEL, np.full(5, -1), COUNTS, 100))
    assert found.as_dict()["figures"]["l2_of_successes"] is None
    lines = str(found).splitlines()
    assert "attack success (another class)      -     0.0-100.0  0 of 0" in lines
    assert "l2 of the successes        -       -       -" in lines


def test_a_violation_is_another_class_strictly_inside_the_radius():
    certified = [0, 1, 2, 0, 1]
    radii = [0.5, 0.2, 0.3, 0.31, 0.41]  # the first perturbation is exactly as long as the radius
    assert evaluation().violations(certified, radii) == Violations((11, 12, 13, 14), (14,))
    assert evaluation().violations(np.array(certified), np.array([0.6, 0.2, 0.3, 0.31, 0.4])) == Violations(
        (10, 11, 12, 13), (10,)
    )


def test_certificates_in_linf():
    found, certified = evaluation(), [0, 1, 2, 0, 1]
    linf = found.linf.tolist()
    assert found.violations(certified, linf, norm="linf") == Violations((), ())
    assert found.violations(certified, [2 * length for length in linf], norm="linf") == Violations(
        (10, 11, 12, 13, 14), (10, 14)
    )
    with pytest.raises(
        InputError, match="norm: expected 'l2' or 'linf', in which perturbations are measured, got 'l1'"
    ):
        found.violations(certified, linf, norm="l1")


def test_abstentions_certify_nothing():
    assert evaluation().violations([-1] * 5, [9.0] * 5) == Violations((), ())


@pytest.mark.parametrize(
    ("predictions", "radii", "message"),
    [
        ([0] * 4, [0.0] * 5, r"predictions: expected one per image, shape \(5,\), got shape \(4,\)"),
        ([0] * 5, [[0.0]] * 5, r"radii: expected one per image, shape \(5,\), got shape \(5, 1\)"),
        ([0] * 5, [math.nan] * 5, r"radii: expected numbers, got NaN"),
    ],
)
def test_certificates_that_do_not_fit(predictions, radii, message):
    with pytest.raises(InputError, match=message):
        evaluation().violations(predictions, radii)


def test_confidence_is_a_probability():
    with pytest.raises(InputError, match=r"confidence: expected a number in \(0, 1\), got 95"):
        evaluation(confidence=95)
