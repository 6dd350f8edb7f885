"""Any ART classifier under noise: certified like a module, sound by ART's own conventions, attackable by ART."""

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from art.attacks.evasion import (
    BoundaryAttack,
    HopSkipJump,
    PixelAttack,
    ProjectedGradientDescent,
    SimBA,
    SpatialTransformation,
    SquareAttack,
    ZooAttack,
)
from art.defences.postprocessor import GaussianNoise as NoisyAnswers
from art.estimators.certification.randomized_smoothing import NumpyRandomizedSmoothing
from art.estimators.classification import BlackBoxClassifier, PyTorchClassifier, SklearnClassifier
from art.estimators.classification.scikitlearn import ScikitlearnClassifier
from art.exceptions import EstimatorError
from art.utils import compute_accuracy
from scipy.stats import binom, norm
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

from rs_plugins.core.black_box import BlackBox
from rs_plugins.core.certification import certify, majority
from rs_plugins.core.plans.fixed_budget import FixedBudget
from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning
from rs_plugins_art.black_box import SmoothedBlackBox
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Sharp, cnn, seeded

SIGMA = 0.3


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels


@pytest.fixture(scope="module")
def fitted(digits):
    images, labels = digits
    noisy = images[:600] + np.random.default_rng(0).normal(0, SIGMA, (600, 64))
    return LogisticRegression(max_iter=2000).fit(noisy.astype(np.float32), labels[:600])


@pytest.fixture
def few(digits):
    return digits[0][1500:1506]


def sklearn(model, **settings):
    return SklearnClassifier(model, **{"clip_values": (0.0, 1.0), **settings})


def torch_host(network=None, **settings):
    network = cnn(20) if network is None else network
    settings = {"clip_values": (0.0, 1.0), "device_type": "cpu", **settings}
    return PyTorchClassifier(network, nn.CrossEntropyLoss(), SHAPE, CLASSES, **settings)


def keys(records):
    return [(r.index, r.prediction, r.radius, r.count, r.guess) for r in records]


# ---- certificates ----------------------------------------------------------------------------------------------------


def test_certificates_are_those_of_the_function(fitted, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA)
    plan = FixedBudget(n0=40, n=200, alpha=0.01)
    expected = keys(certify(fitted.predict, torch.tensor(few), SIGMA, plan=plan, classes=10, seed=3))
    assert len({key[3] for key in expected}) > 1
    assert keys(classifier.certificates(few, plan=plan, seed=3)) == expected
    assert keys(classifier.certificates(few, 200, n0=40, alpha=0.01, seed=3)) == expected
    for settings in ({"chunk": 7}, {"samples": 3}, {"seed": 8}):
        other = SmoothedBlackBox(sklearn(fitted), SIGMA, **settings)
        assert keys(other.certificates(few, plan=plan, seed=3)) == expected
    labels, radii = SmoothedBlackBox(sklearn(fitted), SIGMA, seed=3, alpha=0.01).certify(few, 200, 17, n0=40)
    assert (labels.dtype, radii.dtype) == (np.int64, np.float64)
    assert labels.tolist() == [key[1] for key in expected]
    assert radii.tolist() == [key[2] for key in expected]


def test_certificates_of_a_network_are_those_of_the_smoothed_classifier(x):
    expected = keys(SmoothedClassifier(cnn(20), 0.1).certificates(x, 200))
    assert len({key[3] for key in expected}) > 1
    assert keys(SmoothedBlackBox(torch_host(), 0.1).certificates(x, 200)) == expected


@pytest.mark.parametrize("mean", [0.5, (0.4, 0.6)], ids=repr)
def test_preprocessing_comes_after_the_noise(mean, x):
    """The same network with normalisation by ART, and with normalisation as a layer: the same certificates."""
    mean = np.reshape(np.array(mean, np.float32), (-1, 1, 1))
    std = np.full_like(mean, 0.25)

    class Normalise(nn.Module):
        def forward(self, images):
            return (images - torch.tensor(mean)) / torch.tensor(std)

    inside = SmoothedClassifier(nn.Sequential(Normalise(), cnn(20)), 0.1, device_type="cpu")
    outside = SmoothedBlackBox(torch_host(preprocessing=(mean, std)), 0.1)
    expected = keys(inside.certificates(x, 200))
    assert expected != keys(SmoothedClassifier(cnn(20), 0.1).certificates(x, 200))
    assert keys(outside.certificates(x, 200)) == expected


