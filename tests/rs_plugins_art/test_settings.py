"""Construction, settings and refused inputs."""

import itertools

import numpy as np
import pytest
import torch
from art.defences.postprocessor import HighConfidence
from art.defences.preprocessor import FeatureSqueezing
from art.estimators.classification import PyTorchClassifier
from torch import nn

from rs_plugins.core.smoothing import SmoothedModel
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning
from rs_plugins_art.classifier import SmoothedClassifier

from .conftest import CLASSES, SHAPE, Sharp, cnn, mlp


def test_two_arguments_suffice(x):
    model = cnn()
    classifier = SmoothedClassifier(model, 0.25)
    assert PyTorchClassifier in type(classifier).__mro__
    assert isinstance(classifier.model, SmoothedModel)
    assert classifier.base_model is model
    assert isinstance(classifier.loss, nn.CrossEntropyLoss)
    assert classifier.predict(x).shape == (5, CLASSES)
    assert (classifier.input_shape, classifier.nb_classes, classifier.sigma) == (SHAPE, CLASSES, 0.25)
    np.testing.assert_array_equal(classifier.clip_values, [0, 1])


@pytest.mark.parametrize("name", ["input_shape", "nb_classes"])
def test_what_is_not_known_yet_is_said_by_name(name):
    with pytest.raises(InputError, match=rf"{name}: not known before the first batch; pass {name}=\.\.\."):
        getattr(SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25), name)


def test_until_the_first_batch_the_last_layer_says_how_many_classes_there_are():
    """ART's attacks turn labels into rows before they show us an image."""
    assert SmoothedClassifier(cnn(), 0.25).nb_classes == CLASSES
    widening = nn.Sequential(nn.Flatten(), nn.Linear(72, 3), nn.ReflectionPad1d(1))
    classifier = SmoothedClassifier(widening, 0.25)
    assert classifier.nb_classes == 3  # a wrong guess
    assert classifier.predict(np.zeros((1, *SHAPE), np.float32)).shape == (1, 5)
    assert classifier.nb_classes == 5


def test_the_number_of_classes_is_found_from_the_model_where_the_shape_is_given():
    classifier = SmoothedClassifier(cnn(), 0.25, input_shape=list(SHAPE))
    assert classifier.nb_classes == CLASSES
    assert classifier.input_shape == SHAPE


def test_an_empty_first_batch_teaches_the_shape():
    classifier = SmoothedClassifier(cnn(), 0.25)
    assert classifier.predict(np.zeros((0, *SHAPE), np.float32)).shape == (0, CLASSES)
    assert classifier.input_shape == SHAPE


class Columns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.layer = nn.Identity()
        self.make = make

    def forward(self, x):
        return self.layer(self.make(x)) * self.scale


