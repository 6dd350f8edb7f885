"""Copies and files: clone, deepcopy, pickle, save and load, and nothing written where nobody asked for it."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from art import config
from torch import nn

from rs_plugins.core.noise import GaussianNoise
from rs_plugins.errors import InputError, ModelError
from rs_plugins_art.classifier import SmoothedClassifier
from rs_plugins_art.files import read_settings, save_classifier

from .conftest import CLASSES, SHAPE, Recorder, cnn, mlp, seeded
from .test_training import noise_seen, trainable

SETTINGS = {
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


@pytest.fixture(autouse=True)
def art_folder(tmp_path, monkeypatch):
    """ART's own copies write there."""
    folder = tmp_path / "art data"
    folder.mkdir()
    monkeypatch.setattr(config, "ART_DATA_PATH", str(folder))
    return folder


def trained(x, y, model=None):
    model = cnn(3) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.02)
    classifier = SmoothedClassifier(model, optimizer=optimizer, **SETTINGS)
    classifier.fit(x, y, nb_epochs=2)
    return classifier


def same(one, two, x, y):
    params, others = one.get_params(), two.get_params()
    for name in ("model", "optimizer", "loss"):
        params.pop(name), others.pop(name)
    assert params == others
    assert np.array_equal(one.predict(x), two.predict(x))
    assert np.array_equal(one.certify(x, 60)[1], two.certify(x, 60)[1])
    assert np.array_equal(one.compute_loss(x, y), two.compute_loss(x, y))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda classifier: pickle.loads(pickle.dumps(classifier))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_equal_complete_and_independent(how, x, y, art_folder):
    classifier = trained(x, y)
    twin = COPIES[how](classifier)
    same(twin, classifier, x, y)
    state = twin.optimizer.state_dict()["state"]
    assert torch.equal(state[0]["exp_avg"], classifier.optimizer.state_dict()["state"][0]["exp_avg"])
    classifier.fit(x, y, nb_epochs=1, training_mode=False)
    rows = twin.predict(x)
    assert not np.array_equal(classifier.predict(x), rows)
    twin.fit(x, y, nb_epochs=1, training_mode=False)  # its optimiser steps its own weights, its noise went on alike
    assert not np.array_equal(twin.predict(x), rows)
    same(twin, classifier, x, y)
    assert not list(art_folder.iterdir())


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_before_the_first_batch(how, x):
    classifier = SmoothedClassifier(cnn(), 0.25)
    assert np.array_equal(COPIES[how](classifier).predict(x), classifier.predict(x))


def predict_elsewhere(connection):
    classifier, x = pickle.loads(connection.recv_bytes())
    connection.send(classifier.predict(x))


@pytest.mark.slow
def test_a_pickle_can_be_read_by_a_fresh_process(x, y):
    classifier = trained(x, y)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=predict_elsewhere, args=(there,))
    process.start()
    here.send_bytes(pickle.dumps((classifier, x)))
    assert here.poll(120)
    np.testing.assert_array_equal(here.recv(), classifier.predict(x))
    process.join()


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_clone_for_refitting_has_new_weights_and_the_same_settings(optimizer, x, y, art_folder):
    model = cnn(3)
    given = None if optimizer is None else optimizer(model.parameters(), lr=0.0123)
    classifier = SmoothedClassifier(model, optimizer=given, **SETTINGS)
    rows = classifier.predict(x)
    clone = classifier.clone_for_refitting()
    assert type(clone) is SmoothedClassifier
    for name in (*SETTINGS, "input_shape", "nb_classes"):
        assert clone.get_params()[name] == classifier.get_params()[name]
    assert not np.array_equal(clone.predict(x), rows)
    assert np.array_equal(classifier.predict(x), rows)
    assert not list(art_folder.iterdir())
    if optimizer is None:
        assert clone.optimizer is None
        return
    assert type(clone.optimizer) is optimizer
    assert clone.optimizer.defaults == given.defaults
    assert not clone.optimizer.state
    before = clone.predict(x)
    clone.fit(x, y, nb_epochs=1)
    assert not np.array_equal(clone.predict(x), before)
    assert np.array_equal(classifier.predict(x), rows)


@pytest.mark.parametrize("clip_values", [None, (0, 1)])
def test_save_and_load_give_the_same_classifier_and_go_on_training_alike(clip_values, x, y, tmp_path):
    classifier = trained(x, y)
    classifier.set_params(clip_values=clip_values)
    classifier.save("model", str(tmp_path / "new" / "folder"))
    model = cnn()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    loaded = SmoothedClassifier.load("model", str(tmp_path / "new" / "folder"), model=model, optimizer=optimizer)
    assert loaded.base_model is model
    np.testing.assert_array_equal(loaded.clip_values, classifier.clip_values)
    loaded.set_params(clip_values=None), classifier.set_params(clip_values=None)
    same(loaded, classifier, x, y)
    assert loaded.optimizer.param_groups[0]["lr"] == 0.01
    steps = [o.state_dict()["state"][0]["exp_avg"] for o in (loaded.optimizer, classifier.optimizer)]
    assert torch.equal(*steps)


