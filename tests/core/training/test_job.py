"""A training run that is stopped, killed, damaged or goes on becomes what it would have been."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import threading
from types import MappingProxyType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.models import digest
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.training.draws import BlockDraws
from rs_plugins.core.training.folder import checkpoints_in
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.stopping import stop_noted
from rs_plugins.core.training.trained import load_trained
from rs_plugins.errors import DivergedError, InputError, ModelError, ResultsError

SOURCE = np.random.default_rng(0)
IMAGES = SOURCE.random((50, 1, 4, 4)).astype("float32")
LABELS = (IMAGES.mean(axis=(1, 2, 3)) > 0.5).astype(np.int64)
DATA = in_memory("made up", IMAGES, LABELS)
OTHER = in_memory("others", IMAGES[:13], 1 - LABELS[:13])
RECIPE = Recipe(method="gaussian", sigma=0.25, epochs=3, batch_size=20, lr=0.1, lr_step=2, parts=2, augment=True)
MIX = dataclasses.replace(
    RECIPE, method="smoothmix", options=MappingProxyType({"steps": 2, "samples": 2, "warmup": 3, "mix_step": 1})
)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def train(folder, recipe=RECIPE, data=DATA, **options):
    model = network()
    history = train_data_set(model, data, recipe, folder, **options)
    return model.state_dict(), history


def equal(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[key], other[key]) for key in one)


def without_time(history):
    return [dataclasses.replace(epoch, seconds=0.0) for epoch in history]


def disturbed(at, what, data=DATA):
    """Return ``data``, on whose ``at``-th reading ``what`` is called."""
    count = 0

    def read(positions):
        nonlocal count
        count += 1
        if count == at:
            what()
        return data.read(positions)

    return dataclasses.replace(data, read=read)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise MemoryError


# ---- what is written ---------------------------------------------------------------------------------------------


def test_the_folder_holds_the_network_its_record_and_a_history(tmp_path):
    weights, history = train(tmp_path / "run", validation=DATA, seed=4)
    trained = load_trained(tmp_path / "run", model=network())
    assert equal(trained.model.state_dict(), weights)
    assert not trained.model.training
    assert trained.sigma == 0.25
    expected = {"method": "gaussian", "seed": 4, "trained_epochs": 3, "data": "made up", "processes": 1, "lr": 0.1}
    assert expected.items() <= trained.record.items()
    assert trained.record["objective"].startswith("Gaussian(sigma=0.25, ")
    assert f"torch {torch.__version__}" in trained.record["versions"]
    assert not equal(weights, network().state_dict())
    assert [epoch.epoch for epoch in history] == [1, 2, 3]
    assert [epoch.lr for epoch in history] == [0.1, 0.1, pytest.approx(0.01)]
    assert all(epoch.seconds > 0 for epoch in history)
    lines = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,noisy_accuracy,lr,seconds"
    assert [float(line.split(",")[1]) for line in lines[1:]] == [epoch.loss for epoch in history]
    names = {path.name for path in (tmp_path / "run").rglob("*")}
    assert not {name for name in names if name.endswith((".pt", ".pkl", ".bin", ".part"))}


def test_the_noisy_accuracy_is_that_under_one_draw(tmp_path):
    weights, history = train(tmp_path / "run", validation=OTHER, seed=4)
    model = network()
    model.load_state_dict(weights)
    model.eval()
    x = torch.from_numpy(IMAGES[:13])
    e = BlockDraws(4, "validation").noise(GaussianNoise(0.25), x, 1)[:, 0]
    right = model(x + e).argmax(1) == torch.from_numpy(1 - LABELS[:13])
    assert history[-1].noisy_accuracy == pytest.approx(float(right.double().mean()))
    assert train(tmp_path / "other")[1][-1].noisy_accuracy is None
    assert equal(weights, train(tmp_path / "third", seed=4)[0])  # looking changes nothing


def test_the_latest_checkpoints_are_kept_and_each_is_a_network(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=4)
    train(tmp_path / "run", recipe, keep=3)
    names = [place.name for place in checkpoints_in(tmp_path / "run")]
    assert names == ["epoch-0002", "epoch-0003", "epoch-0004"]
    at_two = load_trained(checkpoints_in(tmp_path / "run")[0], model=network())
    assert at_two.record["trained_epochs"] == 2
    shorter, _ = train(tmp_path / "shorter", dataclasses.replace(RECIPE, epochs=2), keep=1)
    assert equal(at_two.model.state_dict(), shorter)
    assert len(checkpoints_in(tmp_path / "shorter")) == 1


def test_a_network_by_name_is_made_again(tmp_path):
    from rs_plugins.core.architectures.named import make_network

    data = in_memory("made up", SOURCE.random((4, 1, 28, 28)).astype("float32"), np.arange(4))
    description = {"name": "lenet", "classes": 4, "seed": 3}
    model = make_network(**description)
    train_data_set(model, data, dataclasses.replace(RECIPE, epochs=1), tmp_path / "run", network=description)
    assert equal(load_trained(tmp_path / "run").model.state_dict(), model.state_dict())


def test_progress_is_shown_on_request(tmp_path, capsys):
    train(tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    train(tmp_path / "run", progress=True, validation=DATA)
    shown = capsys.readouterr().err
    assert "gaussian: 100%" in shown
    assert "18/18" in shown
    assert "epoch=3, loss=" in shown
    assert "noisy_accuracy=" in shown


# ---- stopping and going on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "what", "at"),
    [(RECIPE, interrupt, 2), (RECIPE, terminate, 13), (MIX, interrupt, 7), (MIX, terminate, 15)],
    ids=["gaussian early", "gaussian between epochs", "smoothmix", "smoothmix late"],
)
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, recipe, what, at):
    weights, history = train(tmp_path / "whole", recipe, extra=OTHER, extra_weight=0.5, validation=OTHER)
    how = {"extra": OTHER, "extra_weight": 0.5, "validation": OTHER}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", recipe, disturbed(at, what), **how)
    (*_, place) = checkpoints_in(tmp_path / "run")
    assert ("-step-" in place.name) == (at != 13)  # after the last step of an epoch it is that of the epoch
    found, again = train(tmp_path / "run", recipe, resume=True, **how)
    assert equal(found, weights)
    assert without_time(again) == without_time(history)
    assert equal(load_trained(tmp_path / "run", model=network()).model.state_dict(), weights)


@pytest.mark.parametrize("at", [3, 9, 16])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, at):
    weights, history = train(tmp_path / "whole", MIX)
    with pytest.raises(MemoryError):
        train(tmp_path / "run", MIX, disturbed(at, crash))
    found, again = train(tmp_path / "run", MIX, resume=True)
    assert equal(found, weights)
    assert without_time(again) == without_time(history)


def test_a_run_that_ended_can_be_made_longer(tmp_path):
    weights, _ = train(tmp_path / "whole", dataclasses.replace(MIX, epochs=5))
    train(tmp_path / "run", MIX)
    found, history = train(tmp_path / "run", dataclasses.replace(MIX, epochs=5), resume=True)
    assert equal(found, weights)
    assert len(history) == 5
    again, same = train(tmp_path / "run", dataclasses.replace(MIX, epochs=5), resume=True)
    assert equal(again, weights)
    assert same == history
    with pytest.raises(InputError, match=r"epochs: expected at least 5, which .*run has, got 3"):
        train(tmp_path / "run", MIX, resume=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_will_do(tmp_path):
    weights, _ = train(tmp_path / "run")
    latest = checkpoints_in(tmp_path / "run")[-1]
    for name in ("optimizer.safetensors", "progress.json", "model.safetensors"):
        whole = (latest / name).read_bytes()
        (latest / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=f"resume: the checkpoint .*{latest.name} is damaged .*; remove it"):
            train(tmp_path / "run", resume=True)
        (latest / name).write_bytes(whole)
    shutil.rmtree(latest)
    assert equal(train(tmp_path / "run", resume=True)[0], weights)


def test_layers_that_draw_are_no_exception(tmp_path):
    """Dropout draws from the global generator, which is lent to it in a state that the step decides."""

    def train_with_dropout(folder, data=DATA, **options):
        model = network()
        model.insert(4, nn.Dropout(0.5))
        train_data_set(model, data, RECIPE, folder, **options)
        return model.state_dict()

    before = torch.get_rng_state()
    torch.manual_seed(0)
    weights = train_with_dropout(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_with_dropout(tmp_path / "run", disturbed(4, interrupt))
    torch.rand(3)
    assert equal(train_with_dropout(tmp_path / "run", resume=True), weights)
    assert not equal(train_with_dropout(tmp_path / "other", seed=1), weights)
    torch.set_rng_state(before)


def test_the_record_tells_with_what_weights_the_run_began(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", data=disturbed(4, interrupt))
    model = network()
    nn.init.zeros_(model[4].weight)
    train_data_set(model, DATA, RECIPE, tmp_path / "run", resume=True)
    assert load_trained(tmp_path / "run", model=network()).record["start"] == digest(network())


def test_a_draft_of_a_checkpoint_is_none(tmp_path):
    weights, _ = train(tmp_path / "run")
    latest = checkpoints_in(tmp_path / "run")[-1]
    latest.rename(latest.with_name(f".{latest.name}"))
    assert equal(train(tmp_path / "run", resume=True)[0], weights)


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with stop_noted() as stop:
        interrupt()
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_hears_no_signals(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path / "run")[0]))
    thread.start()
    thread.join()
    assert equal(found[0], train(tmp_path / "main")[0])


def test_no_number_ends_it_with_the_last_good_checkpoint(tmp_path):
    wild = dataclasses.replace(RECIPE, lr=1e30)
    with pytest.raises(ModelError, match=r"loss: expected a finite value, got .* in epoch 0; there is no checkpoint"):
        train(tmp_path / "run", wild)
    late = dataclasses.replace(RECIPE, lr_factor=1e30, lr_step=1)
    with pytest.raises(
        ModelError, match=r"; the last good checkpoint is .*epoch-0001; a smaller learning rate may help"
    ):
        train(tmp_path / "late", late)
    assert load_trained(checkpoints_in(tmp_path / "late")[-1], model=network()).record["trained_epochs"] == 1


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"extra": OTHER}, {"precision": "bf16-mixed"}],
    ids=["seed", "extra", "precision"],
)
def test_options_that_change_the_weights(tmp_path, options):
    usual, _ = train(tmp_path / "usual")
    other, _ = train(tmp_path / "other", **options)
    assert not equal(usual, other)
    with pytest.raises(ResultsError, match="begun by another run"):
        train(tmp_path / "usual", resume=True, **options)


def test_the_weight_of_more_images_counts(tmp_path):
    half, _ = train(tmp_path / "half", extra=OTHER, extra_weight=0.5)
    assert not equal(half, train(tmp_path / "whole", extra=OTHER)[0])


def test_bfloat16_stays_close(tmp_path):
    usual, _ = train(tmp_path / "usual")
    other, _ = train(tmp_path / "other", precision="bf16-mixed")
    assert {value.dtype for key, value in other.items() if "tracked" not in key} == {torch.float32}
    for key in usual:
        torch.testing.assert_close(usual[key], other[key], rtol=0.1, atol=0.1)


def test_channels_last_is_the_same_but_for_rounding(tmp_path):
    usual, _ = train(tmp_path / "usual")
    model = network()
    train_data_set(model, DATA, RECIPE, tmp_path / "other", channels_last=True)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(usual[key], value, rtol=1e-4, atol=1e-5)
    stored = load_file(tmp_path / "other" / "model.safetensors")
    assert all(torch.equal(stored[key], value) for key, value in model.state_dict().items())


def test_readers_change_nothing(tmp_path):
    assert equal(train(tmp_path / "usual")[0], train(tmp_path / "other", workers=2)[0])


def test_augmentation_and_the_learning_rate_are_the_recipes(tmp_path):
    usual, _ = train(tmp_path / "usual")
    for number, change in enumerate(({"augment": False}, {"lr_factor": 0.5}, {"lr_drop": "reference"}, {"parts": 1})):
        other, _ = train(tmp_path / f"{number}", dataclasses.replace(RECIPE, **change))
        assert not equal(usual, other)


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_left_alone(tmp_path):
    train(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ResultsError, match=r"run: it holds checkpoints; to go on use resume \(--resume\)"):
        train(tmp_path / "run")
    other = dataclasses.replace(RECIPE, lr=0.2)
    with pytest.raises(ResultsError, match=r"begun by another run \(lr: 0\.1 -> 0\.2\); choose another folder"):
        train(tmp_path / "run", other, resume=True)
    with pytest.raises(ResultsError, match=r"begun by another run \(data: 'made up' -> 'others'; images: 50 -> 13;"):
        train(tmp_path / "run", data=OTHER, resume=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "settings.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ResultsError, match=r"settings\.json: not written by rs-plugins train"):
        train(tmp_path / "theirs")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_two_processes_do_not_write_one_folder(tmp_path):
    def begin_another():
        with pytest.raises(ResultsError, match="another process"):
            train(tmp_path / "run")

    train(tmp_path / "run", data=disturbed(3, begin_another))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": "nothing:here"}, InputError, "data: expected digits, mnist:DIR"),
        ({"data": 3}, InputError, "data: expected a data set"),
        ({"precision": "16-mixed"}, InputError, "precision: expected one of '32-true', 'bf16-mixed', got '16-mixed'"),
        ({"device": "abacus"}, InputError, "device: expected a device of this machine, got 'abacus'"),
        ({"workers": -1}, InputError, "workers: expected an integer >= 0, got -1"),
        ({"keep": 0}, InputError, "keep: expected an integer >= 1, got 0"),
        ({"channels_last": 1}, InputError, "channels_last: expected True or False, got 1"),
        ({"extra_weight": 0.0}, InputError, "extra_weight: expected a finite number > 0"),
        ({"seed": 0.5}, InputError, "seed: expected an integer"),
        ({"resume": 1}, InputError, "resume: expected True or False, got 1"),
        ({"network": {"classes": 2}}, InputError, "network: expected name, a text, and others of classes, channels,"),
        ({"network": {"name": "lenet", "depth": 2}}, InputError, "network: expected name, .* got .*'depth': 2"),
        (
            {"network": {"name": "lenet", "mean": np.zeros(1)}},
            *(InputError, r"network: expected plain data without infinite numbers, got mean=array\(\[0\.\]\)"),
        ),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", **change)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ModelError, match="model: it fails on an input of shape"):
        train_data_set(nn.Linear(3, 2), DATA, RECIPE, tmp_path / "run")
    three = in_memory("three", IMAGES[:3], np.arange(3))
    with pytest.raises(ModelError, match="3"):
        train_data_set(network(), three, RECIPE, tmp_path / "run")
    with pytest.raises(InputError, match="out: there is no folder"):
        train(tmp_path / "no" / "where")


def test_a_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(InputError, match=r"model: expected a folder with model\.json and model\.safetensors, got"):
        load_trained(tmp_path)
    train(tmp_path / "run")
    with pytest.raises(InputError, match=r"model\.json does not name the network; pass one of the same architecture"):
        load_trained(tmp_path / "run")
    (tmp_path / "run" / "model.json").write_text("{}")
    with pytest.raises(InputError, match="was not written by rs-plugins"):
        load_trained(tmp_path / "run", model=network())
    (tmp_path / "run" / "model.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        load_trained(tmp_path / "run", model=network())


# ---- what makes a run another one ----------------------------------------------------------------------------------


class Darker:
    """An attack of one's own, whose printed form is its address."""

    def __call__(self, model, x, y, e, share):
        return (x - 0.1 * share).clamp(0, 1)


