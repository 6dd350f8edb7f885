"""certify: Cohen et al.'s certificates, reproducible per image."""

import numpy as np
import pytest
import torch
from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing
from scipy.stats import binom, norm
from torch import nn

from rs_plugins.core.certification import Certificate, certify
from rs_plugins.core.decisions import PROBES
from rs_plugins.core.plans.anytime import Anytime
from rs_plugins.core.plans.at_radius import AtRadius
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.plans.on_grid import OnGrid
from rs_plugins.core.votes import Poll
from rs_plugins.errors import InputError
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, Sharp, cnn


@pytest.fixture
def classifier():
    return SmoothedClassifier(cnn(20), 0.1)


def test_labels_and_radii_are_the_records(classifier, x):
    labels, radii = classifier.certify(x, 300)
    records = list(classifier.certificates(x, 300))
    assert all(isinstance(record, Certificate) for record in records)
    assert (labels.dtype, radii.dtype) == (np.int64, np.float64)
    assert labels.tolist() == [record.prediction for record in records]
    assert radii.tolist() == [record.radius for record in records]
    assert ((labels == -1) == (radii == 0)).all()
    assert (labels >= 0).any()
    first = records[0]
    assert (first.n0, first.n, first.made_with.sigma, first.made_with.alpha) == (100, 300, 0.1, 0.001)
    assert (first.made_with.seed, first.made_with.bound, first.index) == (0, "clopper-pearson", 0)


def test_the_bound_is_the_one_of_arts_certifier(classifier, x):
    host = PyTorchRandomizedSmoothing(cnn(), nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu", alpha=0.001)
    for record in classifier.certificates(x, 300):
        theirs = host._lower_confidence_bound(np.int64(record.count), 300)
        assert record.p_lower == pytest.approx(float(theirs), abs=1e-12)
        if record.prediction >= 0:
            assert record.radius == pytest.approx(0.1 * norm.ppf(float(theirs)), abs=1e-12)


def keys(records):
    return [(r.index, r.prediction, r.radius, r.count, r.guess) for r in records]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_results_depend_on_seed_and_index_alone(chunk, classifier, x):
    expected = keys(classifier.certificates(x, 200))
    again = SmoothedClassifier(cnn(20), 0.1, chunk=chunk, samples=3, noise="fresh")
    assert keys(again.certificates(x, 200)) == expected
    order = [3, 0, 4, 1, 2]
    assert keys(again.certificates(x[order], 200, indices=order)) == [expected[i] for i in order]
    assert keys(again.certificates(x[2:4], 200, indices=[2, 3])) == expected[2:4]
    labels, radii = again.certify(x, 200, batch_size=1)
    assert labels.tolist() == [key[1] for key in expected]
    assert radii.tolist() == [key[2] for key in expected]


def test_an_earlier_call_changes_nothing(classifier, x, y):
    expected = keys(classifier.certificates(x, 100))
    classifier.loss_gradient(x, y)
    classifier.certify(x, 50)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  the global generator is what must not matter
    assert keys(classifier.certificates(x, 100)) == expected


def test_every_option_counts(classifier, x):
    def counts(classifier=classifier, n=200, **options):
        return keys(classifier.certificates(x, n, **options))

    base = counts()
    assert counts(seed=0) == base
    assert counts(alpha=0.001) == base
    assert counts(seed=1) != base
    assert counts(n0=50) != base
    assert counts(alpha=0.05) != base
    assert counts(indices=[5, 6, 7, 8, 9]) != base
    assert counts(SmoothedClassifier(cnn(20), 0.1, seed=1)) == counts(seed=1)
    assert counts(SmoothedClassifier(cnn(20), 0.1, alpha=0.05)) == counts(alpha=0.05)


def test_a_plan_instead_of_numbers(classifier, x):
    plan = FixedBudget(n0=50, n=150, alpha=0.02)
    records = list(classifier.certificates(x, plan=plan))
    assert keys(records) == keys(certify(cnn(20), torch.tensor(x), 0.1, plan=plan))
    assert keys(records) == keys(classifier.certificates(x, 150, n0=50, alpha=0.02))
    assert keys(records) != keys(classifier.certificates(x, 150, n0=50))
    assert {(record.made_with.alpha, record.made_with.plan) for record in records} == {(0.02, repr(plan))}
    labels, radii = classifier.certify(x, plan=plan, batch_size=3)
    assert labels.tolist() == [record.prediction for record in records]
    assert radii.tolist() == [record.radius for record in records]
    other = classifier.certificates(x, plan=plan, seed=4, indices=[7, 5, 3, 1, 0])
    assert keys(other) == keys(certify(cnn(20), torch.tensor(x), 0.1, plan=plan, seed=4, indices=[7, 5, 3, 1, 0]))


PLANS = [AtRadius(0.05, n=300), OnGrid((0.05, 0.1), n=300), Anytime(n=300)]


@pytest.mark.parametrize("plan", PLANS, ids=repr)
def test_any_plan(plan, classifier, x):
    expected = list(certify(cnn(20), torch.tensor(x), 0.1, plan=plan, seed=2))
    assert keys(classifier.certificates(x, plan=plan, seed=2)) == keys(expected)
    labels, radii = classifier.certify(x, plan=plan, seed=2)
    assert labels.tolist() == [record.prediction for record in expected]
    assert radii.tolist() == [record.radius for record in expected]
    assert (radii > 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 100}, "plan: expected a plan or n, got both; a plan has its own votes and alpha"),
        ({"n0": 100}, "plan: expected a plan or n0, got both"),
        ({"alpha": 0.001}, "plan: expected a plan or alpha, got both"),
        ({"n": 100, "n0": 9, "alpha": 0.001}, "plan: expected a plan or n and n0 and alpha, got both"),
        ({"plan": 100}, r"plan: expected a plan such as FixedBudget\(n=1000\), got 100"),
        ({"plan": FixedBudget}, r"plan: expected a plan such as FixedBudget\(n=1000\), got <class"),
        ({"plan": None, "n0": 100}, "n: expected the number of votes per image, or a plan such as plan=FixedBudget"),
    ],
    ids=str,
)
def test_a_plan_and_numbers_are_not_mixed(options, message, classifier, x):
    options = {"plan": FixedBudget(n=100), **options}
    with pytest.raises(InputError, match=message):
        classifier.certify(x, **options)
    with pytest.raises(InputError, match=message):
        classifier.certificates(x, **options)


