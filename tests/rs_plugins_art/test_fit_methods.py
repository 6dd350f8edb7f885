"""fit and fit_generator with the training methods of core, and with an objective of one's own."""

import copy

import numpy as np
import pytest
import torch
from art.data_generators import NumpyDataGenerator
from torch import nn
from torch.nn.functional import cross_entropy

from rs_plugins import registry
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.streams import stream
from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.loop import train
from rs_plugins.core.training.methods import METHODS, make_objective, takes_noise
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.errors import InputError

from .conftest import CLASSES, Recorder, cnn, mlp
from .test_gradients import SOFT
from .test_training import half, noise_seen, trainable, weights

# Each with an option that is not the method's default
OPTIONS = {
    "consistency": {"lam": 5.0, "attack": PGD(eps=0.5, steps=2)},
    "gaussian": {"samples": 3},
    "macer": {"samples": 4, "lam": 6.0},
    "smoothadv": {"attack": PGD(eps=0.5, steps=2), "samples": 2},
    "smoothmix": {"steps": 2, "mix_step": 1},
    "stability": {"lam": 3.0, "samples": 2},
    "stability-confseq": {"lam": 3.0},
    "stability-rs4a": {"lam": 3.0},
}


def quiet():
    """A network with batch normalisation, but without dropout, which draws from the global generator."""
    network = cnn()
    network[3] = nn.Identity()
    return network


def test_the_methods_are_components_and_there_are_options_for_each():
    names = {component.name for component in registry.components("trainer") if not component.name.startswith("art.")}
    assert METHODS.keys() == names
    assert list(OPTIONS) == [name for name in METHODS if takes_noise(name)]
    assert {name: registry.component("trainer", name) for name in names} == METHODS