def test_a_classifier_of_pixels_up_to_255(x):
    class Divide(nn.Module):
        def forward(self, images):
            return images / 255

    classifier = torch_host(nn.Sequential(Divide(), cnn(20)), preprocessing=(0.0, 1 / 255))
    expected = keys(SmoothedClassifier(cnn(20), 0.1).certificates(x, 200))
    assert keys(SmoothedBlackBox(classifier, 0.1).certificates(x, 200)) == expected
    with pytest.raises(
        InputError, match=r"classifier: clip_values: expected \(0, 1\) or None, got .*255.*preprocessing"
    ):
        SmoothedBlackBox(torch_host(clip_values=(0, 255)), 0.1)


def test_a_black_box_classifier_of_arts(few, fitted):
    host = BlackBoxClassifier(fitted.predict_proba, (64,), 10, clip_values=(0, 1))
    expected = keys(SmoothedBlackBox(sklearn(fitted), SIGMA).certificates(few, 100))
    assert keys(SmoothedBlackBox(host, SIGMA).certificates(few, 100)) == expected


def test_arts_own_certifier_draws_from_the_same_distribution():
    """P(class 1) = Φ(margin/sigma) = p is known, so the count that each radius stands for is a binomial draw.

    Two-sided at 1e-6 a radius; ART counts n votes after ``sample_size`` that select, at the same failure probability.
    """
    sigma, n, alpha = 0.25, 400, 0.01
    margins = np.array([0.1, 0.2, 0.3], np.float32)
    x = np.stack([0.5 + margins, np.full(3, 0.5, np.float32)], axis=1)
    host = PyTorchClassifier(Sharp([1.0, 0.0], 0.5), nn.CrossEntropyLoss(), (2,), 2, device_type="cpu")
    np.random.seed(1)  # noqa: NPY002  the generator that ART draws from
    theirs = NumpyRandomizedSmoothing(host, sample_size=100, scale=sigma, alpha=alpha).certify(x, n=n)
    ours = SmoothedBlackBox(host, sigma, alpha=alpha).certify(x, n=n)
    p = norm.cdf(margins / sigma)
    counts = np.arange(n + 1)
    bound = NumpyRandomizedSmoothing(host, 100, sigma, alpha)._lower_confidence_bound
    radius_of = sigma * norm.ppf([bound(count, n) for count in counts])
    low, high = radius_of[binom.ppf(5e-7, n, p).astype(int)], radius_of[binom.isf(5e-7, n, p).astype(int)]
    for labels, radii in (theirs, ours):
        assert labels.tolist() == [1, 1, 1]
        assert ((radii >= low) & (radii <= high)).all()
    # Each of our radii is, to the digit, one that ART gives for some count.
    assert np.abs(radius_of[:, None] - ours[1]).min(axis=0).max() < 1e-9


def test_votes(fitted, few):
    counts, abstains = SmoothedBlackBox(sklearn(fitted), SIGMA).votes(few, 300, seed=2)
    assert np.array_equal(
        counts, SmoothedModel(BlackBox(fitted.predict, 10), SIGMA).votes(torch.tensor(few), 300, seed=2)
    )
    assert np.array_equal(abstains, majority(counts, 0.001) == -1)


def test_certificates_call_it_by_name(fitted, few, x):
    def model_of(classifier, x):
        return next(classifier.certificates(x, 10)).made_with.model

    assert model_of(SmoothedBlackBox(sklearn(fitted), 1), few).startswith(
        "black box ScikitlearnLogisticRegression of LogisticRegression, "
    )
    assert model_of(SmoothedBlackBox(torch_host(), 1), x).startswith("black box PyTorchClassifier of Sequential, ")
    assert model_of(SmoothedBlackBox(sklearn(fitted), 1, name="May"), few).startswith("black box May, ")


