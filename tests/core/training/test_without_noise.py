"""Methods that train without noise on the images: how they are made, validated, stopped and gone on with."""

import itertools
import json
import os
import shutil
import signal
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.training import methods
from rs_plugins.core.training.best import best_of
from rs_plugins.core.training.folder import Epoch, checkpoints_in
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.losses import mean_cross_entropy
from rs_plugins.core.training.methods import make_objective, option_names, takes_noise
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.trained import load_trained
from rs_plugins.core.training.validation import figure_of, measured
from rs_plugins.errors import InputError, RSPluginsWarning

SOURCE = np.random.default_rng(0)
IMAGES = SOURCE.random((30, 1, 4, 4)).astype("float32")
DATA = in_memory("made up", IMAGES, (IMAGES.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64))
HELD = in_memory("held", 1 - IMAGES[:9], np.arange(9) % 2)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Cross-entropy on the images as they are.

    Args:
        ramp: Epochs.
    """

    ramp: int = 20

    def __call__(self, model, batch, draws):
        return mean_cross_entropy(model(batch.x).unsqueeze(1), batch.y)


@dataclass(frozen=True, kw_only=True)
class Sure(Plain):
    """Its own figure, and a state that decides the loss: a step's noise on the weights of the loss grows."""

    margin: float = 0.1
    state: dict = field(default_factory=lambda: {"scale": torch.ones(2)}, compare=False, repr=False)

    figure = "certified accuracy"

    def __call__(self, model, batch, draws):
        self.state["scale"] = self.state["scale"] * 1.1 + torch.rand(2, generator=draws.fresh("scale"))
        return super().__call__(model, batch, draws) * self.state["scale"].mean()

    def validate(self, model, x, y):
        assert not model.training
        assert not torch.is_grad_enabled()
        logits = model(x)
        return int((logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0] > self.margin).sum())

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state["scale"] = state["scale"]


@pytest.fixture(autouse=True)
def more_methods(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", {**methods.METHODS, "plain": Plain, "sure": Sure})


def recipe(method="sure", **changes):
    return Recipe(method=method, **{"epochs": 3, "batch_size": 10, "lr": 0.1} | changes)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2))


def train(folder, of=None, data=DATA, **options):
    model = network()
    history = train_data_set(model, data, recipe() if of is None else of, folder, **options)
    return model.state_dict(), history


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def disturbed(at, what):
    calls = itertools.count(1)

    def read(positions):
        if next(calls) == at:
            what()
        return DATA.read(positions)

    return replace(DATA, read=read)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise MemoryError


# ---- made by name --------------------------------------------------------------------------------------------------


def test_noise_is_for_those_that_take_it():
    assert (takes_noise("gaussian"), takes_noise("plain")) == (True, False)
    assert make_objective("plain", ramp=3) == Plain(ramp=3)
    assert make_objective("sure", None, margin=0.5) == Sure(margin=0.5)
    assert option_names("plain") == ["ramp"]
    with pytest.raises(InputError, match=r"^sigma: 'plain' trains without noise on the images, expected None, got 0.5"):
        make_objective("plain", 0.5, family=None)
    with pytest.raises(InputError, match=r"^sigma: 'gaussian' trains under noise, expected a finite number > 0, got N"):
        make_objective("gaussian")
    with pytest.raises(InputError, match=r"^family: 'plain' has no such option, expected one of ramp"):
        make_objective("plain", family=None)


def test_a_recipe_without_noise():
    found = recipe("plain", options=MappingProxyType({"ramp": 6}), epochs=12)
    assert found.sigma is None
    assert found.objective() == Plain(ramp=6)
    assert found.shortened(4).objective() == Plain(ramp=2)
    assert found.shortened(1).objective() == Plain(ramp=0)
    assert recipe("plain", epochs=40).shortened(20).options == {"ramp": 10}
    with pytest.raises(InputError, match=r"^sigma: 'plain' trains without noise"):
        replace(found, sigma=0.5)
    with pytest.raises(InputError, match=r"^sigma: 'gaussian' trains under noise"):
        Recipe(method="gaussian")


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_what_is_measured():
    assert [figure_of(one) for one in (Gaussian(0.5), Plain(), Sure(), lambda *_: 0)] == [
        *("noisy accuracy", "clean accuracy", "certified accuracy", "clean accuracy")
    ]
    model, x, y = network(), torch.from_numpy(HELD.read(range(9)).numpy()), torch.from_numpy(HELD.labels)
    logits = model(x).detach()
    right = logits.argmax(1) == y
    assert measured(Plain(), model, HELD, 0) == float(right.double().mean())
    apart = (logits[:, 0] - logits[:, 1]).abs()
    margin = float(apart[right].median())
    sure = float((right & (apart > margin)).double().mean())
    assert 0 < measured(Sure(margin=margin), model, HELD, 0) == sure < float(right.double().mean())
    assert model.training


