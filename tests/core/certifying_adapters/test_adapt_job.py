import copy
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.certifying_adapters.job import adapt_data_set, default_held_out, default_recipe
from rs_plugins.core.data_sets.data_set import in_memory, split_off
from rs_plugins.core.identity import identity
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training.folder import HISTORY
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.methods import METHODS, takes_noise
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.trained import load_trained
from rs_plugins.core.training.validation import noisy_accuracy
from rs_plugins.errors import InputError, ModelError, ResultsError, RSPluginsWarning

pytestmark = pytest.mark.filterwarnings(
    r"ignore:sigma .* with the certifying adapter:rs_plugins.errors.RSPluginsWarning"
)

FEATURE = AdapterDesign(kind="feature", hidden=5, combine="add")
SHORT = default_recipe(0.25, 2).changed(batch_size=8, lr=0.05)


def squares(n=40, seed=0, side=4):
    """Images that are all different, of four classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 1, side, side), dtype=np.uint8)
    return in_memory("squares", pixels, np.arange(n) % 4, classes=4)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def run(folder, model=None, data=None, sigma=0.25, **options):
    options = {"design": FEATURE, "recipe": SHORT, **options}
    model = network() if model is None else model
    return adapt_data_set(model, squares() if data is None else data, sigma, folder, **options)


def record(folder):
    return json.loads((folder / "model.json").read_text())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_folder_has_the_given_extractor_to_the_last_bit_and_what_was_trained(tmp_path):
    model = network()
    before = copy.deepcopy(model.state_dict())
    found = run(tmp_path / "run", model)
    assert same(model.state_dict(), before)
    stored = load_file(tmp_path / "run" / "model.safetensors")
    assert same(stored, found.model.state_dict())
    extractor = {key.removeprefix("extractor."): value for key, value in stored.items() if "extractor." in key}
    assert same(extractor, {key: value for key, value in before.items() if not key.startswith("4.")})
    fresh = adapt(model, (1, 4, 4), FEATURE, seed=0).state_dict()
    assert {key for key, value in fresh.items() if not torch.equal(value, stored[key])} == {
        *("adapter.first.weight", "adapter.first.bias", "adapter.last.weight", "adapter.last.bias"),
        *("head.weight", "head.bias"),
    }
    assert not any(part.training for part in found.model.modules())
    assert [epoch.epoch for epoch in found.history] == [1, 2]


def test_the_folder_is_a_model_without_anything_else(tmp_path):
    known = {"name": "lenet", "classes": 4, "mean": [0.3], "std": [0.4], "seed": 1}
    design = AdapterDesign(kind="feature", hidden=5, combine="gated", head="frozen")
    recipe = SHORT.changed(epochs=1)
    data = squares(12, side=28)
    found = run(tmp_path / "run", make_network(**known), data, design=design, recipe=recipe, network=known, seed=4)
    trained = load_trained(tmp_path / "run")
    assert same(trained.model.state_dict(), found.model.state_dict())
    assert (trained.sigma, trained.record["network"], trained.record["architecture"]) == (0.25, known, "lenet")
    assert trained.record["adapter"] == {**design.plain(), "shape": [1, 28, 28], "seed": 4}
    assert trained.record["extractor"] == found.model.extractor_fingerprint()
    x = data.read(range(5))
    assert torch.equal(trained.model(x), found.model(x))
    checkpoint = load_trained(tmp_path / "run" / "checkpoints" / "epoch-0001")
    assert same(checkpoint.model.state_dict(), found.model.state_dict())


def test_a_network_without_a_name_is_passed(tmp_path):
    found = run(tmp_path / "run")
    assert (record(tmp_path / "run")["network"], record(tmp_path / "run")["architecture"]) == (None, "given")
    again = load_trained(tmp_path / "run", model=adapt(network(), (1, 4, 4), FEATURE, seed=7))
    assert same(again.model.state_dict(), found.model.state_dict())
    other = network(7)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError, match=r"extractor\.1\.bias: expected the same as in the model"):
        load_trained(tmp_path / "run", model=adapt(other, (1, 4, 4), FEATURE))
    assert same(other.state_dict(), before)


@pytest.mark.parametrize("place", ["best", "checkpoints"])
def test_a_file_of_another_extractor_does_not_change_the_network_when_gone_on_with(tmp_path, place):
    model = network()
    run(tmp_path / "run", model)
    before = copy.deepcopy(model.state_dict())
    for file in (tmp_path / "run" / place).glob("*/model.safetensors"):
        state = load_file(file)
        save_file({**state, "extractor.2.running_mean": state["extractor.2.running_mean"] + 1}, file)
    with pytest.raises(InputError, match=r"extractor\.2\.running_mean: expected the same as in the model, where extra"):
        run(tmp_path / "run", model, resume=True)
    assert same(model.state_dict(), before)


def test_frozen_layers_of_an_ordinary_network_are_gone_on_with(tmp_path):
    def partly_frozen(seed):
        model = network(seed)
        model[1].requires_grad_(False)
        return model

    arguments = (squares(), SHORT.changed(epochs=1), tmp_path / "run")
    train_data_set(partly_frozen(0), *arguments)
    again = partly_frozen(1)
    train_data_set(again, *arguments, resume=True)
    assert torch.equal(again[1].weight, network(0)[1].weight)


def test_one_extractor_serves_several_sigmas(tmp_path):
    model = network()
    found = [run(tmp_path / str(sigma), model, sigma=sigma).model for sigma in (0.25, 0.5)]
    for one in found:
        assert one.extractor[1].weight.data_ptr() == model[1].weight.data_ptr()
    assert found[0].extractor_fingerprint() == found[1].extractor_fingerprint()
    assert [record(tmp_path / name)["sigma"] for name in ("0.25", "0.5")] == [0.25, 0.5]
    assert "sigma=0.5" in record(tmp_path / "0.5")["objective"]  # the recipe said 0.25
    assert not torch.equal(found[0].head.weight, found[1].head.weight)


@pytest.mark.parametrize(("images", "count"), [(1, 0), (9, 0), (24, 2), (999, 99), (1500, 100), (50_000, 1000)])
def test_how_many_are_held_out(images, count):
    assert default_held_out(images) == count
    assert default_held_out(10**6) == 2000


@pytest.mark.parametrize(("asked", "count"), [(None, 4), (7, 7)])
def test_images_that_are_held_out_are_not_trained_on(tmp_path, asked, count):
    data, read = squares(), []
    watched = in_memory("squares", (data.read(range(40)) * 255).byte().numpy(), data.labels, classes=4)
    original = watched.read
    object.__setattr__(watched, "read", lambda rows: read.append(list(rows)) or original(rows))
    run(tmp_path / "run", data=watched, held_out=asked, recipe=SHORT.changed(epochs=1))
    held = [place * 40 // count for place in range(count)]
    assert held in read  # to choose by
    steps = [rows for rows in read if len(rows) > 1 and rows != held]
    assert sorted(itertools.chain.from_iterable(steps)) == sorted(set(range(40)) - set(held))
    assert record(tmp_path / "run")["validation"]["images"] == count


def test_the_epoch_is_that_which_is_best_on_those_held_out(tmp_path):
    found = run(tmp_path / "run", held_out=17, recipe=SHORT.changed(epochs=6, lr=0.3))
    accuracies = [epoch.noisy_accuracy for epoch in found.history]
    best = len(accuracies) - accuracies[::-1].index(max(accuracies))
    assert best < 6, "this test needs an epoch before the last one to be the best"
    assert record(tmp_path / "run")["chosen_epoch"] == best == found.kept.epoch
    _, held = split_off(squares(), 17)
    assert found.bare_noisy_accuracy == noisy_accuracy(network(), held, GaussianNoise(0.25), 0)
    shorter = run(tmp_path / "last", held_out=0)
    assert "chosen_epoch" not in record(tmp_path / "last")
    assert [epoch.noisy_accuracy for epoch in shorter.history] == [None, None]
    assert (shorter.kept, shorter.bare_noisy_accuracy) == (shorter.history[1], None)
    assert run(tmp_path / "none", recipe=SHORT.changed(epochs=0)).kept is None


def test_a_certifying_adapter_that_is_no_better_than_none_is_told(tmp_path):
    better = re.escape("of the images held out are right under noise, without it")
    with pytest.warns(RSPluginsWarning, match=rf"sigma 0.25: with the certifying adapter \d+\.\d% {better} \d+\.\d%"):
        run(tmp_path / "run", recipe=SHORT.changed(lr=1e-9))


@pytest.mark.parametrize("kind", ["feature", "image"])
def test_stopped_and_gone_on_with_it_is_the_same(tmp_path, kind):
    design = AdapterDesign(kind="image", size="tiny") if kind == "image" else AdapterDesign(kind=kind)

    def stop(_epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", design=design, after_epoch=stop)
    with pytest.raises(ResultsError, match="it holds checkpoints; to go on use resume"):
        run(tmp_path / "run", design=design)
    found = run(tmp_path / "run", design=design, resume=True)
    whole = run(tmp_path / "whole", design=design)
    assert same(found.model.state_dict(), whole.model.state_dict())
    assert len((tmp_path / "run" / HISTORY).read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": network(1)}, r"begun by another run \(extractor: '\w{64}' -> '\w{64}'; extr"),
        ({"design": AdapterDesign(kind="feature", hidden=5, head="fresh")}, r"begun by another run \(adapter: "),
        ({"seed": 1}, "begun by another run .*seed: 0 -> 1"),
        ({"held_out": 3}, "begun by another run .*digest"),
        ({"sigma": 0.5}, r"begun by another run \(sigma: 0.25 -> 0.5; "),
    ],
    ids=["extractor", "design", "seed", "held out", "sigma"],
)
def test_another_run_is_not_gone_on_with(tmp_path, change, message):
    run(tmp_path / "run")
    with pytest.raises(ResultsError, match=message):
        run(tmp_path / "run", resume=True, **change)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)))


def test_other_code_of_the_same_weights_is_not_gone_on_with(tmp_path, monkeypatch):
    run(tmp_path / "run", Scaled())
    run(tmp_path / "run", Scaled(), resume=True)
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.last(self.first(2 * x.flatten(1))))
    with pytest.raises(ResultsError, match=r"begun by another run \(extractor_code: '\w{64}' -> '\w{64}'\); choose"):
        run(tmp_path / "run", Scaled(), resume=True)


CODE = """
from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.identity import identity
print(identity(adapt(make_network("resnet20"), (3, 8, 8), AdapterDesign(kind="feature")).extractor))
"""


def test_the_code_is_known_in_another_process():
    design = AdapterDesign(kind="feature")
    here = identity(adapt(make_network("resnet20"), (3, 8, 8), design).extractor)
    command = [sys.executable, "-c", CODE]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=environment)
    assert found.stdout.strip() == here


class Restless(nn.Module):
    """Changes in eval mode, but not on the few images on which a model is tried."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.linear = nn.Linear(16, 4)

    def forward(self, x):
        if len(x) > 2:
            self.seen += len(x)
        return self.linear(x.flatten(1))