def test_the_number_of_forward_inputs_is_the_budget(x):
    model = Recorder(cnn())
    classifier = SmoothedClassifier(model, 0.25, input_shape=SHAPE)
    model.batches = []
    classifier.certify(x, 200, n0=30)
    singles = [batch for batch in model.batches if len(batch) == 1]  # checks before, and close decisions taken again
    assert model.inputs - len(singles) == 5 * 230 + PROBES + 5  # rounding is measured on batches of these sizes


def test_images_of_every_form(classifier, x):
    expected = keys(classifier.certificates(x, 100))
    forms = [x.astype(np.float64), np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape), torch.tensor(x), x.tolist()]
    for form in forms:
        assert keys(classifier.certificates(form, 100)) == expected


BAD = {
    "n 0": ({"n": 0}, "n: expected at least 10, got 0|n: expected an integer >= 1, got 0"),
    "n small": ({"n": 9}, "n: expected at least 10, got 9: with fewer votes nothing can be certified at alpha = 0.001"),
    "n0": ({"n0": 0}, "n0: expected an integer >= 1, got 0"),
    "alpha 0": ({"alpha": 0.0}, r"alpha: expected a number in \(0, 1\), got 0.0"),
    "alpha 1": ({"alpha": 1}, r"alpha: expected a number in \(0, 1\), got 1"),
    "alpha 2": ({"alpha": 2}, r"alpha: expected a number in \(0, 1\), got 2"),
    "seed": ({"seed": 0.5}, "seed: expected an integer or None, got 0.5"),
    "batch_size": ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
    "indices": ({"indices": [0, 1]}, r"indices: expected one per image \(5\), got 2"),
    "repeated": ({"indices": [0, 1, 2, 3, 3]}, "indices: expected distinct positions"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_any_vote(case, x):
    options, message = BAD[case]
    model = Recorder(cnn())
    classifier = SmoothedClassifier(model, 0.25, input_shape=SHAPE)
    model.batches = []
    with pytest.raises(InputError, match=message):
        classifier.certify(x, **{"n": 100, **options})
    assert model.inputs == 0
    options = {key: value for key, value in options.items() if key != "batch_size"}
    if options:
        with pytest.raises(InputError, match=message):
            classifier.certificates(x, **{"n": 100, **options})  # at once, not when the first record is asked for


def test_certificates_are_yielded_as_they_are_ready(x):
    model = Recorder(cnn())
    records = SmoothedClassifier(model, 0.25, chunk=10).certificates(x, 100)
    next(records)
    used = model.inputs
    assert used < 2 * 210
    list(records)
    assert model.inputs >= 5 * 200


def test_coverage_on_a_linear_model():
    """P(class 1) = Φ(margin/sigma) exactly, so the true radius is the margin; wrong certificates at most alpha.

    400 images at alpha = 0.05: the number of radii above the true one is at most Bin(400, 0.05), of which 38 is the
    0.9999 quantile.
    """
    alpha, images, margin = 0.05, 400, 0.15
    assert binom.ppf(0.9999, images, alpha) == 38
    classifier = SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25, alpha=alpha)
    x = np.tile(np.array([[0.5 + margin, 0.5]], np.float32), (images, 1))
    labels, radii = classifier.certify(x, 100, n0=20)
    wrong = int(((labels != -1) & (labels != 1)).sum() + (radii > margin).sum())
    assert 0 < wrong <= 38  # none at all would mean that the votes are not random
    assert np.median(radii) > 0.5 * margin


def test_votes_are_counts_and_where_predict_abstains():
    classifier = SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25)
    x = np.array([[0.75, 0.5], [0.5, 0.5], [0.0, 0.5]], np.float32)
    counts, abstains = classifier.votes(x, 2000)
    assert counts.sum(axis=1).tolist() == [2000] * 3
    spread = 4 * np.sqrt(2000 * 0.25)
    np.testing.assert_allclose(counts[:, 1], 2000 * norm.cdf([1.0, 0.0, -2.0]), atol=spread)
    assert abstains.tolist() == [False, True, False]
    assert classifier.votes(x[1:2] + 0.01, 2000, alpha=0.999999)[1].tolist() == [False]
    assert not np.array_equal(classifier.votes(x, 2000, seed=1)[0], counts)
    assert np.array_equal(classifier.votes(x[1:], 2000, indices=[1, 2])[0], counts[1:])
    with pytest.raises(InputError, match="n: expected an integer >= 1, got 0"):
        classifier.votes(x, 0)
    with pytest.raises(InputError, match=r"alpha: expected a number in \(0, 1\), got 0"):
        classifier.votes(x, 10, alpha=0)


@pytest.mark.parametrize("pixels", [torch.float32, torch.float64], ids=str)
def test_a_model_in_half_precision_is_certified_at_the_image_as_it_is(pixels):
    """As core does, count for count: the image itself is not rounded to the model's type."""
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=pixels)
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 3)).eval().bfloat16()
    half = SmoothedClassifier(model, 0.25, seed=3)
    expected = list(certify(model, images, 0.25, plan=FixedBudget(n=1000), seed=3))
    assert keys(half.certificates(images.numpy(), 1000)) == keys(expected)
    assert keys(half.certificates(images.bfloat16().float().numpy(), 1000)) != keys(expected)
    assert np.array_equal(half.votes(images.numpy(), 500)[0], Poll(model, images, 0.25, seed=3).votes(500))