def test_a_loaded_classifier_goes_on_with_new_noise(y, tmp_path):
    def classifier():
        return trainable(Recorder(mlp()), seed=3)

    images = np.full((5, 7), 0.5, np.float32)

    def fit(classifier):
        (noise,) = noise_seen(classifier, lambda: classifier.fit(images, y, nb_epochs=1))
        return noise

    one = classifier()
    first = fit(one)
    one.save("model", str(tmp_path))
    again = classifier()
    loaded = SmoothedClassifier.load("model", str(tmp_path), model=again.base_model, optimizer=again.optimizer)
    second = fit(one)
    assert not torch.equal(first, second)
    assert torch.equal(fit(loaded), second)


def test_a_file_without_the_number_of_fits_is_of_a_classifier_without_any(x, y, tmp_path):
    trained(x, y).save("new", str(tmp_path))
    settings = read_settings(tmp_path / "new")
    assert settings.pop("fits") == 1
    save_classifier(tmp_path / "old", cnn(3), settings, None)
    loaded = SmoothedClassifier.load("old", str(tmp_path), model=cnn())
    assert (loaded.sigma, loaded._fits) == (0.5, 0)


def test_what_is_saved_is_two_files_of_which_none_is_a_pickle_of_code(x, y, tmp_path):
    trained(x, y).save("model", str(tmp_path / "here"))
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["model.optimizer.pt", "model.safetensors"]
    torch.load(tmp_path / "here" / "model.optimizer.pt", weights_only=True)
    SmoothedClassifier(cnn(), 0.25).save("bare", str(tmp_path / "here"))
    assert not (tmp_path / "here" / "bare.optimizer.pt").exists()


def test_without_a_folder_a_model_is_saved_where_art_saves_it(art_folder, x):
    classifier = SmoothedClassifier(cnn(3), 0.25)
    classifier.save("model")
    assert [path.name for path in art_folder.iterdir()] == ["model.safetensors"]
    assert np.array_equal(SmoothedClassifier.load("model", model=cnn()).predict(x), classifier.predict(x))


def test_tied_weights_survive(tmp_path, x):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(72, 72), nn.Linear(72, 72)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x.flatten(1)).tanh())[:, :CLASSES]

    classifier = SmoothedClassifier(seeded(Tied), 0.25)
    classifier.save("tied", str(tmp_path))
    loaded = SmoothedClassifier.load("tied", str(tmp_path), model=seeded(Tied, 1))
    assert np.array_equal(loaded.predict(x), classifier.predict(x))


class Laplace(GaussianNoise):
    name = "laplace"


def test_files_that_do_not_fit_are_refused(tmp_path, x, y):
    folder = str(tmp_path)
    SmoothedClassifier(cnn(), 0.25).save("model", folder)
    with pytest.raises(InputError, match=r"filename: expected a saved classifier, but .* does not exist; path= names"):
        SmoothedClassifier.load("other", folder, model=cnn())
    with pytest.raises(ModelError, match="model: expected the architecture that was saved"):
        SmoothedClassifier.load("model", folder, model=mlp())
    lookalike = cnn()
    lookalike[2] = nn.ReLU()
    with pytest.raises(ModelError, match="its weights fit, but it is not the architecture that was saved"):
        SmoothedClassifier.load("model", folder, model=lookalike)
    with pytest.raises(InputError, match="family: expected the noise family 'gaussian' that was saved, got 'laplace'"):
        SmoothedClassifier.load("model", folder, model=cnn(), family=Laplace)
    model = cnn()
    with pytest.raises(InputError, match=r"filename: expected the optimiser's state in .* does not exist"):
        SmoothedClassifier.load("model", folder, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    (tmp_path / "junk.safetensors").write_bytes(b"no such thing" * 9)
    with pytest.raises(InputError, match=r"filename: expected a safetensors file, but .* is none"):
        SmoothedClassifier.load("junk", folder, model=cnn())
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(tmp_path / "foreign.safetensors"))
    with pytest.raises(InputError, match="expected a file of format 'rs-plugins smoothed classifier 1', got None"):
        SmoothedClassifier.load("foreign", folder, model=cnn())


def test_a_family_of_ones_own_is_saved_by_name(tmp_path, x):
    classifier = SmoothedClassifier(cnn(), 0.25, family=Laplace)
    assert classifier.family is Laplace
    classifier.save("model", str(tmp_path))
    loaded = SmoothedClassifier.load("model", str(tmp_path), model=cnn(), family=Laplace)
    assert next(loaded.certificates(x, 20)).made_with.family == "laplace"
    assert loaded.input_shape == SHAPE


def test_the_ending_may_be_given(tmp_path):
    classifier = SmoothedClassifier(cnn(), 0.25, input_shape=SHAPE)
    classifier.save("m.safetensors", path=str(tmp_path))
    assert (tmp_path / "m.safetensors").is_file()
    for name in ("m", "m.safetensors"):
        assert SmoothedClassifier.load(name, path=str(tmp_path), model=cnn()).sigma == 0.25