def test_another_network_of_the_same_shapes_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", data=disturbed(4, interrupt))
    model = network()
    model[2] = nn.GELU()
    with pytest.raises(ResultsError, match=r"begun by another run \(architecture_digits: '\w{64}' -> '\w{64}'\)"):
        train_data_set(model, DATA, RECIPE, tmp_path / "run", resume=True)
    record = load_trained(checkpoints_in(tmp_path / "run")[-1], model=network()).record
    assert record["architecture_digits"] == hashlib.sha256(repr(network()).encode()).hexdigest()


def test_other_initial_weights_are_refused_while_there_is_no_checkpoint(tmp_path):
    with pytest.raises(MemoryError):
        train(tmp_path / "run", data=disturbed(3, crash))
    model = network()
    nn.init.zeros_(model[4].weight)
    with pytest.raises(ResultsError, match=rf"\(start: '{digest(network())}' -> '{digest(model)}'\)"):
        train_data_set(model, DATA, RECIPE, tmp_path / "run", resume=True)


def test_an_attack_of_ones_own_can_be_gone_on_with(tmp_path):
    attacks = Darker(), Darker(), Darker()  # all alive, so that each has an address of its own
    recipes = [
        dataclasses.replace(RECIPE, method="smoothadv", options={"attack": attack, "samples": 2}) for attack in attacks
    ]
    weights, _ = train(tmp_path / "whole", recipes[0])
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", recipes[1], disturbed(4, interrupt))
    assert equal(train(tmp_path / "run", recipes[2], resume=True)[0], weights)


