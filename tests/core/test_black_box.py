"""Functions of NumPy arrays as base classifiers: certified vote for vote, and held to what they promise."""

import copy
import pickle

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from rs_plugins.core.black_box import BlackBox, as_base_classifier
from rs_plugins.core.certification import certify
from rs_plugins.core.confidence import clopper_pearson_lower
from rs_plugins.core.models import digest
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smoothing import SmoothedModel, soft_vote_gradient
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError, ModelWarning

SIGMA, N0, N = 0.4, 40, 150
PLAN = FixedBudget(n0=N0, n=N)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels


@pytest.fixture(scope="module")
def linear(digits):
    images, labels = digits
    return LogisticRegression(max_iter=1000).fit(images[:300], labels[:300])


@pytest.fixture(scope="module")
def neighbours(digits):
    images, labels = digits
    return KNeighborsClassifier(4).fit(images[:300], labels[:300])


@pytest.fixture
def x(digits):
    return torch.tensor(digits[0][1500:1506])


def by_hand(decide, x, seed, indices):
    """Return the counts (images, 2, 10) of selection and estimation votes, one noise block of 64 after the other."""
    counts = np.zeros((len(x), 2, 10), dtype=int)
    for row, (image, index) in enumerate(zip(x, indices, strict=True)):
        source = stream(seed, "votes", index)
        blocks = [torch.empty(64, *image.shape).normal_(0, SIGMA, generator=source) for _ in range(-(-(N0 + N) // 64))]
        winners = decide((image + torch.cat(blocks)[: N0 + N]).numpy())
        counts[row, 0] = np.bincount(winners[:N0], minlength=10)
        counts[row, 1] = np.bincount(winners[N0:], minlength=10)
    return counts


def of_scores(predict):
    return lambda batch: np.concatenate([np.argmax(predict(one[None]), axis=1) for one in batch])


FUNCTIONS = {
    "labels": lambda linear, neighbours: (linear.predict, linear.predict),
    "probabilities": lambda linear, neighbours: (linear.predict_proba, of_scores(linear.predict_proba)),
    "log-probabilities": lambda linear, neighbours: (linear.predict_log_proba, of_scores(linear.predict_proba)),
    "scores with ties": lambda linear, neighbours: (neighbours.predict_proba, of_scores(neighbours.predict_proba)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("chunk", [7, None])
def test_certificates_of_scikit_learn_are_those_of_a_hand_written_loop(name, chunk, linear, neighbours, x):
    predict, decide = FUNCTIONS[name](linear, neighbours)
    indices = [3, 1, 0, 7, 9, 8]
    expected = by_hand(decide, x, 5, indices)
    assert (expected[:, 1].max(axis=1) < N).any()  # some images have votes for several classes
    records = certify(BlackBox(predict, 10), x, SIGMA, plan=PLAN, seed=5, indices=indices, chunk=chunk)
    for record, (selection, estimation) in zip(records, expected, strict=True):
        guess = int(selection.argmax())
        lower = clopper_pearson_lower(int(estimation[guess]), N, 0.001)
        assert (record.guess, record.count) == (guess, estimation[guess])
        assert record.prediction == (guess if lower >= 0.5 else -1)
        assert record.radius == (GaussianNoise(SIGMA).radius(lower) if lower >= 0.5 else 0)


def found(records):
    return [(record.index, record.prediction, record.guess, record.count) for record in records]


def test_certify_takes_the_function_itself(linear, x):
    expected = found(certify(BlackBox(linear.predict, 10), x, SIGMA, plan=PLAN))
    assert found(certify(linear.predict, x, SIGMA, plan=PLAN, classes=10)) == expected
    assert found(certify(linear.predict_proba, x, SIGMA, plan=PLAN)) == expected
    with pytest.raises(InputError, match=r"model: expected a torch.nn.Module or a function predict\(batch\), got Log"):
        certify(linear, x, SIGMA)


def test_a_module_and_the_function_of_it_have_the_same_certificates(x):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))

    def scores(batch):
        return network(torch.from_numpy(batch)).detach().numpy()

    expected = list(certify(network, x, SIGMA, plan=PLAN))
    assert found(certify(scores, x, SIGMA, plan=PLAN)) == found(expected)
    labels = certify(lambda batch: scores(batch).argmax(1), x, SIGMA, plan=PLAN, classes=10)
    assert found(labels) == found(expected)
    assert expected[0].made_with.device == "cpu"


# Each is a way to say: class 2, class 0.
ANSWERS = {
    "int64": np.array([2, 0]),
    "uint8": np.array([2, 0], np.uint8),
    "whole floats": np.array([2.0, 0.0], np.float32),
    "list": [2, 0],
    "list of lists": [[0, 1, 5], [9, 1, 5]],
    "tensor of labels": torch.tensor([2, 0]),
    "tensor of scores": torch.tensor([[0.0, 1.0, 5.0], [9.0, 1.0, 5.0]], requires_grad=True),
    "integer scores": np.array([[0, 1, 5], [9, 1, 5]]),
    "boolean scores": np.array([[False, False, True], [True, False, False]]),
    "half scores": np.array([[0, 1, 5], [9, 1, 5]], np.float16),
    "long scores": np.array([[0, 1, 5], [9, 1, 5]], np.longdouble),
    "fortran order": np.asfortranarray(np.array([[0, 1, 5], [9, 1, 5]], np.float32)),
    "minus infinity": np.array([[-np.inf, -np.inf, 0.0], [0.0, -20.7, -np.inf]]),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_every_form(name):
    scores = BlackBox(lambda batch: ANSWERS[name], 3)(torch.zeros(2, 4))
    assert scores.shape == (2, 3)
    assert scores.is_floating_point()
    assert scores.argmax(1).tolist() == [2, 0]


def test_scores_keep_their_precision():
    scores = np.array([[1.0, 1.0 + 1e-12]])
    answer = BlackBox(lambda batch: scores)(torch.zeros(1, 4))
    assert answer.dtype == torch.float64
    assert np.array_equal(answer.numpy(), scores)
    labels = BlackBox(lambda batch: [1], 3)(torch.zeros(1, 4))
    assert (labels.dtype, labels.tolist()) == (torch.float32, [[0.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("labels", "answer"),
    [
        (np.array(["ham", "spam"]), np.array(["spam", "ham"])),
        (["ham", "spam"], ["spam", "ham"]),
        (np.array([3, 8]), np.array([8, 3])),
        ([False, True], np.array([True, False])),
        ([-1, 1], np.array([1.0, -1.0])),
    ],
    ids=["strings", "list", "integers", "booleans", "signs"],
)
def test_labels_are_mapped_to_class_numbers(labels, answer):
    model = BlackBox(lambda batch: answer, labels=labels)
    assert model.classes == 2
    assert model(torch.zeros(2, 4)).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_classes_of_scikit_learn_as_labels(digits, x):
    images, labels = digits
    names = np.array([f"digit {k}" for k in range(10)])
    named = LogisticRegression(max_iter=1000).fit(images[:300], names[labels[:300]])
    numbered = LogisticRegression(max_iter=1000).fit(images[:300], labels[:300])
    records = certify(BlackBox(named.predict, labels=named.classes_), x, SIGMA, plan=PLAN)
    assert found(records) == found(certify(numbered.predict, x, SIGMA, plan=PLAN, classes=10))


def fails(batch):
    raise ConnectionError("the line is dead")


BAD = {
    "too large": (lambda b: np.full(len(b), 3), "predict: expected labels from 0 to 2, got 3"),
    "negative": (lambda b: np.full(len(b), -1), "predict: expected labels from 0 to 2, got -1"),
    "string": (lambda b: ["spam"] * len(b), "got 'spam'; name the labels with labels="),
    "probability": (lambda b: np.full(len(b), 0.7), r"got 0.7; turn probabilities p of one class into two columns"),
    "nan label": (lambda b: np.full(len(b), np.nan), "predict: expected labels from 0 to 2, got nan"),
    "infinite label": (lambda b: np.full(len(b), np.inf), "predict: expected labels from 0 to 2, got inf"),
    "dictionary": (lambda b: [{}] * len(b), r"predict: expected labels from 0 to 2, got {}"),
    "one column": (lambda b: np.full((len(b), 1), 0.7), r"scores of shape \(1, 3\), got \(1, 1\); return labels as"),
    "two columns": (lambda b: np.zeros((len(b), 2)), r"predict: expected scores of shape \(1, 3\), got \(1, 2\)"),
    "no columns": (lambda b: np.zeros((len(b), 0)), r"predict: expected scores of shape \(1, 3\), got \(1, 0\)"),
    "rows": (
        lambda b: np.zeros((len(b) + 1, 3)),
        r"expected labels \(1,\) or scores \(1, classes\), got shape \(2, 3\)",
    ),
    "one label": (lambda b: [0] * (len(b) + 1), r"expected labels \(1,\) or scores \(1, classes\), got shape \(2,\)"),
    "scalar": (lambda b: 1, r"predict: expected labels \(1,\) or scores \(1, classes\), got int"),
    "nothing": (lambda b: None, r"predict: expected labels \(1,\) or scores \(1, classes\), got NoneType"),
    "three axes": (lambda b: np.zeros((len(b), 3, 1)), r"got shape \(1, 3, 1\)"),
    "ragged": (lambda b: [[0, 1], [0]], "predict: expected it to return an array, got list"),
    "complex": (lambda b: np.zeros((len(b), 3), complex), "scores that are real numbers, got complex128"),
    "text": (lambda b: np.full((len(b), 3), "a"), "scores that are real numbers, got <U1"),
    "error": (
        fails,
        r"predict: it fails on a float32 NumPy batch of shape \(1, 2\): ConnectionError: the line is dead",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_answers_that_make_no_sense_are_refused_at_once(case):
    predict, message = BAD[case]
    with pytest.raises(ModelError, match=f"^predict: .*{message.removeprefix('predict: ')}"):
        certify(predict, torch.zeros(2, 2), SIGMA, plan=PLAN, classes=3)


def test_the_cause_of_a_failure_is_kept():
    with pytest.raises(ModelError) as raised:
        BlackBox(fails, 3)(torch.zeros(1, 2))
    assert isinstance(raised.value.__cause__, ConnectionError)

    def out_of_memory(batch):
        raise MemoryError("as if")

    with pytest.raises(MemoryError):
        BlackBox(out_of_memory, 3)(torch.zeros(1, 2))


def test_a_failure_on_the_way_leaves_the_finished_certificates():
    calls = []

    def tires(batch):
        calls.append(len(batch))
        if len(calls) > 60:
            fails(batch)
        return np.zeros(len(batch), int)

    records = certify(tires, torch.rand(5, 2), SIGMA, plan=PLAN, classes=2, chunk=10)
    assert next(records).prediction == 0
    with pytest.raises(ModelError, match=r"batch of shape \(10, 2\): ConnectionError: the line is dead"):
        list(records)


OPTIONS = {
    "no function": ({"predict": 3}, "predict: expected a function of a NumPy batch, got int"),
    "module": ({"predict": nn.Linear(2, 2)}, "predict: expected a function of a NumPy batch, got Linear"),
    "class": ({"predict": nn.Linear}, "predict: expected a function of a NumPy batch, got the class Linear"),
    "one class": ({"classes": 1}, "classes: expected an integer >= 2, got 1"),
    "one label": ({"labels": ["a"]}, "labels: expected at least 2 distinct labels"),
    "repeated": ({"labels": ["a", "b", "a"]}, "labels: expected at least 2 distinct labels"),
    "both": ({"classes": 3, "labels": ["a", "b"]}, "classes: expected 2, the number of labels, got 3"),
    "empty name": ({"name": ""}, "name: expected a line of text, got ''"),
    "two lines": ({"name": "a\nb"}, r"name: expected a line of text, got 'a\\nb'"),
    "no text": ({"name": 1}, "name: expected a line of text, got 1"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(case):
    options, message = OPTIONS[case]
    with pytest.raises(InputError, match=message):
        BlackBox(**{"predict": fails, **options})


class Estimator:
    base_model = None

    def predict(self, batch):
        return np.zeros(len(batch), int)

    def __call__(self, batch):
        return self.predict(batch)


class Service:
    predict = None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Service(), "got Service; pass its predict"),
        (SmoothedModel, "got the class SmoothedModel"),
        ("svm", r"model: expected a torch.nn.Module or a function predict\(batch\), got str$"),
    ],
    ids=["service", "class", "text"],
)
def test_what_is_no_base_classifier(model, message):
    with pytest.raises(InputError, match=message):
        as_base_classifier(model)


def test_base_classifiers():
    network = nn.Linear(2, 2)
    assert as_base_classifier(network) is network
    assert as_base_classifier(Estimator(), 4).classes == 4


def test_labels_without_a_number_of_classes():
    with pytest.raises(ModelError, match="predict: it returns labels, so the number of classes must be given"):
        certify(Estimator().predict, torch.zeros(2, 2), SIGMA)


def random_labels():
    source = np.random.default_rng(0)
    return lambda batch: source.integers(0, 2, len(batch))


def random_scores():
    source = np.random.default_rng(0)
    return lambda batch: np.stack([np.ones(len(batch)), source.normal(size=len(batch))], axis=1)


UNSTEADY = {
    "labels from call to call": random_labels(),
    "scores from call to call": random_scores(),
    "labels by the batch": lambda batch: np.full(len(batch), len(batch) % 2),
    "scores by the batch": lambda batch: np.stack([batch[:, 0], np.tile(batch.mean(), len(batch))], axis=1),
}


@pytest.mark.parametrize("case", UNSTEADY)
def test_a_function_that_changes_its_mind_is_refused(case):
    with pytest.raises(ModelError, match="with the batch it is in, or from call to call"):
        certify(UNSTEADY[case], torch.rand(2, 3), SIGMA, plan=PLAN, classes=2)


def test_nan_scores_are_votes_for_no_class():
    def sometimes(batch):
        return np.where(batch[:, :1] > 0.8, np.nan, [[1.0, 0.0]])

    x = torch.tensor([[0.5, 0.0]])
    expected = by_hand(lambda noisy: np.where(noisy[:, 0] > 0.8, 9, 0), x, 0, [0])
    with pytest.warns(ModelWarning, match="noisy copies gave NaN logits"):
        (record,) = certify(sometimes, x, SIGMA, plan=PLAN)
    assert record.count == expected[0, 1, 0]
    assert record.invalid == expected[0, :, 9].sum() > 0


class Watcher:
    """Writes into its batches and keeps them."""

    def __init__(self, marks=True):
        self.batches, self.seen, self.marks = [], [], marks

    def __call__(self, batch):
        self.batches.append(batch)
        self.seen.append(batch.copy())
        labels = (batch.reshape(len(batch), -1)[:, 0] > 0.5).astype(int)
        if self.marks:
            batch += 1
        return labels


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (1, 2, 3, 4)], ids=str)
def test_what_the_function_is_handed(shape):
    watcher = Watcher()
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    marked = found(certify(watcher, x, SIGMA, plan=PLAN, classes=2, chunk=64))
    assert marked == found(certify(Watcher(marks=False), x, SIGMA, plan=PLAN, classes=2))  # what it writes is lost
    assert torch.equal(x, before)
    for batch, seen in zip(watcher.batches, watcher.seen, strict=True):
        assert (batch.dtype, batch.shape[1:]) == (np.float32, shape)
        assert batch.flags.c_contiguous
        assert np.array_equal(batch, seen + 1)  # nobody else writes into it either
    assert max(map(len, watcher.batches)) == 64


def test_channels_last_and_double_images():
    watcher = Watcher()
    x = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    BlackBox(watcher, 2)(x.double())
    assert watcher.seen[0].dtype == np.float32
    assert np.array_equal(watcher.seen[0], x.numpy())


def test_a_black_box_has_one_precision(linear, x):
    expected = certify(BlackBox(linear.predict, 10), x, SIGMA, plan=PLAN)
    rounded = certify(BlackBox(linear.predict, 10).to(torch.bfloat16), x, SIGMA, plan=PLAN)
    assert found(rounded) == found(expected)
    assert rounded.made_with.dtype == "float32"


def test_the_certificate_calls_a_black_box_by_its_name(linear, x):
    def model_of(model):
        (record,) = certify(model, x[:1], SIGMA, plan=PLAN, classes=10)
        return record.made_with.model

    assert model_of(linear.predict).startswith("black box sklearn.linear_model._logistic.LogisticRegression.predict, ")
    named = model_of(BlackBox(linear.predict, 10, name="logistic regression, May"))
    assert named.startswith("black box logistic regression, May, ")
    assert named == model_of(BlackBox(linear.predict_proba, 10, name="logistic regression, May"))
    assert named != model_of(BlackBox(linear.predict, 10, name="logistic regression, June"))


def test_names_without_addresses():
    assert BlackBox(fails, 2).name == f"{__name__}.fails"
    assert BlackBox(Estimator().predict, 2).name == f"{__name__}.Estimator.predict"
    assert BlackBox(Estimator(), 2).name == f"{__name__}.Estimator"
    assert BlackBox(print, 2).name == "builtins.print"
    assert repr(BlackBox(fails, 2, name="svm")) == "BlackBox(svm, classes=2)"


def test_the_digest_covers_what_can_be_seen_around_a_black_box():
    def behind(weight):
        scale = nn.Linear(2, 2, bias=False)
        nn.init.constant_(scale.weight, weight)
        return digest(nn.Sequential(scale, BlackBox(fails, 2, name="svm")))

    assert behind(1.0) == behind(1.0)
    assert behind(1.0) != behind(2.0)
    assert behind(1.0).startswith("black box svm, ")
    assert len(behind(1.0)) == len("black box svm, ") + 64


def test_a_smoothed_module_around_a_black_box(linear, x):
    smoothed = SmoothedModel(BlackBox(linear.predict_log_proba, 10), SIGMA, samples=8)
    noisy = x[:, None] + smoothed.fixed_draws(x)
    logs = linear.predict_log_proba(noisy.reshape(-1, 64).numpy()).reshape(len(x), 8, 10)
    expected = np.log(np.exp(log_softmax(logs, axis=2)).mean(axis=1))
    np.testing.assert_allclose(smoothed.eval()(x).numpy(), expected, atol=1e-4)
    with pytest.raises(ModelError, match="model: no gradient flows"):
        soft_vote_gradient(smoothed.base, x, torch.zeros(len(x), dtype=torch.long), smoothed.fixed_draws(x))


def test_copies(linear, x):
    expected = found(certify(BlackBox(linear.predict, 10), x, SIGMA, plan=PLAN))
    for copied in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        assert found(certify(copied(BlackBox(linear.predict, 10)), x, SIGMA, plan=PLAN)) == expected