# ---- predictions -----------------------------------------------------------------------------------------------------


def test_predict_gives_the_shares_of_the_votes(fitted, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA, samples=50)
    draws = SmoothedModel(BlackBox(fitted.predict, 10), SIGMA, samples=50).fixed_draws(torch.tensor(few)).numpy()
    votes = [np.bincount(fitted.predict(image + draws), minlength=10) for image in few]
    rows = classifier.predict(few)
    assert rows.dtype == np.float64
    assert np.array_equal(rows, np.array(votes) / 50)
    assert (rows.max(axis=1) < 1).any()
    one_hot = classifier.predict(few, is_abstain=True)
    answers = majority(np.array(votes), 0.001)
    assert np.array_equal(one_hot, np.where(answers[:, None] == np.arange(10), 1.0, 0.0))
    accuracy, coverage = compute_accuracy(one_hot, np.eye(10)[answers])
    assert (accuracy, coverage) == (1.0, (answers != -1).mean())


def test_predict_is_a_function_of_each_image_alone(x):
    classifier = SmoothedBlackBox(torch_host(), 0.2)
    rows = classifier.predict(x)
    assert np.array_equal(classifier.predict(x=x, y=rows, logits=True, batch_size=2), rows)
    classifier.certify(x, 20)
    order = [3, 0, 4, 1, 2]
    assert np.array_equal(classifier.predict(x[order]), rows[order])
    assert np.array_equal(classifier.predict(x.astype(np.float64)[2:3]), rows[2:3])
    assert np.array_equal(SmoothedBlackBox(torch_host(), 0.2, chunk=5).predict(x), rows)
    assert not np.array_equal(SmoothedBlackBox(torch_host(), 0.2, seed=1).predict(x), rows)
    assert not np.array_equal(SmoothedBlackBox(torch_host(), 0.4).predict(x), rows)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_of_nan_images_are_nan_with_a_warning(value, fitted, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA)
    broken = few.copy()
    broken[2, 5] = value
    with pytest.warns(RSPluginsWarning, match="x: 1 of 6 images hold NaN or infinity; their predictions are NaN"):
        rows = classifier.predict(broken)
    assert np.isnan(rows[2]).all()
    assert np.array_equal(np.delete(rows, 2, axis=0), np.delete(classifier.predict(few), 2, axis=0))
    with pytest.raises(InputError, match="x: expected finite values, got NaN or infinity"):
        classifier.certify(broken, 20)


def test_an_empty_batch(fitted):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA)
    empty = np.zeros((0, 64), np.float32)
    assert classifier.predict(empty).shape == (0, 10)
    labels, radii = classifier.certify(empty, 20)
    assert (labels.shape, radii.shape) == ((0,), (0,))