def test_a_trained_network_without_checkpoints_is_left_alone(tmp_path):
    weights, _ = train(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for options in ({}, {"resume": True}):
        with pytest.raises(ResultsError, match=r"it holds model\.safetensors, and no checkpoint to go on from"):
            train(tmp_path / "run", dataclasses.replace(RECIPE, epochs=4), **options)
    assert equal(load_trained(tmp_path / "run", model=network()).model.state_dict(), weights)


def test_numbers_of_any_kind_are_taken(tmp_path):
    how = {"extra": OTHER, "keep": 1, "workers": 0, "channels_last": False, "seed": 3, "extra_weight": 0.5}
    weights, _ = train(tmp_path / "usual", **how)
    other = {
        **how,
        **{"keep": np.float64(1), "workers": 0.0, "channels_last": np.bool_(False)},
        **{"seed": np.int64(3), "extra_weight": np.float32(0.5), "resume": np.bool_(False)},
    }
    assert equal(train(tmp_path / "other", **other)[0], weights)
    assert len(checkpoints_in(tmp_path / "other")) == 1
    assert equal(train(tmp_path / "other", **{**how, "resume": True})[0], weights)  # and the record is the same


# ---- no number, time, and signals between steps ----------------------------------------------------------------------


def test_no_checkpoint_holds_what_is_no_number(tmp_path):
    """The loss of the first step is a number, the weights after it are not."""
    wild = dataclasses.replace(RECIPE, lr=1e30, weight_decay=1e30)
    message = r"model: expected finite weights, got NaN or infinity in .*; there is no checkpoint yet; a smaller learn"
    with pytest.raises(DivergedError, match=message):
        train(tmp_path / "run", wild, disturbed(2, interrupt))  # the first reading is that of the probe
    assert checkpoints_in(tmp_path / "run") == []
    with pytest.raises(DivergedError, match=message):  # one step an epoch
        train(tmp_path / "last", dataclasses.replace(wild, batch_size=50, parts=1))
    assert sorted(os.listdir(tmp_path / "last")) == [".lock", "checkpoints", "settings.json"]
    late = dataclasses.replace(RECIPE, lr_factor=1e42, weight_decay=1e30, lr=1e-30, lr_step=1)
    with pytest.raises(DivergedError, match=r"; the last good checkpoint is .*epoch-0001; a smaller learning rate may"):
        train(tmp_path / "late", late, disturbed(8, interrupt))


def test_only_divergence_is_advised_about(tmp_path, monkeypatch):
    def fail(*_):
        raise ModelError("model: no logits")

    monkeypatch.setattr("rs_plugins.core.training.validation.noisy_accuracy", fail)
    with pytest.raises(ModelError, match=r"^model: no logits$"):
        train(tmp_path / "run", validation=OTHER)


def test_seconds_are_those_of_training(tmp_path, monkeypatch):
    clock = [0.0]

    def lasting(data, seconds):
        def read(positions):
            clock[0] += seconds
            return data.read(positions)

        return dataclasses.replace(data, read=read)

    monkeypatch.setattr("rs_plugins.core.training.job.time.perf_counter", lambda: clock[0])
    _, history = train(tmp_path / "run", data=lasting(DATA, 1.0), validation=lasting(OTHER, 100.0))
    assert [epoch.seconds for epoch in history] == [6, 6, 6]  # one reading a step


def test_a_signal_during_validation_stops_after_it(tmp_path):
    weights, history = train(tmp_path / "whole", validation=OTHER)
    with pytest.raises(KeyboardInterrupt):  # the first reading is that of the probe
        train(tmp_path / "run", validation=disturbed(2, interrupt, OTHER))
    assert [place.name for place in checkpoints_in(tmp_path / "run")] == ["epoch-0001"]
    found, again = train(tmp_path / "run", validation=OTHER, resume=True)
    assert equal(found, weights)
    assert without_time(again) == without_time(history)


def test_after_each_epoch_somebody_may_be_told(tmp_path):
    told = []

    def tell(epoch):
        told.append((epoch, len(checkpoints_in(tmp_path / "run"))))

    _, history = train(tmp_path / "run", after_epoch=tell, keep=5)
    assert told == list(zip(history, [1, 2, 3], strict=True))