@pytest.mark.parametrize("method", OPTIONS)
def test_fit_is_cores_loop_with_the_objective_of_that_name(method, x, y):
    model = quiet()
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    classifier = trainable(model, sigma=0.5, seed=3)
    classifier.fit(x, y, batch_size=4, nb_epochs=2, parts=2, first_epoch=4, method=method, **OPTIONS[method])
    train(
        *(twin, torch.tensor(x), torch.tensor(y), make_objective(method, 0.5, **OPTIONS[method])),
        **{"optimizer": optimizer, "batch_size": 4, "epochs": 2, "parts": 2, "first_epoch": 4},
        seed=stream(3, "fit", 1).initial_seed(),
    )
    assert all(torch.equal(twin.state_dict()[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", OPTIONS)
def test_an_objective_trains_as_its_name_does(method, x, y):
    named, given, default = (trainable(quiet()) for _ in range(3))
    named.fit(x, y, method=method, nb_epochs=1, **OPTIONS[method])
    given.fit(x, y, method=make_objective(method, 0.25, **OPTIONS[method]), nb_epochs=1)
    default.fit(x, y, method=method, nb_epochs=1)
    assert torch.equal(weights(given), weights(named))
    assert not torch.equal(weights(default), weights(named))


@pytest.mark.parametrize("method", OPTIONS)
def test_batch_normalisation_can_stay_as_it_is(method, x, y):
    for training_mode, moved in ((True, True), (False, False)):
        classifier = trainable(cnn())
        before = classifier.base_model[1].running_mean.clone()
        start = weights(classifier)
        classifier.fit(x, y, nb_epochs=1, training_mode=training_mode, method=method, **OPTIONS[method])
        assert torch.equal(classifier.base_model[1].running_mean, before) is not moved
        assert not torch.equal(weights(classifier), start)


def test_any_function_is_an_objective(x, y):
    def clean(model, batch, draws):
        return cross_entropy(model(batch.x), batch.y)

    classifier = trainable(Recorder(quiet()))
    classifier.predict(x)
    assert noise_seen(classifier, lambda: classifier.fit(np.full_like(x, 0.5), y, method=clean)) == []
    fitted = weights(classifier)
    classifier.fit(x, SOFT, method=clean, nb_epochs=1)
    assert not torch.equal(weights(classifier), fitted)


class Epochs:
    """An objective that remembers of which epoch each batch was, and of how many images."""

    def __init__(self):
        self.seen, self.sizes = [], []

    def __call__(self, model, batch, draws):
        self.seen.append(batch.epoch)
        self.sizes.append(len(batch.x))
        return cross_entropy(model(batch.x), batch.y)


def test_parts_and_epochs_reach_the_objective():
    x, y = half(10)
    classifier, objective = trainable(cnn()), Epochs()
    classifier.fit(x, y, batch_size=5, nb_epochs=2, method=objective, parts=2, first_epoch=3)
    assert (objective.seen, objective.sizes) == ([3] * 4 + [4] * 4, [3, 2] * 4)
    classifier.fit(x, y, batch_size=10, nb_epochs=1, method=(objective := Epochs()))
    assert (objective.seen, objective.sizes) == ([0], [10])
    generator = NumpyDataGenerator(x, y, batch_size=5)
    larger = NumpyDataGenerator(*half(20), batch_size=10)
    classifier.fit_generator(larger, nb_epochs=2, method=(objective := Epochs()), parts=5, first_epoch=3)
    assert (objective.seen, objective.sizes) == ([3] * 10 + [4] * 10, [2] * 20)
    classifier.fit_generator(generator, nb_epochs=2, method=(objective := Epochs()))
    assert objective.seen == [0, 0, 1, 1]


def test_warm_up_goes_by_the_epochs_of_fit_generator():
    class Watched:
        def __init__(self):
            self.lengths = []

        def __call__(self, model, x, y, e, share):
            found = PGD(eps=0.4, steps=2)(model, x, y, e, share)
            self.lengths.append(float((found - x).flatten(1).norm(dim=1).max()))
            return found

    x, y = half(8)
    classifier, attack = trainable(cnn()), Watched()
    generator = NumpyDataGenerator(x, y, batch_size=4)
    classifier.fit_generator(generator, nb_epochs=3, method="smoothadv", attack=attack, warmup=4)
    assert attack.lengths == pytest.approx([0.1] * 2 + [0.2] * 2 + [0.3] * 2, rel=1e-4)


def test_the_noise_is_the_classifiers(x, y):
    classifier = trainable(Recorder(cnn()), sigma=0.5)
    draws = torch.cat(noise_seen(classifier, lambda: classifier.fit(*half(64), method="macer", nb_epochs=1)))
    assert float(draws.std()) == pytest.approx(0.5, rel=0.02)
    classifier.fit(x, y, nb_epochs=1, method=Gaussian(0.5))
    classifier.sigma = 0.25
    with pytest.raises(
        InputError, match=r"method: expected an objective for the classifier's sigma 0\.25, got one for"
    ):
        classifier.fit(x, y, method=Gaussian(0.5))


def test_whole_numbers_of_every_kind_are_taken(x, y):
    one, other = trainable(quiet()), trainable(quiet())
    one.fit(x, y, batch_size=4, nb_epochs=2, parts=2, first_epoch=1)
    other.fit(x, y, batch_size=4.0, nb_epochs=2.0, parts=np.float64(2), first_epoch=np.int64(1))
    assert torch.equal(weights(one), weights(other))
    assert np.array_equal(one.predict(x, batch_size=2), other.predict(x, batch_size=2.0))


class Uniform(GaussianNoise):
    name = "uniform"


OWN = (
    "its own are batch_size, drop_last, validation_data, nb_epochs, verbose, training_mode, scheduler, method, parts, "
    "first_epoch"
)
WRONG = {
    "a misspelt keyword": (
        {"epochs": 1},
        TypeError,
        rf"fit\(\) got an unexpected keyword argument 'epochs'; {OWN}; the options of 'gaussian' are samples$",
    ),
    "another method's option": (
        {"method": "stability", "steps": 2},
        TypeError,
        "unexpected keyword argument 'steps'; its own are .*; the options of 'stability' are lam, samples$",
    ),
    "an option beside an objective": (
        {"method": SmoothAdv(0.25), "samples": 2},
        TypeError,
        "unexpected keyword argument 'samples'; its own are .*; an objective brings its own options$",
    ),
    "sigma": ({"sigma": 0.25}, TypeError, "argument 'sigma'; the noise is that of the classifier$"),
    "family": ({"family": GaussianNoise}, TypeError, "argument 'family'; the noise is that of the classifier$"),
    "no such method": ({"method": "smoothavd"}, InputError, "method: expected one of 'consistency', .*got 'smoothavd'"),
    "a class": ({"method": SmoothAdv}, InputError, "method: expected one of 'consistency', .* or an objective, got <"),
    "no function": ({"method": 3}, InputError, "or an objective, got 3"),
    "another sigma": ({"method": Consistency(0.5)}, InputError, r"classifier's sigma 0\.25, got one for 0\.5"),
    "another family": (
        {"method": Gaussian(0.25, family=Uniform)},
        InputError,
        "an objective for the classifier's noise family 'gaussian', got 'uniform'",
    ),
    "an impossible value": ({"samples": 0}, InputError, "samples: expected an integer >= 1, got 0"),
    "parts": ({"parts": 0}, InputError, "parts: expected an integer >= 1, got 0"),
    "first epoch": ({"first_epoch": -1}, InputError, "first_epoch: expected an integer >= 0, got -1"),
    "epochs": ({"nb_epochs": -1}, InputError, "nb_epochs: expected an integer >= 0, got -1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case, x, y):
    options, error, message = WRONG[case]
    classifier = trainable(mlp())
    before = weights(classifier)
    with pytest.raises(error, match=message):
        classifier.fit(x.reshape(5, -1)[:, :7], y, **options)
    generator = NumpyDataGenerator(x.reshape(5, -1)[:, :7], y, batch_size=5)
    message = message.replace("batch_size, drop_last, validation_data, ", "")
    with pytest.raises(error, match=message):
        classifier.fit_generator(generator, **options)
    assert torch.equal(weights(classifier), before)


@pytest.mark.parametrize("method", [name for name in OPTIONS if name != "gaussian"])
def test_class_probabilities_are_refused_by_all_methods_but_one(method, x):
    classifier = trainable(cnn())
    before = weights(classifier)
    with pytest.raises(InputError, match=r"y: expected a tensor of integer labels, got torch\.float32"):
        classifier.fit(x, SOFT, method=method, nb_epochs=1)
    assert torch.equal(weights(classifier), before)
    classifier.fit(x, np.eye(CLASSES)[[0, 3, 2, 1, 0]], method=method, nb_epochs=1)
    assert not torch.equal(weights(classifier), before)


def test_progress_is_shown_on_request(x, y, capsys):
    classifier = trainable(cnn())
    classifier.fit(x, y, nb_epochs=1)
    classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=5), nb_epochs=1)
    assert capsys.readouterr() == ("", "")
    classifier.fit(x, y, nb_epochs=2, verbose=True)
    assert "2/2" in capsys.readouterr().err
    classifier.fit_generator(NumpyDataGenerator(x, y, batch_size=5), nb_epochs=2, verbose=True)
    assert "2/2" in capsys.readouterr().err
