"""Predictions: rows for ART, determinism, abstention, noise that no host setting clips or scales."""

import numpy as np
import pytest
import torch
from art.attacks.attack import EvasionAttack
from art.metrics import adversarial_accuracy
from art.utils import compute_accuracy, compute_success, is_probability
from scipy.special import log_softmax, softmax
from torch import nn

from rs_plugins.core.certification import majority
from rs_plugins.errors import InputError, ModelError, ModelWarning, RSPluginsWarning
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Recorder, Sharp, cnn, mlp


def formula(model, x, draws):
    """The mean softmax, written down in double precision."""
    with torch.no_grad():
        logits = torch.stack([model(torch.tensor(x) + draw) for draw in draws]).double().numpy()
    return softmax(logits, axis=2).mean(axis=0)


def draws_of(classifier, x):
    return classifier.model.fixed_draws(torch.tensor(x))


def test_predict_is_the_shifted_log_of_the_mean_softmax(x):
    classifier = SmoothedClassifier(cnn(3), 0.25, samples=6)
    expected = np.log(formula(cnn(3), x, draws_of(classifier, x)))
    rows = classifier.predict(x)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(log_softmax(rows, axis=1), expected, atol=1e-5)
    sums = rows.sum(axis=1)
    assert ((sums >= 1 - 1.5e-6) & (sums <= 1)).all()
    assert not any(map(is_probability, rows))
    assert compute_accuracy(rows, rows)[1] == 1.0  # coverage: no row counts as abstained


def test_predict_gives_probabilities_on_request(x):
    classifier = SmoothedClassifier(cnn(3), 0.25, samples=6, output="probs")
    rows = classifier.predict(x)
    np.testing.assert_allclose(rows, formula(cnn(3), x, draws_of(classifier, x)), atol=1e-6)
    assert rows.dtype == np.float64
    assert all(map(is_probability, rows))