BAD_MODELS = {
    "one column": (lambda x: x.flatten(1)[:, :1], "model: expected at least 2 columns of logits, got 1"),
    "NaN": (lambda x: x.flatten(1)[:, :4] * float("nan"), "model: it returns NaN logits on a clean image"),
    "rank": (lambda x: x, r"model: expected logits of shape \(1, classes\), got shape \(1, 2, 6, 6\)"),
    "too many columns": (lambda x: x.flatten(1)[:, :5], "model: expected 4 columns of logits, got 5"),
    "shape": (lambda x: x @ torch.ones(9, 2), r"model: it fails on an input of shape \(1, 2, 6, 6\)"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_is_no_classifier_is_refused_by_the_constructor_if_the_shape_is_known(case):
    make, message = BAD_MODELS[case]
    with pytest.raises(ModelError, match=message):
        SmoothedClassifier(Columns(make), 0.25, input_shape=SHAPE, nb_classes=4)


METHODS = {
    "predict": lambda c, x, y: c.predict(x),
    "hard votes": lambda c, x, y: c.predict(x, is_abstain=True),
    "certify": lambda c, x, y: c.certify(x, 20, n0=5),
    "certificates": lambda c, x, y: list(c.certificates(x, 20, n0=5)),
    "votes": lambda c, x, y: c.votes(x, 20),
    "loss_gradient": lambda c, x, y: c.loss_gradient(x, y),
    "class_gradient": lambda c, x, y: c.class_gradient(x),
    "compute_loss": lambda c, x, y: c.compute_loss(x, y),
    "compute_losses": lambda c, x, y: c.compute_losses(x, y),
    "get_activations": lambda c, x, y: c.get_activations(x, 0),
    "fit": lambda c, x, y: c.fit(x, y, nb_epochs=1),
}


def trainable(model=None, **settings):
    model = cnn() if model is None else model
    return SmoothedClassifier(model, 0.25, optimizer=torch.optim.SGD(model.parameters(), lr=0.01), **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_model_that_is_no_classifier_is_refused_by_the_first_batch(method, case, x, y):
    make, message = BAD_MODELS[case]
    with pytest.raises(ModelError, match=message):
        METHODS[method](trainable(Columns(make), nb_classes=4), x, y)


BAD_IMAGES = {
    "NaN": (lambda x: np.where(x > 0.5, np.nan, x), "x: expected finite values, got NaN or infinity"),
    "infinity": (lambda x: np.where(x > 0.5, np.inf, x), "x: expected finite values, got NaN or infinity"),
    "integers": (lambda x: (x * 255).astype(np.uint8), "x: expected floating-point pixels .* divide 8-bit images by"),
    "shape": (lambda x: x[..., :5], r"x: expected a batch of images of shape \(2, 6, 6\), got shape \(5, 2, 6, 5\)$"),
    "one image": (lambda x: x[0], r"got shape \(2, 6, 6\); one image needs a batch axis, x\[None\]"),
    "flat": (lambda x: x.reshape(-1), r"x: expected a batch of shape \(n, \*input\), got shape \(360,\)"),
}


NAN_IN_NAN_OUT = [("predict", "NaN"), ("predict", "infinity")]  # see test_predictions_of_nan_images_are_nan


@pytest.mark.parametrize(
    ("method", "case"), [pair for pair in itertools.product(METHODS, BAD_IMAGES) if pair not in NAN_IN_NAN_OUT]
)
def test_bad_images_are_refused(method, case, x, y):
    spoil, message = BAD_IMAGES[case]
    with pytest.raises(InputError, match=message):
        METHODS[method](trainable(input_shape=SHAPE), spoil(x), y)


IN_THE_BOX = ("certify", "certificates", "votes", "fit")


@pytest.mark.parametrize("method", METHODS)
def test_only_what_makes_promises_insists_on_pixels_in_0_to_1(method, x, y):
    outside = x * 1.5 - 0.2
    if method in IN_THE_BOX:
        with pytest.raises(InputError, match=r"expected pixels in \[0, 1\], got values from"):
            METHODS[method](trainable(), outside, y)
    else:
        METHODS[method](trainable(), outside, y)


WITH_LABELS = ("loss_gradient", "compute_loss", "compute_losses", "fit")


@pytest.mark.parametrize("method", WITH_LABELS)
def test_labels_out_of_range_are_refused(method, x, y):
    with pytest.raises(InputError, match=r"y: expected labels in \[0, 4\), got values from 1 to 4"):
        METHODS[method](trainable(), x, y + 1)


BAD_SETTINGS = {
    "sigma 0": ({"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
    "sigma below": ({"sigma": -0.25}, "sigma: expected a finite number > 0, got -0.25"),
    "sigma NaN": ({"sigma": float("nan")}, "sigma: expected a finite number > 0, got nan"),
    "sigma infinite": ({"sigma": float("inf")}, "sigma: expected a finite number > 0, got inf"),
    "sigma is a loss": ({"sigma": nn.CrossEntropyLoss()}, r"sigma: expected .* got CrossEntropyLoss\(\)"),
    "samples": ({"samples": 0}, "samples: expected an integer >= 1, got 0"),
    "samples fraction": ({"samples": 1.5}, "samples: expected an integer >= 1, got 1.5"),
    "noise": ({"noise": "new"}, "noise: expected 'fixed' or 'fresh', got 'new'"),
    "output": ({"output": "logits"}, "output: expected 'log_probs' or 'probs', got 'logits'"),
    "alpha 0": ({"alpha": 0}, r"alpha: expected a number in \(0, 1\), got 0"),
    "alpha 1": ({"alpha": 1.0}, r"alpha: expected a number in \(0, 1\), got 1.0"),
    "alpha NaN": ({"alpha": float("nan")}, r"alpha: expected a number in \(0, 1\), got nan"),
    "seed": ({"seed": 1.5}, "seed: expected an integer or None, got 1.5"),
    "chunk": ({"chunk": 0}, "chunk: expected an integer >= 1, got 0"),
    "classes": ({"nb_classes": 1}, "nb_classes: expected an integer >= 2, got 1"),
    "shape": ({"input_shape": (2, 0, 6)}, "input_shape: expected an integer >= 1, got 0"),
    "loss": ({"loss": nn.MSELoss()}, r"loss: expected torch.nn.CrossEntropyLoss\(\) .* got MSELoss"),
    "weights": ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss: expected .* without weights or label smoo"),
    "optimizer": ({"optimizer": "adam"}, "optimizer: expected a torch.optim.Optimizer or None, got str"),
    "foreign optimizer": (
        {"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)},
        "optimizer: expected one over the model's parameters",
    ),
    "preprocessing": ({"preprocessing": (0.5, 0.25)}, "preprocessing: expected the identity, None or"),
    "scale": ({"preprocessing": (0, 0.5)}, r"preprocessing: expected the identity, None or \(0, 1\), got"),
    "mean": ({"preprocessing": (np.array([0.5, 0.5]), 1)}, "put normalisation inside the model as a layer"),
    "defence": (
        {"preprocessing_defences": FeatureSqueezing(clip_values=(0, 1))},
        "preprocessing_defences: expected None, got .*FeatureSqueezing",
    ),
    "defences": (
        {"preprocessing_defences": [FeatureSqueezing(clip_values=(0, 1))]},
        "preprocessing_defences: expected None, got .*FeatureSqueezing",
    ),
    "postprocessor": (
        {"postprocessing_defences": HighConfidence()},
        "postprocessing_defences: expected None, got .*HighConfidence",
    ),
    "clip values": ({"clip_values": (0, 255)}, r"clip_values: expected \(0, 1\) or None, got"),
    "clip arrays": ({"clip_values": (np.zeros(3), np.full(3, 2.0))}, r"clip_values: expected \(0, 1\) or None, got"),
    "no such device": ({"device_type": "nonsense"}, "device_type: expected a device of this machine, got 'nonsense'"),
    "meta device": ({"device_type": "meta"}, "device_type: expected the model's own device cpu, got meta"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_by_the_constructor(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(InputError, match=message):
        SmoothedClassifier(cnn(), **{"sigma": 0.25, **settings})


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_and_by_set_params_which_then_changes_nothing(case, x):
    settings, message = BAD_SETTINGS[case]
    classifier = SmoothedClassifier(cnn(), 0.25, seed=5)
    before, rows = classifier.get_params(), classifier.predict(x)
    before |= {"input_shape": SHAPE, "nb_classes": CLASSES}
    with pytest.raises(ValueError, match=message):
        classifier.set_params(**{"samples": 3, **settings, "alpha": settings.get("alpha", 0.5)})
    after = classifier.get_params()
    np.testing.assert_array_equal(after.pop("clip_values"), before.pop("clip_values"))
    assert after == before
    assert classifier.preprocessing_operations == []
    assert np.array_equal(classifier.predict(x), rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_cuda_device_that_is_not_there(device):
    with pytest.raises(InputError, match="device_type: expected a device of this machine, got 'cuda"):
        SmoothedClassifier(cnn(), 0.25, device_type=device)


def test_a_model_without_parameters_needs_a_device():
    class Free(nn.Module):
        def forward(self, x):
            return torch.stack([x.flatten(1).sum(1), -x.flatten(1).sum(1)], dim=1)

    with pytest.raises(InputError, match=r"model: it has no parameters or buffers, .* pass device_type='cpu'"):
        SmoothedClassifier(Free(), 0.25)
    classifier = SmoothedClassifier(Free(), 0.25, device_type="cpu")
    x = np.random.default_rng(0).random((3, 5), dtype=np.float32)
    assert classifier.predict(x).shape == (3, 2)
    assert classifier.certify(x, 50)[0].shape == (3,)
    assert classifier.votes(x, 50)[0].sum() == 150
    assert classifier.loss_gradient(x, [0, 1, 0]).shape == x.shape


@pytest.mark.parametrize("model", [None, lambda x: x, "resnet"])
def test_what_is_no_module(model):
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, got"):
        SmoothedClassifier(model, 0.25, device_type="cpu")


def test_a_smoothed_model_is_not_smoothed_again():
    with pytest.raises(InputError, match="noise would be added twice"):
        SmoothedClassifier(SmoothedModel(cnn(), 0.25), 0.25)


NEUTRAL = {
    "preprocessing": [(0.0, 1.0), (0, 1), None, (np.zeros(2), np.ones(2))],
    "preprocessing_defences": [None, []],
    "postprocessing_defences": [None, []],
    "clip_values": [(0, 1), (np.zeros(SHAPE), np.ones(SHAPE)), None],
    "use_amp": [False],
    "opt_level": ["O1"],
    "loss_scale": ["dynamic"],
    "device_type": ["cpu", None],
    "loss": [None, nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NEUTRAL for value in NEUTRAL[name]], ids=repr)
def test_neutral_values_of_arts_own_arguments_are_accepted(name, value, x):
    classifier = SmoothedClassifier(cnn(), 0.25, **{name: value})
    assert np.array_equal(classifier.predict(x), SmoothedClassifier(cnn(), 0.25).predict(x))
    assert classifier.all_framework_preprocessing  # selects the PyTorch version of PGD


def test_set_params_with_the_identity_keeps_arts_pytorch_attacks():
    classifier = SmoothedClassifier(cnn(), 0.25)
    classifier.set_params(preprocessing=(0.0, 1.0), preprocessing_defences=[])
    assert classifier.all_framework_preprocessing
    assert classifier.preprocessing_operations == []


def test_mixed_precision_is_refused():
    with pytest.raises(InputError, match="use_amp: expected False"):
        SmoothedClassifier(cnn(), 0.25, use_amp=True)


def test_a_misspelt_keyword_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        SmoothedClassifier(cnn(), 0.25, sample=3)
    with pytest.raises(InputError, match=r"set_params: expected names among model, clip_values, .*; got 'sample'"):
        SmoothedClassifier(cnn(), 0.25).set_params(sample=3)


CHANGES = {
    "sigma": 0.5,
    "samples": 7,
    "noise": "fresh",
    "output": "probs",
    "alpha": 0.05,
    "seed": 9,
    "chunk": 11,
    "channels_first": False,
    "clip_values": None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_means_the_same_in_the_constructor_and_in_set_params(name, x, y):
    value = CHANGES[name]
    made, changed = SmoothedClassifier(cnn(), **{"sigma": 0.25, name: value}), SmoothedClassifier(cnn(), 0.25)
    changed.set_params(**{name: value})
    assert made.get_params()[name] == changed.get_params()[name] == value
    assert np.array_equal(made.predict(x), changed.predict(x))
    assert np.array_equal(made.loss_gradient(x, y), changed.loss_gradient(x, y))
    assert np.array_equal(made.certify(x, 60)[1], changed.certify(x, 60)[1])


def test_params_round_trip_before_and_after_the_first_batch(x):
    classifier = SmoothedClassifier(cnn(), 0.25, samples=5)
    assert classifier.get_params()["input_shape"] is None
    classifier.set_params(**classifier.get_params())
    rows = classifier.predict(x)
    classifier.set_params(**classifier.get_params())
    assert np.array_equal(classifier.predict(x), rows)


def test_the_model_cannot_be_exchanged():
    with pytest.raises(InputError, match="model: cannot be exchanged; make a new SmoothedClassifier"):
        SmoothedClassifier(cnn(), 0.25).set_params(model=mlp())


def test_a_seed_of_none_is_a_new_one_each_time(x):
    one, two = (SmoothedClassifier(cnn(), 0.25, seed=None) for _ in range(2))
    assert one.seed != two.seed
    assert not np.array_equal(one.predict(x), two.predict(x))
    assert np.array_equal(one.predict(x), one.predict(x))


def test_repr_says_what_matters():
    text = repr(SmoothedClassifier(cnn(), 0.25, samples=8, alpha=0.01))
    for part in ("SmoothedClassifier(Sequential(", "sigma=0.25", "samples=8", "alpha=0.01"):
        assert part in text


def test_buffers_alone_say_where_a_model_lives():
    assert SmoothedClassifier(Sharp([1.0, 0.0], 0.5), 0.25).device.type == "cpu"


def test_a_model_stays_on_its_device(monkeypatch):
    """The host's constructor moves a model to the current CUDA device, or to the CPU; the meta device stands in."""
    monkeypatch.setattr("rs_plugins.core.models._computing", lambda device, _: device)  # else refused
    model = nn.Linear(3, 2, device="meta")
    classifier = SmoothedClassifier(model, 0.25)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert (classifier.device.type, classifier.device_type) == ("meta", "meta")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"scale": 0.25}, "the name here is sigma"),
        ({"sample_size": 9}, r"samples \(for predict\) and n0 \(for certify\)"),
    ],
    ids=["scale", "sample_size"],
)
def test_the_words_of_arts_own_smoothing_are_translated_in_the_error(words, message):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(words))}'; .*{message}"):
        SmoothedClassifier(cnn(), **words)


def test_sigma_is_needed():
    with pytest.raises(InputError, match="sigma: expected the standard deviation"):
        SmoothedClassifier(cnn())


@pytest.mark.parametrize("model", [lambda x: x, None], ids=["function", "nothing"])
def test_the_model_is_called_model(model):
    with pytest.raises(InputError, match=r"model: expected a torch.nn.Module, got"):
        SmoothedClassifier(model, 0.25)


def test_an_estimator_is_no_base_classifier():
    with pytest.raises(InputError, match=r"got SmoothedClassifier; pass its base_model"):
        SmoothedClassifier(SmoothedClassifier(cnn(), 0.25), 0.25)


def test_images_of_0_to_255_are_warned_of(x):
    with pytest.warns(
        RSPluginsWarning, match=r"x: pixels are expected in \[0, 1\], got values up to .*; divide by 255"
    ):
        SmoothedClassifier(cnn(), 0.25).predict(x * 255)
