"""Certified training as a job: stopped and gone on with, its state kept, its figure measured."""

import itertools
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.relaxations.bounds import margins
from rs_plugins.core.training.folder import checkpoints_in
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.trained import load_trained
from rs_plugins.errors import InputError, ModelError, RSPluginsWarning

SOURCE = np.random.default_rng(0)
IMAGES = SOURCE.random((24, 1, 4, 4)).astype("float32")
DATA = in_memory("made up", IMAGES, (IMAGES.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64))
NETWORK = {"name": "cnn3", "classes": 2, "channels": 1, "size": 4, "width": 0.25, "mean": [0.5], "seed": 1}
GLS = {"eps": 0.02, "ramp": 2.0}
PGPE = {"gradient": "pgpe", "population": 4}


def recipe(**options):
    its = MappingProxyType({**GLS, **options})
    return Recipe(method="gls", options=its, epochs=3, batch_size=12, lr=0.1, gradient_clip=1.0, lr_warmup=1)


def normalised():
    """A network with batch normalisation, whose statistics are part of what goes on."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def train(folder, of, data=DATA, **options):
    model = normalised()
    history = train_data_set(model, data, of, folder, validation=DATA, **options)
    return model.state_dict(), [replace(epoch, seconds=0.0) for epoch in history]


def broken(at):
    calls = itertools.count(1)

    def read(positions):
        if next(calls) == at:
            raise MemoryError
        return DATA.read(positions)

    return replace(DATA, read=read)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "options",
    [
        {"bound": "ibp", "gradient": "plain"},
        {"bound": "crown-ibp", "sigma_w_end": 0.05, "decay": 1.0},
        {"bound": "crown", "draws": 4, "noise_mode": "fixed", "sigma_w": 0.02},
        {**PGPE, "bound": "ibp", "adapt": True, "lr_sd": 5.0},
    ],
    ids=["plain", "rgs", "crown", "pgpe"],
)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, options):
    weights, history = train(tmp_path / "whole", recipe(**options))
    assert not equal(weights, normalised().state_dict())
    with pytest.raises(MemoryError):
        train(tmp_path / "run", recipe(**options), broken(5))  # two readings are those of probes, and an epoch has two
    assert len(checkpoints_in(tmp_path / "run")) == 1
    found, again = train(tmp_path / "run", recipe(**options), resume=True)
    assert equal(found, weights)
    assert again == history
    assert {epoch.figure for epoch in history} == {"certified accuracy"}


def test_a_ramp_that_is_longer_than_the_training_is_told(tmp_path):
    message = r"ramp: it ends after 6 epochs, and there are 3, in which the radius gets to 0\.005 of 0\.02; take fewer"
    long = recipe(gradient="plain", ramp_start=2.0, ramp=4.0, ramp_shape="linear")
    with pytest.warns(RSPluginsWarning, match=message):
        train(tmp_path / "long", long)
    train(tmp_path / "none", replace(long, epochs=0))
    train(tmp_path / "just", recipe(gradient="plain", ramp_start=1.0, ramp=2.0))


def test_the_state_is_in_the_checkpoint(tmp_path):
    train(tmp_path / "run", recipe(**PGPE, bound="ibp", adapt=True, lr_sd=5.0))
    kept = load_file(checkpoints_in(tmp_path / "run")[-1] / "objective.safetensors")
    assert {tuple(value.shape) for value in kept.values()} >= {(3, 1, 3, 3), (2, 12)}
    assert all(bool((value > 0).all()) and float(value.std()) > 0 for value in kept.values() if value.ndim > 1)
    train(tmp_path / "other", recipe(gradient="plain"))
    assert not load_file(checkpoints_in(tmp_path / "other")[-1] / "objective.safetensors")


def test_the_certified_accuracy_is_that_of_the_network(tmp_path):
    model = make_network(**NETWORK)
    (*_, last) = train_data_set(model, DATA, recipe(bound="crown"), tmp_path / "run", network=NETWORK, validation=DATA)
    trained = load_trained(tmp_path / "run")
    assert trained.sigma is None
    x, y = DATA.read(range(24)), torch.from_numpy(DATA.labels)
    found = (margins(trained.model, x, y, 0.02, method="crown") > 1e-5).all(dim=1)
    assert last.accuracy == float(found.double().mean())


def test_the_radius_is_needed():
    with pytest.raises(InputError, match=r"^eps: 'gls' needs this option, got none$"):
        Recipe(method="gls")
    with pytest.raises(InputError, match=r"^bound: expected one of 'ibp', "):
        recipe(bound="zonotope")


@pytest.mark.parametrize("layer", [nn.LayerNorm(16), nn.Dropout(0.5)], ids=lambda layer: type(layer).__name__)
def test_what_bounds_do_not_go_through_is_refused_before_anything_is_written(tmp_path, layer):
    model = nn.Sequential(nn.Flatten(), layer, nn.Linear(16, 2)).eval()
    with pytest.raises(ModelError, match=rf"^model: 1 \({type(layer).__name__}\)"):
        train_data_set(model, DATA, recipe(), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not model.training
    assert not model[1].training