BAD_CALLS = {
    "training": (lambda c, x: c.predict(x, training_mode=True), "training_mode: expected False"),
    "batch_size": (lambda c, x: c.predict(x, batch_size=0), "batch_size: expected an integer >= 1, got 0"),
    "integers": (lambda c, x: c.predict(x.astype(int)), "x: expected floating-point pixels"),
    "shape": (lambda c, x: c.predict(x[:, :9]), r"x: expected a batch of images of shape \(64,\), got shape \(6, 9\)"),
    "range": (lambda c, x: c.certify(x * 16, 20), r"expected pixels in \[0, 1\], got values from 0 to 16"),
    "layers": (lambda c, x: c.get_activations(x, 0), "layer: a black box has no layers to look at, got 0"),
    "abstain": (lambda c, x: c.predict(x, is_abstain=True), "samples: 8 are too few to predict at alpha = 0.001"),
    "both": (lambda c, x: c.certify(x, 20, plan=FixedBudget(n=20)), "plan: expected a plan or n, got both"),
    "neither": (lambda c, x: c.certify(x), "n: expected the number of votes per image, or a plan"),
    "alpha": (lambda c, x: c.votes(x, 20, alpha=2), r"alpha: expected a number in \(0, 1\), got 2"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case, fitted, few):
    call, message = BAD_CALLS[case]
    with pytest.raises(InputError, match=message):
        call(SmoothedBlackBox(sklearn(fitted), SIGMA, samples=8), few)


def test_a_random_classifier_is_refused(fitted, few):
    source = np.random.default_rng(0)
    random = BlackBoxClassifier(lambda x: np.eye(10)[source.integers(0, 10, len(x))], (64,), 10)
    with pytest.raises(ModelError, match="or from call to call"):
        SmoothedBlackBox(random, SIGMA).certify(few, 20)
    noisy = sklearn(fitted, postprocessing_defences=NoisyAnswers(scale=0.5))
    with pytest.raises(ModelError, match="or from call to call"):
        SmoothedBlackBox(noisy, SIGMA).certify(few, 20)


# ---- settings, copies ------------------------------------------------------------------------------------------------


BAD_SETTINGS = {
    "a model": (
        {"classifier": LogisticRegression()},
        "classifier: expected an ART classifier, such as SklearnCl.*got Lo",
    ),
    "sigma": ({"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
    "samples": ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
    "alpha": ({"alpha": 1}, r"alpha: expected a number in \(0, 1\), got 1"),
    "seed": ({"seed": 0.5}, "seed: expected an integer or None, got 0.5"),
    "chunk": ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
    "name": ({"name": ""}, "name: expected a line of text, got ''"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings(case, fitted):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(InputError, match=message):
        SmoothedBlackBox(**{"classifier": sklearn(fitted), "sigma": SIGMA, **settings})
    if "classifier" not in settings and "name" not in settings:
        classifier = SmoothedBlackBox(sklearn(fitted), SIGMA, seed=4)
        before = classifier.get_params()
        with pytest.raises(InputError, match=message):
            classifier.set_params(**{"samples": 7, "alpha": 0.5, **settings})
        assert classifier.get_params() == before


def test_a_smoothed_classifier_is_not_smoothed_again(fitted):
    host = NumpyRandomizedSmoothing(torch_host(), sample_size=10)
    smoothed = [
        host,
        SmoothedBlackBox(sklearn(fitted), SIGMA),
        SmoothedClassifier(cnn(), SIGMA),
        torch_host(SmoothedModel(cnn(), SIGMA)),
    ]
    for classifier in smoothed:
        with pytest.raises(InputError, match=f"a {type(classifier).__name__}; noise would be added twice"):
            SmoothedBlackBox(classifier, SIGMA)


def test_settings_are_read_and_changed(fitted, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA)
    changed = {"sigma": 0.5, "samples": 11, "alpha": 0.01, "seed": 5, "chunk": 9}
    classifier.set_params(**changed)
    assert classifier.get_params() == {"classifier": classifier.classifier, **changed}
    same = SmoothedBlackBox(sklearn(fitted), **changed)
    assert np.array_equal(classifier.predict(few), same.predict(few))
    assert keys(classifier.certificates(few, 30)) == keys(same.certificates(few, 30))
    assert repr(same).startswith(
        "SmoothedBlackBox(ScikitlearnLogisticRegression of LogisticRegression, sigma=0.5, samp"
    )
    with pytest.raises(InputError, match=r"set_params: expected names among sigma, .*; got 'preprocessing'"):
        classifier.set_params(preprocessing=(0.5, 0.5))
    assert (classifier.input_shape, classifier.nb_classes) == ((64,), 10)
    assert np.array_equal(classifier.clip_values, [0, 1])
    assert SmoothedBlackBox(BlackBoxClassifier(print, (64,), 10), SIGMA).clip_values is None
    assert SmoothedBlackBox(torch_host(channels_first=False), SIGMA).channels_first is False


@pytest.mark.parametrize("make", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies(make, fitted, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA, seed=4)
    copied = make(classifier)
    assert copied.classifier is not classifier.classifier
    assert np.array_equal(copied.predict(few), classifier.predict(few))
    assert keys(copied.certificates(few, 30)) == keys(classifier.certificates(few, 30))
    copied.set_params(seed=5)
    assert classifier.seed == 4


# ---- state -----------------------------------------------------------------------------------------------------------

CALLS = {
    "predict": lambda c, x: c.predict(x),
    "certify": lambda c, x: c.certify(x, 20),
    "votes": lambda c, x: c.votes(x, 20),
    "half-read": lambda c, x: next(c.certificates(x, 20)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_network_and_the_global_generators_are_left_as_they_were(name, x):
    network = cnn()
    network.train()
    network[1].eval()
    classifier = SmoothedBlackBox(torch_host(network), SIGMA)
    modes = [module.training for module in network.modules()]
    before, images = (torch.get_rng_state(), str(np.random.get_state())), x.copy()  # noqa: NPY002  must not be touched
    CALLS[name](classifier, x)
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]  # noqa: NPY002
    assert np.array_equal(x, images)


# ---- training --------------------------------------------------------------------------------------------------------


def test_fit_of_scikit_learn_is_on_noisy_copies(digits):
    images, labels = digits[0][:40], digits[1][:40]
    seen = []

    class Watched(LogisticRegression):
        def fit(self, x, y):
            seen.append((x, y))
            return super().fit(x, y)

    classifier = SmoothedBlackBox(ScikitlearnClassifier(Watched(max_iter=500)), SIGMA, seed=3)
    with pytest.raises(InputError, match="classifier: it does not know its number of classes yet; fit it first"):
        _ = classifier.nb_classes
    for number, form in enumerate((labels, np.eye(10)[labels], labels[:, None]), start=1):
        classifier.fit(images, form, nb_epochs=4)
        x, y = seen[-1]
        source = stream(3, "fit", number)
        draws = torch.stack([torch.empty(40, 64).normal_(0, SIGMA, generator=source) for _ in range(4)]).numpy()
        np.testing.assert_allclose(x.reshape(4, 40, 64), images + draws, atol=1e-6)
        assert y.tolist() == labels.tolist() * 4
    assert classifier.nb_classes == 10
    assert classifier.certify(images[:2], 20)[0].shape == (2,)


def test_fit_of_a_network_goes_on_from_copy_to_copy(x, y):
    class Host(PyTorchClassifier):
        fits = ()

        def fit(self, x, y, **how):
            self.fits = (*self.fits, (x, y, how))

    host = Host(cnn(), nn.CrossEntropyLoss(), SHAPE, CLASSES, device_type="cpu")
    classifier = SmoothedBlackBox(host, 0.5)
    classifier.fit(x, y, batch_size=3, nb_epochs=2, drop_last=True)
    classifier.fit(x, y, batch_size=3.0, nb_epochs=1)
    assert type(host.fits[-1][2]["batch_size"]) is int
    noise = np.stack([images - x for images, _, _ in host.fits])
    assert noise.std() == pytest.approx(0.5, rel=0.1)
    assert all(np.abs(one - other).max() > 0.5 for one, other in itertools.pairwise(noise))
    assert all(np.array_equal(rows, np.eye(CLASSES)[y]) for _, rows, _ in host.fits)
    assert [how for _, _, how in host.fits[::2]] == [
        {"batch_size": 3, "nb_epochs": 1, "drop_last": True},
        {"batch_size": 3, "nb_epochs": 1},
    ]
    for options, message in (
        ({"nb_epochs": 0}, "nb_epochs: expected"),
        ({"batch_size": 1.5}, "batch_size: expected"),
        ({"x": x * 9}, "x: expected pixels"),
    ):
        with pytest.raises(InputError, match=message):
            classifier.fit(**{"x": x, "y": y, **options})


def test_a_clone_for_refitting(fitted, digits, few):
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA, seed=4, samples=9, name="May")
    clone = classifier.clone_for_refitting()
    assert {**clone.get_params(), "classifier": 0} == {**classifier.get_params(), "classifier": 0}
    clone.fit(digits[0][:100], digits[1][:100], nb_epochs=1)
    assert not np.array_equal(clone.predict(few), classifier.predict(few))
    assert repr(clone) == repr(classifier)


# ---- attacks ---------------------------------------------------------------------------------------------------------


class Counting(BlackBoxClassifier):
    """Writes down how many images it is asked about, call by call."""

    asked = ()

    def predict(self, x, **kwargs):
        self.asked = (*self.asked, len(x))
        return super().predict(x, **kwargs)


QUIET = {"verbose": False}
ATTACKS = {
    "HopSkipJump": lambda c: HopSkipJump(c, max_iter=2, max_eval=20, init_eval=5, init_size=20, **QUIET),
    "Boundary": lambda c: BoundaryAttack(c, targeted=False, max_iter=5, init_size=20, **QUIET),
    "ZOO": lambda c: ZooAttack(
        c, max_iter=2, binary_search_steps=1, nb_parallel=4, use_resize=False, use_importance=False, **QUIET
    ),
    "Square": lambda c: SquareAttack(c, norm=np.inf, eps=0.5, max_iter=5, **QUIET),
    "Square l2": lambda c: SquareAttack(c, norm=2, eps=2, max_iter=5, **QUIET),
    "SimBA": lambda c: SimBA(c, max_iter=10, epsilon=0.5, **QUIET),
    "Pixel": lambda c: PixelAttack(c, th=1, max_iter=1, **QUIET),
    "Spatial": lambda c: SpatialTransformation(c, max_translation=10, num_translations=2, **QUIET),
}


@pytest.mark.filterwarnings("ignore:x. .* images hold NaN:rs_plugins.errors.RSPluginsWarning")  # Square l2: 0/0
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("name", ATTACKS)
def test_arts_attacks_without_gradients_ask_the_votes(name):
    shape, samples = (1, 8, 8), 8
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 3))).eval()

    def scores(x):
        return 5 * network(torch.from_numpy(x)).detach().numpy()

    host = Counting(scores, shape, 3, clip_values=(0, 1))
    classifier = SmoothedBlackBox(host, SIGMA, samples=samples)
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1)).numpy()
    labels = classifier.predict(x).argmax(axis=1)
    np.random.seed(0)  # noqa: NPY002  ART draws from it
    host.asked = ()
    adversarial = ATTACKS[name](classifier).generate(x, np.eye(3)[labels])
    assert adversarial.shape == x.shape
    assert host.asked.count(samples) > 2
    assert set(host.asked) <= {samples, 1}  # all copies of an image; a close decision is taken again


def test_hop_skip_jump_turns_the_vote(fitted, digits):
    x = digits[0][1500:1501]
    classifier = SmoothedBlackBox(sklearn(fitted), SIGMA, samples=16)
    label = classifier.predict(x).argmax()
    np.random.seed(0)  # noqa: NPY002  ART draws from it
    adversarial = HopSkipJump(classifier, max_iter=3, max_eval=50, init_eval=10, **QUIET).generate(x)
    assert classifier.predict(adversarial).argmax() != label


def test_gradient_attacks_are_told_that_there_are_none(fitted):
    with pytest.raises(EstimatorError):
        ProjectedGradientDescent(SmoothedBlackBox(sklearn(fitted), SIGMA))


def test_a_classifier_without_probabilities(digits, few):
    """ART gives one-hot rows for scikit-learn's classifiers without ``predict_proba``."""
    model = LinearSVC(dual="auto").fit(digits[0][:300], digits[1][:300])
    expected = keys(certify(model.predict, torch.tensor(few), SIGMA, plan=FixedBudget(n=50), classes=10))
    assert keys(SmoothedBlackBox(sklearn(model), SIGMA).certificates(few, 50)) == expected
