"""A run that ends with the best epoch ends with it wherever it was killed, and nothing else counts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory, split_off
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training import best as best_module
from rs_plugins.core.training.best import BestNetworks, best_of
from rs_plugins.core.training.folder import Epoch, TrainingFolder, checkpoints_in
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.trained import load_trained
from rs_plugins.core.training.validation import noisy_accuracy
from rs_plugins.errors import InputError, ResultsError

SOURCE = np.random.default_rng(0)
IMAGES = SOURCE.random((30, 1, 4, 4)).astype("float32")
DATA, HELD = split_off(in_memory("made up", IMAGES, (IMAGES.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64)), 10)
STEPS, EPOCHS = 2, 4
RECIPE = Recipe(method="gaussian", sigma=0.25, epochs=EPOCHS, batch_size=10, lr=0.1)
SCORES = (0.5, 0.7, 0.65, 0.6, 0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))


def train(folder, recipe=RECIPE, data=DATA, keep_best=True, validation=HELD, **options):
    model = network()
    history = train_data_set(*(model, data, recipe, folder), keep_best=keep_best, validation=validation, **options)
    return model.state_dict(), history


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def names(folder):
    return sorted(place.name for place in folder.joinpath("best").iterdir())


def record(folder):
    return json.loads((folder / "model.json").read_text())


def crash(*_, **__):
    raise MemoryError


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def disturbed(at, what):
    """Return the images, on whose ``at``-th reading ``what`` is called."""
    count = 0

    def read(positions):
        nonlocal count
        count += 1
        if count == at:
            what()
        return DATA.read(positions)

    return replace(DATA, read=read)


def scored(monkeypatch, scores=SCORES):
    """Let the epochs have these accuracies: batch normalisation counts the steps."""
    monkeypatch.setattr(
        "rs_plugins.core.training.validation.noisy_accuracy",
        lambda model, *_: scores[int(model[1].num_batches_tracked) // STEPS - 1],
    )


@pytest.fixture
def scores(monkeypatch):
    scored(monkeypatch)


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """The weights after each epoch, from 1."""
    folder = tmp_path_factory.mktemp("epochs") / "run"
    train(folder, replace(RECIPE, epochs=5), keep_best=False, keep=9)
    return [None, *(load_file(place / "model.safetensors") for place in checkpoints_in(folder))]


def right(folder, weights, expected, epoch=2, accuracy=0.7, trained=EPOCHS):
    """Whether the model in memory and the folder hold the chosen epoch and say so."""
    stored = load_trained(folder, model=network())
    assert equal(weights, expected[epoch])
    assert equal(stored.model.state_dict(), expected[epoch])
    found = [stored.record[name] for name in ("chosen_epoch", "chosen_noisy_accuracy", "trained_epochs")]
    assert found == [epoch, accuracy, trained]
    return True


# ---- what is chosen ------------------------------------------------------------------------------------------------


def test_the_latest_of_the_best_epochs():
    history = [Epoch(number, 0.0, accuracy, 0.1, 1.0) for number, accuracy in enumerate((0.5, 0.7, 0.7, 0.6), 1)]
    assert best_of(history) is history[2]
    assert best_of([Epoch(1, 0.0, 0.0, 0.1, 1.0), Epoch(2, 0.0, 0.0, 0.1, 1.0)]).epoch == 2
    assert best_of([]) is None


@pytest.mark.usefixtures("scores")
def test_the_network_is_that_of_the_best_epoch(tmp_path, epochs):
    weights, history = train(tmp_path / "run")
    assert right(tmp_path / "run", weights, epochs)
    assert [epoch.noisy_accuracy for epoch in history] == list(SCORES[:4])
    assert names(tmp_path / "run") == ["epoch-0002"]
    assert [place.name for place in checkpoints_in(tmp_path / "run")] == ["epoch-0003", "epoch-0004"]
    assert equal(load_file(checkpoints_in(tmp_path / "run")[-1] / "model.safetensors"), epochs[4])
    kept = load_trained(tmp_path / "run" / "best" / "epoch-0002", model=network())
    assert equal(kept.model.state_dict(), epochs[2])
    assert kept.record["trained_epochs"] == 2


@pytest.mark.usefixtures("scores")
def test_without_it_the_network_is_the_last(tmp_path, epochs):
    weights, _ = train(tmp_path / "run", keep_best=False)
    assert equal(weights, epochs[4])
    assert equal(load_file(tmp_path / "run" / "model.safetensors"), epochs[4])
    assert "chosen_epoch" not in record(tmp_path / "run")
    assert not (tmp_path / "run" / "best").exists()


def test_the_accuracy_is_that_of_the_network_in_the_end(tmp_path):
    recipe = replace(RECIPE, lr=1.0, epochs=6)
    _, history = train(tmp_path / "run", recipe, seed=4)
    found = record(tmp_path / "run")
    model = load_trained(tmp_path / "run", model=network()).model
    assert noisy_accuracy(model, HELD, GaussianNoise(0.25), 4) == found["chosen_noisy_accuracy"]
    accuracies = [epoch.noisy_accuracy for epoch in history]
    assert found["chosen_epoch"] == len(accuracies) - accuracies[::-1].index(max(accuracies)) != 6
    assert found["validation"] == HELD.identity


# ---- killed and gone on with -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(("what", "error", "keep"), [(crash, MemoryError, 1), (interrupt, KeyboardInterrupt, 2)])
def test_stopped_at_any_step(tmp_path, epochs, what, error, keep):
    for step in range(STEPS * EPOCHS):
        folder = tmp_path / f"{step}"
        with pytest.raises(error):
            train(folder, data=disturbed(step + 2, what), keep=keep)  # the first reading is that of the probe
        assert not (folder / "model.safetensors").exists()
        weights, history = train(folder, keep=keep, resume=True)
        assert right(folder, weights, epochs)
        assert len(history) == EPOCHS
        assert names(folder) == ["epoch-0002"]


def killed_at(monkeypatch, owner, name, call, *, after=False):
    """Let the ``call``-th call of a method end all, before or after it has done its work."""
    true, count = getattr(owner, name), 0

    def method(*arguments, **options):
        nonlocal count
        count += 1
        if count == call and not after:
            raise MemoryError
        result = true(*arguments, **options)
        if count == call:
            raise MemoryError
        return result

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (TrainingFolder, "keep"),  # the best is there, its checkpoint is not
        (BestNetworks, "keep"),
        (BestNetworks, "forget"),
        (best_module, "save_trained"),  # in the draft
    ],
    ids=["checkpoint", "best", "forget", "draft"],
)
def test_killed_between_what_is_written(tmp_path, monkeypatch, epochs, owner, name, call, after):
    scored(monkeypatch)
    folder = tmp_path / "run"
    with monkeypatch.context() as killing:
        killed_at(killing, owner, name, call, after=after)
        if owner is best_module and call > 2:  # only two epochs are better than those before
            train(folder)
            return
        with pytest.raises(MemoryError):
            train(folder)
    begun = bool(checkpoints_in(folder))
    assert begun or call == 1
    weights, _ = train(folder, resume=begun)
    assert right(folder, weights, epochs)
    assert names(folder) == ["epoch-0002"]


@pytest.mark.usefixtures("scores")
def test_killed_when_the_network_is_stored_in_the_end(tmp_path, monkeypatch, epochs):
    for name in ("put_into", "finish"):
        folder = tmp_path / name
        with monkeypatch.context() as killing:
            killing.setattr(BestNetworks if name == "put_into" else TrainingFolder, name, crash)
            with pytest.raises(MemoryError):
                train(folder)
        assert right(folder, train(folder, resume=True)[0], epochs)


def test_an_epoch_done_again_may_be_worse(tmp_path, monkeypatch, epochs):
    """As on hardware that does not compute the same twice: the best of before is not written over."""
    folder = tmp_path / "run"
    with monkeypatch.context() as first:
        scored(first, (0.5, 0.7, 0.8, 0.6))
        killed_at(first, TrainingFolder, "keep", 3)
        with pytest.raises(MemoryError):
            train(folder, keep=1)
    assert names(folder) == ["epoch-0002", "epoch-0003"]
    scored(monkeypatch)
    assert right(folder, train(folder, resume=True, keep=1)[0], epochs)
    assert names(folder) == ["epoch-0002"]


def test_going_on_from_an_earlier_checkpoint(tmp_path, monkeypatch, epochs):
    """Each checkpoint has its best network, for whoever removes a later one."""
    scored(monkeypatch, (0.5, 0.4, 0.8, 0.9))
    folder = tmp_path / "run"
    train(folder, replace(RECIPE, epochs=3))
    assert names(folder) == ["epoch-0001", "epoch-0003"]
    shutil.rmtree(checkpoints_in(folder)[-1])
    scored(monkeypatch, (0.5, 0.4, 0.3, 0.2))
    assert right(folder, train(folder, resume=True)[0], epochs, epoch=1, accuracy=0.5)


@pytest.mark.usefixtures("scores")
def test_a_run_that_ended_is_made_longer(tmp_path, epochs):
    folder = tmp_path / "run"
    assert right(folder, train(folder, replace(RECIPE, epochs=1))[0], epochs, 1, 0.5, trained=1)
    assert right(folder, train(folder, resume=True)[0], epochs)
    assert right(folder, train(folder, resume=True)[0], epochs)  # nothing is left to do
    longer = replace(RECIPE, epochs=5)
    weights, _ = train(folder, longer, resume=True)
    assert right(folder, weights, epochs, epoch=5, accuracy=0.9, trained=5)
    assert names(folder) == ["epoch-0002", "epoch-0005"]  # epoch-0004 is a checkpoint, too


@pytest.mark.usefixtures("scores")
def test_what_has_another_name_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    for name in ("mine", "epoch-2", "epoch-0001 copy"):
        (folder / "best" / name).mkdir(parents=True)
    for name in ("epoch-0007", ".epoch-0001"):
        (folder / "best" / name).mkdir()
    train(folder)
    assert names(folder) == ["epoch-0001 copy", "epoch-0002", "epoch-2", "mine"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def damage(name):
    def cut(place):
        whole = (place / name).read_bytes()
        (place / name).write_bytes(whole[: len(whole) // 2])

    return cut


def of_another_epoch(place):
    found = json.loads((place / "model.json").read_text())
    (place / "model.json").write_text(json.dumps({**found, "trained_epochs": 3}))


@pytest.mark.usefixtures("scores")
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (shutil.rmtree, r"model: expected a folder with model\.json and .*epoch-0002 \(No such file or directory\)"),
        (damage("model.json"), r"model: .*model\.json is damaged"),
        (damage("model.safetensors"), r"weights: .*expected a safetensors file, got a damaged one \(.*\)"),
        (of_another_epoch, r"model: .*epoch-0002 is of epoch 3"),
    ],
    ids=["missing", "record", "weights", "epoch"],
)
def test_the_best_network_is_lost(tmp_path, epochs, harm, reason):
    advice = "remove the checkpoints from that epoch on to go on with the one before, or choose another folder"
    message = rf"^keep_best: the network of epoch 2, the best so far, is missing or damaged \({reason}\); {advice}$"
    folder = tmp_path / "run"
    train(folder, replace(RECIPE, epochs=2))
    harm(folder / "best" / "epoch-0002")
    steps = []
    with pytest.raises(InputError, match=message):
        train(folder, resume=True, after_epoch=steps.append)
    assert not steps  # it says so before the work
    shutil.rmtree(checkpoints_in(folder)[-1])
    assert right(folder, train(folder, resume=True)[0], epochs)

    def meanwhile(epoch):
        if epoch.epoch == 3:
            harm(tmp_path / "late" / "best" / "epoch-0002")

    with pytest.raises(InputError, match=message):
        train(tmp_path / "late", after_epoch=meanwhile)
    assert not (tmp_path / "late" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": None}, "keep_best: expected validation images to choose an epoch by, got none"),
        ({"keep_best": 1}, "keep_best: expected True or False, got 1"),
        (
            {"recipe": replace(RECIPE, epochs=0)},
            "keep_best: expected a recipe of at least 1 epoch to choose one, got 0",
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        train(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("scores")
def test_it_is_part_of_what_a_run_is(tmp_path):
    train(tmp_path / "best")
    train(tmp_path / "last", keep_best=False)
    with pytest.raises(ResultsError, match=r"begun by another run \(keep_best: True -> False; validation: {.* -> None"):
        train(tmp_path / "best", keep_best=False, resume=True)
    with pytest.raises(ResultsError, match=r"begun by another run \(keep_best: False -> True; validation: None -> {"):
        train(tmp_path / "last", resume=True)
    with pytest.raises(ResultsError, match=r"begun by another run \(validation: {.*1\d held out.* -> {.*all but"):
        train(tmp_path / "best", validation=DATA, resume=True)
    train(tmp_path / "last", keep_best=False, validation=DATA, resume=True)  # there they decide nothing


@pytest.mark.usefixtures("scores")
def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    train(tmp_path / "run", keep_best=False)
    place = tmp_path / "run" / "settings.json"
    settings = json.loads(place.read_text())
    assert settings.pop("keep_best") is False
    place.write_text(json.dumps(settings))
    with pytest.raises(ResultsError, match=r"\(keep_best: False -> True; validation"):
        train(tmp_path / "run", resume=True)
    assert len(train(tmp_path / "run", replace(RECIPE, epochs=5), keep_best=False, resume=True)[1]) == 5


# ---- several processes -----------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import numpy as np
import torch
from torch import nn
from rs_plugins.core.data_sets.data_set import in_memory, split_off
from rs_plugins.core.models import digest
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe

out, resume = sys.argv[1], sys.argv[2:] == ["--resume"]
torch.set_num_threads(1)
images = np.random.default_rng(0).random((60, 1, 4, 4)).astype("float32")
data, held = split_off(in_memory("made up", images, (images.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64)), 25)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
recipe = Recipe(method="gaussian", sigma=0.25, epochs=8 if resume else 5, batch_size=10, lr=0.05, algorithm="adam")
train_data_set(model, data, recipe, out, validation=held, keep_best=True, resume=resume)
print("holds", digest(model))
"""


@pytest.mark.slow
def test_all_of_several_processes_end_with_the_best(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for more in ([], ["--resume"]):
        held = {}
        for name, launcher in (("one", [sys.executable]), ("two", together)):
            command = [*launcher, str(script), str(tmp_path / name), *more]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stderr
            held[name] = re.findall("holds (.*)", done.stdout)
        assert (len(held["one"]), len(held["two"]), len(set(held["two"]))) == (1, 2, 1)
        one, two = record(tmp_path / "one"), record(tmp_path / "two")
        assert one["chosen_epoch"] == two["chosen_epoch"]
        assert one["chosen_noisy_accuracy"] == two["chosen_noisy_accuracy"]
        for key, value in load_file(tmp_path / "one" / "model.safetensors").items():
            other = load_file(tmp_path / "two" / "model.safetensors")[key]
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