SETTINGS = [
    {},
    {"noise": "fresh"},
    {"chunk": 1},
    {"chunk": 7},
    {"chunk": 1000},
    {"samples": 1},
    {"output": "probs"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_predict_is_a_function_of_each_image_alone(settings, x):
    classifier = SmoothedClassifier(cnn(3), 0.25, **settings)
    rows = classifier.predict(x)
    assert np.array_equal(classifier.predict(x), rows)
    classifier.loss_gradient(x, rows.argmax(1))  # draws new noise with noise="fresh"
    assert np.array_equal(classifier.predict(x), rows)
    for batch_size in (1, 2, 5):
        np.testing.assert_allclose(classifier.predict(x, batch_size=batch_size), rows, atol=1e-6)
    order = [3, 0, 4, 1, 2]
    np.testing.assert_allclose(classifier.predict(x[order]), rows[order], atol=1e-6)
    np.testing.assert_allclose(classifier.predict(x[2:3]), rows[2:3], atol=1e-6)


def test_chunk_and_seed_and_samples_and_sigma_do_what_they_say(x):
    def rows(**settings):
        return SmoothedClassifier(cnn(3), **{"sigma": 0.25, **settings}).predict(x)

    np.testing.assert_allclose(rows(chunk=3), rows(), atol=1e-6)
    for changed in ({"seed": 1}, {"samples": 16}, {"sigma": 0.5}):
        assert np.abs(rows(**changed) - rows()).max() > 1e-3


@pytest.mark.parametrize(("chunk", "largest"), [(1, 1), (7, 5), (12, 10), (None, 160)])
def test_no_pass_is_larger_than_chunk(chunk, largest, x):
    model = Recorder(cnn())
    classifier = SmoothedClassifier(model, 0.25, chunk=chunk, input_shape=SHAPE)
    model.batches = []
    classifier.predict(x)
    assert model.inputs == 5 * 32
    assert max(map(len, model.batches)) == largest


class Nothing(EvasionAttack):
    """An attack that gives back what it gets."""

    _estimator_requirements = ()

    def generate(self, x, y=None, **kwargs):
        return x.copy()


@pytest.mark.parametrize("sigma", [0.25, 1.0])
@pytest.mark.parametrize("samples", [1, 8])
def test_an_attack_that_does_nothing_never_succeeds(sigma, samples):
    x = np.random.default_rng(0).random((64, *SHAPE), dtype=np.float32)
    classifier = SmoothedClassifier(cnn(3), sigma, samples=samples)
    labels = classifier.predict(x)
    attack = Nothing(estimator=classifier)
    assert adversarial_accuracy(classifier, x, labels, attack_crafter=attack) == 1.0
    assert compute_success(classifier, x, labels, attack.generate(x)) == 0.0


ARRAYS = {
    "float64": lambda x: x.astype(np.float64),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "list": lambda x: x.tolist(),
    "tensor": torch.tensor,
    "float64 tensor": lambda x: torch.tensor(x).double(),
}


# ART calls np.array on a tensor before we see it.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("form", ARRAYS)
def test_predict_takes_images_of_every_form(form, x):
    classifier = SmoothedClassifier(cnn(3), 0.25)
    before = x.copy()
    assert np.array_equal(classifier.predict(ARRAYS[form](x)), classifier.predict(x))
    assert np.array_equal(x, before)


def test_predict_takes_what_hosts_pass(x, y):
    classifier = SmoothedClassifier(cnn(), 0.25)
    rows = classifier.predict(x)
    assert np.array_equal(classifier.predict(x=x, y=y), rows)
    assert np.array_equal(classifier.predict(x, logits=True, batch_size=2, verbose=False), rows)
    assert np.array_equal(classifier.predict(x, 3, False), rows)
    with pytest.raises(TypeError, match="unexpected keyword argument 'batchsize'"):
        classifier.predict(x, batchsize=2)
    with pytest.raises(InputError, match="training_mode: expected False"):
        classifier.predict(x, training_mode=True)
    with pytest.raises(InputError, match="batch_size: expected an integer >= 1, got 0"):
        classifier.predict(x, batch_size=0)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("output", ["log_probs", "probs"])
def test_an_empty_batch(rank, output):
    model, shape = (mlp(), (7,)) if rank == 2 else (cnn(), SHAPE)
    classifier = SmoothedClassifier(model, 0.25, output=output)
    empty, no_labels = np.zeros((0, *shape), np.float32), np.zeros(0, int)
    assert classifier.predict(empty).shape == (0, CLASSES)
    assert classifier.predict(empty, is_abstain=True).shape == (0, CLASSES)
    assert classifier.loss_gradient(empty, no_labels).shape == empty.shape
    assert classifier.class_gradient(empty).shape == (0, CLASSES, *shape)
    assert classifier.compute_loss(empty, no_labels).shape == (0,)
    labels, radii = classifier.certify(empty, 20)
    assert (labels.dtype, radii.dtype, labels.shape, radii.shape) == (np.int64, np.float64, (0,), (0,))
    counts, abstains = classifier.votes(empty, 20)
    assert (counts.shape, abstains.shape) == ((0, CLASSES), (0,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_precision_are_given_their_own(dtype, x, y):
    classifier = SmoothedClassifier(cnn().to(dtype), 0.25, samples=4)
    assert classifier.predict(x).dtype == np.float64
    assert classifier.loss_gradient(x, y).dtype == np.float32
    assert classifier.class_gradient(x, 1).dtype == np.float32
    assert classifier.compute_loss(x, y).shape == (5,)
    assert classifier.certify(x, 20, n0=4)[0].shape == (5,)


def noise_std(classifier, call):
    """The standard deviation of what reaches the base model around images of pixels 1/2, and its range."""
    classifier.base_model.batches = []
    call(classifier, np.full((20, *SHAPE), 0.5, np.float32), np.arange(20) % CLASSES)
    seen = [batch for batch in classifier.base_model.batches if bool((batch != batch[:1, :1, :1, :1]).any())]
    noisy = torch.cat(seen) - 0.5
    return float(noisy.std()), float(noisy.min()), float(noisy.max())


PATHS = {
    "predict": lambda c, x, y: c.predict(x),
    "abstain": lambda c, x, y: c.predict(x, is_abstain=True),
    "certify": lambda c, x, y: c.certify(x, 40, n0=8),
    "votes": lambda c, x, y: c.votes(x, 40),
    "fit": lambda c, x, y: c.fit(x, y, nb_epochs=4),
    "fit in eval mode": lambda c, x, y: c.fit(x, y, nb_epochs=4, training_mode=False),
    "loss_gradient": lambda c, x, y: c.loss_gradient(x, y),
    "class_gradient": lambda c, x, y: c.class_gradient(x),
    "compute_loss": lambda c, x, y: c.compute_loss(x, y),
    "module": lambda c, x, y: c.model.eval()(torch.tensor(x)),
    "module in train mode": lambda c, x, y: [c.model.train()(torch.tensor(x)) for _ in range(4)],
}


@pytest.mark.parametrize("clip_values", [(0, 1), None], ids=repr)
@pytest.mark.parametrize("path", PATHS)
def test_the_model_sees_noise_of_sigma_pixels_unclipped(path, clip_values):
    model = Recorder(cnn())
    classifier = SmoothedClassifier(
        model,
        0.5,
        samples=64,
        clip_values=clip_values,
        input_shape=SHAPE,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
    )
    std, low, high = noise_std(classifier, PATHS[path])
    assert std == pytest.approx(0.5, rel=0.05)
    assert low < -0.6  # pixels below 0
    assert high > 0.6  # and above 1


def test_abstention_in_arts_format_is_predict_of_cohen_et_al_on_the_fixed_draws():
    classifier = SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25, samples=40)
    x = np.array([[0.0, 0.5], [1.0, 0.5], [0.5, 0.5], [0.9, 0.1]], np.float32)
    with torch.no_grad():
        votes = [
            Sharp([1.0, 0.0], 0.5)(torch.tensor(row) + draws_of(classifier, x)).argmax(1).bincount(minlength=2).tolist()
            for row in x
        ]
    expected = majority(np.array(votes), 0.001)
    assert list(expected[:3]) == [0, 1, -1]
    rows = classifier.predict(x, is_abstain=True)
    assert np.array_equal(rows, np.where(expected[:, None] == np.arange(2), 1.0, 0.0))
    order = [2, 0, 3, 1]
    assert np.array_equal(classifier.predict(x[order], is_abstain=True), rows[order])
    accuracy, coverage = compute_accuracy(rows, np.eye(2)[[0, 1, 0, 1]])
    assert (accuracy, coverage) == (1.0, (expected != -1).mean())


def test_alpha_decides_who_abstains():
    x = np.array([[0.6, 0.5]], np.float32)
    strict = SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25, samples=40, alpha=1e-6)
    lenient = SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25, samples=40, alpha=0.5)
    assert strict.predict(x, is_abstain=True).sum() == 0
    assert lenient.predict(x, is_abstain=True).sum() == 1


def test_too_few_samples_to_predict_anything(x):
    classifier = SmoothedClassifier(cnn(), 0.25, samples=10)
    with pytest.raises(InputError, match=r"samples: 10 are too few to predict at alpha = 0.001"):
        classifier.predict(x, is_abstain=True)
    classifier.set_params(samples=11)
    classifier.predict(x, is_abstain=True)


@pytest.mark.parametrize("output", ["log_probs", "probs"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_predictions_of_nan_images_are_nan_with_a_warning(value, output, x):
    """ART's Square attack asks for them and goes on; an error would end it."""
    classifier = SmoothedClassifier(cnn(3), 0.25, output=output)
    broken = x.copy()
    broken[[1, 3], 0, 0, 0] = value
    with pytest.warns(RSPluginsWarning, match="x: 2 of 5 images hold NaN or infinity; their predictions are NaN"):
        rows = classifier.predict(broken)
    assert np.isnan(rows[[1, 3]]).all()
    np.testing.assert_allclose(rows[[0, 2, 4]], classifier.predict(x)[[0, 2, 4]], atol=1e-6)
    assert np.array_equal(np.isnan(broken) | np.isinf(broken), broken != x)


class Sometimes(nn.Module):
    """NaN logits where the first pixel is above 1; class 0 otherwise."""

    def __init__(self):
        super().__init__()
        self.register_buffer("row", torch.tensor([1.0, 0.0]))

    def forward(self, x):
        return torch.where(x[:, :1] > 1, torch.nan, self.row.expand(len(x), 2))


def test_nan_logits_under_noise_are_no_votes_and_no_predictions():
    classifier = SmoothedClassifier(Sometimes(), 0.25, samples=40)
    x = np.array([[0.99, 0.5]], np.float32)
    with pytest.raises(ModelError, match="model: expected finite logits, got NaN or infinity on noisy images"):
        classifier.predict(x)
    with pytest.warns(ModelWarning, match="noisy copies gave NaN logits"):
        assert classifier.predict(x, is_abstain=True).tolist() == [[1.0, 0.0]]
    with pytest.warns(ModelWarning, match="noisy copies gave NaN logits"):
        labels, radii = classifier.certify(x, 200)
    assert (labels[0], radii[0]) == (-1, 0.0)
    with pytest.warns(ModelWarning, match="noisy copies gave NaN logits"):
        counts, _ = classifier.votes(x, 200)
    assert 0 < counts.sum() < 200
    assert counts[0, 1] == 0