def test_an_extractor_that_changes_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"the extractor is not what it was before training, so .*run is of no use"):
        run(tmp_path / "run", Restless())


@pytest.mark.parametrize("method", list(filter(takes_noise, METHODS)))
def test_any_method_trains_it(tmp_path, method):
    recipe = Recipe(method=method, sigma=0.25, epochs=1, batch_size=8, lr=0.05, weight_decay=0.0)
    found = run(tmp_path / "run", recipe=recipe)
    stored = record(tmp_path / "run")
    assert (stored["method"], stored["algorithm"]) == (method, "sgd")
    fresh = adapt(network(), (1, 4, 4), FEATURE)
    assert not torch.equal(fresh.adapter.last.weight, found.model.adapter.last.weight)


def test_a_method_without_noise_is_not_for_it(tmp_path):
    with pytest.raises(InputError, match=r"^sigma: 'gls' trains without noise on the images, expected None, got 0.25$"):
        run(tmp_path / "run", recipe=Recipe(method="gls", options={"eps": 0.1}))
    assert not (tmp_path / "run").exists()


def test_the_default_recipe():
    recipe = default_recipe(0.5)
    assert (recipe.method, recipe.sigma, recipe.batch_size, recipe.augment) == ("gaussian", 0.5, 64, False)
    assert (recipe.algorithm, recipe.lr, recipe.schedule, recipe.weight_decay) == ("sgd", 0.02, "cosine", 5e-4)
    token = default_recipe(0.5, kind="token")
    assert (token.algorithm, token.lr, token.schedule, token.weight_decay) == ("adam", 1e-3, "cosine", 0)
    assert default_recipe(0.5, 7) == recipe.changed(epochs=7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0}, "sigma: expected a finite number > 0, got 0"),
        ({"sigma": 0, "recipe": None}, "sigma: expected a finite number > 0, got 0"),
        ({"held_out": 40}, "held_out: expected fewer images than squares has, 40, got 40"),
        ({"held_out": -1}, "held_out: expected an integer >= 0, got -1"),
        ({"seed": 0.5}, "seed: expected an integer"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh())}, "model: expected a torch.nn.Linear"),
        ({"network": {"classes": 4}}, "network: expected name, a text"),
    ],
    ids=str,
)
def test_mistakes_leave_no_folder(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()