def test_many_images_are_counted_in_parts():
    many = in_memory("many", SOURCE.random((600, 1, 4, 4)).astype("float32"), np.arange(600) % 2)
    model, sizes = network(), []
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    found = measured(Plain(), model, many, 0)
    assert sum(sizes) == 600 > max(sizes)
    assert found == float((model(many.read(range(600))).argmax(1) == torch.from_numpy(many.labels)).double().mean())


def test_an_epoch_as_plain_data():
    epoch = Epoch(2, 0.5, 0.25, 0.1, 1.5, "certified accuracy")
    found = {"epoch": 2, "loss": 0.5, "certified_accuracy": 0.25, "lr": 0.1, "seconds": 1.5}
    assert epoch.plain() == found
    assert Epoch.of(json.loads(json.dumps(found))) == epoch
    assert epoch.noisy_accuracy is None
    old = Epoch.of({"epoch": 2, "loss": 0.5, "noisy_accuracy": 0.25, "lr": 0.1, "seconds": 1.5})
    assert old == Epoch(2, 0.5, 0.25, 0.1, 1.5)
    assert old.noisy_accuracy == 0.25
    for wrong in ({**found, "another": 1}, {name: found[name] for name in found if name != "certified_accuracy"}):
        with pytest.raises(ValueError, match="unpack"):
            Epoch.of(wrong)


@pytest.mark.parametrize(("method", "figure"), [("sure", "certified accuracy"), ("plain", "clean accuracy")])
def test_a_run_tells_its_figure(tmp_path, method, figure, capsys):
    _, history = train(tmp_path / "run", recipe(method), validation=HELD, keep_best=True, progress=True)
    column = figure.replace(" ", "_")
    assert f"{column}=" in capsys.readouterr().err
    assert {epoch.figure for epoch in history} == {figure}
    lines = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert lines[0] == f"epoch,loss,{column},lr,seconds"
    assert [float(line.split(",")[2]) for line in lines[1:]] == [epoch.accuracy for epoch in history]
    found = load_trained(tmp_path / "run", model=network())
    assert found.sigma is None
    assert found.record["sigma"] is None
    best = best_of(history)
    assert (found.record["chosen_epoch"], found.record[f"chosen_{column}"]) == (best.epoch, best.accuracy)
    assert measured(recipe(method).objective(), found.model, HELD, 0) == best.accuracy


def test_a_folder_without_noise_names_a_function(tmp_path):
    train_data_set(network(), DATA, recipe(), tmp_path / "run", network={"name": "mine:net"})
    with pytest.raises(InputError, match=r"pass the network yourself, model=… \(--model mine:net --weights \S+\)$"):
        load_trained(tmp_path / "run")


# ---- a state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "error"), [(interrupt, KeyboardInterrupt), (crash, MemoryError)])
@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_run_with_a_state_goes_on_bit_for_bit(tmp_path, what, error, at):
    weights, history = train(tmp_path / "whole", validation=HELD)
    with pytest.raises(error):
        train(tmp_path / "run", data=disturbed(at, what), validation=HELD)
    found, again = train(tmp_path / "run", validation=HELD, resume=True)
    assert equal(found, weights)
    assert [replace(epoch, seconds=0.0) for epoch in again] == [replace(epoch, seconds=0.0) for epoch in history]


def test_a_state_that_is_lost_is_missed(tmp_path):
    train(tmp_path / "run")
    longer, place = recipe(epochs=4), checkpoints_in(tmp_path / "run")[-1]
    (place / "objective.safetensors").rename(tmp_path / "kept")
    with pytest.raises(
        InputError, match=rf"resume: the checkpoint .*{place.name} is damaged \(.*objective.safetensors"
    ):
        train(tmp_path / "run", longer, resume=True)
    shutil.rmtree(place)
    assert equal(train(tmp_path / "run", longer, resume=True)[0], train(tmp_path / "whole", longer)[0])
    train(tmp_path / "plain", recipe("plain"))
    assert not list((tmp_path / "plain").rglob("objective.safetensors"))


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    """Its epochs have a noisy accuracy, and that is how they are still written."""
    noisy = Recipe(method="gaussian", sigma=0.25, epochs=2, batch_size=10, lr=0.1)
    _, history = train(tmp_path / "run", noisy, validation=HELD)
    progress = json.loads((checkpoints_in(tmp_path / "run")[-1] / "progress.json").read_text())
    for epoch, written in zip(history, progress["history"], strict=True):
        assert list(written) == ["epoch", "loss", "noisy_accuracy", "lr", "seconds"]
        assert written["noisy_accuracy"] == epoch.noisy_accuracy
    _, again = train(tmp_path / "run", replace(noisy, epochs=3), validation=HELD, resume=True)
    assert again[:2] == history
    assert {epoch.figure for epoch in again} == {"noisy accuracy"}


def test_too_few_epochs_for_a_deferred_term_still_warn():
    with pytest.warns(RSPluginsWarning, match="deferred term"):
        Recipe(method="macer", sigma=0.5, epochs=90, options={"deferred": 30}).shortened(1)
