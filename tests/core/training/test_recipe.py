"""Optimisers and schedules of a recipe, alone and in a run that is stopped and gone on with."""

import itertools
import json
import math
import os
import re
import signal
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from rs_plugins.core.activations import SmoothReLU
from rs_plugins.core.data_sets.data_set import in_memory
from rs_plugins.core.training.folder import checkpoints_in
from rs_plugins.core.training.job import train_data_set
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError, ResultsError

SOURCE = np.random.default_rng(0)
DATA = in_memory("made up", SOURCE.random((30, 1, 4, 4)).astype("float32"), np.arange(30) % 2)
RECIPE = Recipe(method="gaussian", sigma=0.25, epochs=3, batch_size=10, lr=0.01, weight_decay=0.1)


def network(frozen=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2))
    for place in frozen:
        model[place].requires_grad_(False)
    return model


def train(folder, recipe, frozen=(), **options):
    model = network(frozen)
    history = train_data_set(model, DATA, recipe, folder, **options)
    return model.state_dict(), history


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stop_in_epoch(number):
    calls = itertools.count()

    def read(positions):
        if next(calls) == 3 * number - 1:  # the first reading is that of the probe, and an epoch has three
            os.kill(os.getpid(), signal.SIGINT)
        return DATA.read(positions)

    return replace(DATA, read=read)


# ---- optimisers ----------------------------------------------------------------------------------------------------


def by_hand(algorithm, gradients, lr, decay, start):
    """Return where Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019) goes from ``start``."""
    w, m, v = start, 0.0, 0.0
    for step, gradient in enumerate(gradients, 1):
        g = gradient + (decay * w if algorithm == "adam" else 0.0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= lr * decay * w if algorithm == "adamw" else 0.0
        w -= lr * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return w


@pytest.mark.parametrize("algorithm", ["adam", "adamw"])
def test_the_steps_of_adam(algorithm):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    optimizer = replace(RECIPE, algorithm=algorithm, lr=0.05, weight_decay=0.3).optimizer(model)
    gradients = [1.0, -3.0, 0.5]
    for gradient in gradients:
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
    assert model.weight.item() == pytest.approx(by_hand(algorithm, gradients, 0.05, 0.3, 2.0), rel=1e-12)


@pytest.mark.parametrize("algorithm", ["sgd", "adam", "adamw"])
def test_only_what_is_to_be_trained_is_handed_over(algorithm):
    model, recipe = network(frozen=(1,)), replace(RECIPE, algorithm=algorithm)
    (group,) = recipe.optimizer(model).param_groups
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in model[3].parameters()]
    with pytest.raises(InputError, match=r"^model: expected a parameter that is to be trained, got none with requires"):
        recipe.optimizer(network(frozen=(1, 3)))


def test_frozen_parts_stay_and_are_part_of_what_a_run_is(tmp_path):
    begun = network()
    found, _ = train(tmp_path / "run", RECIPE, frozen=(1,))
    assert torch.equal(found["1.weight"], begun[1].weight)
    assert not torch.equal(found["3.weight"], begun[3].weight)
    for frozen in ((), (3,)):
        with pytest.raises(ResultsError, match=r"begun by another run \(frozen: {'parameters': 2, .*} -> "):
            train(tmp_path / "run", RECIPE, frozen=frozen, resume=True)
    train(tmp_path / "run", replace(RECIPE, epochs=4), frozen=(1,), resume=True)
    with pytest.raises(InputError, match="model: expected a parameter that is to be trained"):
        train(tmp_path / "none", RECIPE, frozen=(1, 3))
    assert not (tmp_path / "none").exists()


# ---- schedules -----------------------------------------------------------------------------------------------------


def test_half_a_cosine():
    recipe = replace(RECIPE, schedule="cosine", epochs=4, lr=0.2)
    expected = [0.2, 0.2 * (2 + math.sqrt(2)) / 4, 0.1, 0.2 * (2 - math.sqrt(2)) / 4, 0.0]
    assert [recipe.learning_rate(epoch) for epoch in range(5)] == pytest.approx(expected)
    assert recipe.learning_rate(7) == 0  # it does not rise again
    optimizer = recipe.optimizer(network())
    scheduler = recipe.scheduler(optimizer)
    for rate in expected:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step()
        scheduler.step()
    assert replace(RECIPE, schedule="cosine", epochs=0).learning_rate(0) == RECIPE.lr


def test_a_shorter_cosine_ends_at_nothing_too():
    options = MappingProxyType({"steps": 2, "samples": 2, "warmup": 10})
    recipe = replace(RECIPE, schedule="cosine", epochs=50, method="smoothmix", options=options).shortened(10)
    assert (recipe.epochs, recipe.lr_step, recipe.options["warmup"], recipe.schedule) == (10, 30, 2, "cosine")
    assert recipe.learning_rate(5) == pytest.approx(recipe.lr / 2)


def test_milestones():
    recipe = replace(RECIPE, schedule="milestones", lr_milestones=[2, 3.0, 6], lr_factor=0.5, lr=0.8, epochs=8)
    assert recipe.lr_milestones == (2, 3, 6)
    assert [recipe.learning_rate(epoch) for epoch in range(8)] == pytest.approx(
        [0.8] * 2 + [0.4] + [0.2] * 3 + [0.1] * 2
    )
    assert recipe.shortened(4).lr_milestones == (1, 2, 3)
    assert recipe.shortened(1).lr_milestones == (1, 1, 1)
    assert recipe.changed(schedule="step").lr_milestones == ()
    optimizer = recipe.optimizer(network())
    scheduler = recipe.scheduler(optimizer)
    for epoch in range(8):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(recipe.learning_rate(epoch))
        optimizer.step()
        scheduler.step()


def test_the_learning_rate_warms_up():
    recipe = replace(RECIPE, lr_warmup=2, lr=0.8, lr_step=3, epochs=6)
    assert recipe.learning_rate(0, 0.25) == pytest.approx(0.1)
    assert recipe.learning_rate(1, 1.5) == pytest.approx(0.6)
    assert recipe.learning_rate(1, 2.0) == recipe.learning_rate(2, 2.5) == 0.8
    assert recipe.learning_rate(3, 3.1) == pytest.approx(0.08)
    assert [recipe.learning_rate(epoch) for epoch in (0, 1, 2)] == pytest.approx([0.4, 0.8, 0.8])
    assert recipe.shortened(3).lr_warmup == 1
    cosine = replace(RECIPE, lr_warmup=4, schedule="cosine", epochs=4)
    assert cosine.learning_rate(2, 2.5) == pytest.approx(0.01 * (1 + math.cos(math.pi / 2)) / 2 * 2.5 / 4)


def test_a_run_warms_up_from_step_to_step(tmp_path, monkeypatch):
    rates = []

    def optimizer(recipe, model, make=Recipe.optimizer):
        made = make(recipe, model)
        made.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
        return made

    monkeypatch.setattr(Recipe, "optimizer", optimizer)
    train(tmp_path / "run", replace(RECIPE, lr_warmup=2, lr=0.6, schedule="milestones", lr_milestones=(2,)))
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.06, 0.06, 0.06])


# ---- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_scaled_down_to_a_norm(tmp_path, monkeypatch, clip):
    norms = []

    def optimizer(recipe, model, make=Recipe.optimizer):
        def note(own, *_):
            gradients = [value.grad.flatten() for group in own.param_groups for value in group["params"]]
            norms.append(float(torch.cat(gradients).norm()))

        made = make(recipe, model)
        made.register_step_pre_hook(note)
        return made

    usual, _ = train(tmp_path / "usual", RECIPE)
    monkeypatch.setattr(Recipe, "optimizer", optimizer)
    clipped, _ = train(tmp_path / "clipped", replace(RECIPE, gradient_clip=clip))
    assert len(norms) == 9
    assert equal(usual, clipped) == (clip == 1e3)
    if clip == 1e-3:
        assert norms == pytest.approx([clip] * 9, rel=1e-3)


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm": "adam"},
        {"algorithm": "adamw"},
        {"schedule": "cosine"},
        {"algorithm": "adam", "schedule": "cosine"},
        {"schedule": "milestones", "lr_milestones": (1, 2), "lr_warmup": 1, "gradient_clip": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("epoch", [1, 3])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, changes, epoch):
    recipe = replace(RECIPE, **changes)
    weights, history = train(tmp_path / "whole", recipe)
    assert not equal(weights, train(tmp_path / "usual", RECIPE)[0])
    with pytest.raises(KeyboardInterrupt):
        train_data_set(network(), stop_in_epoch(epoch), recipe, tmp_path / "run")
    (*_, place) = checkpoints_in(tmp_path / "run")
    assert place.name.startswith(f"epoch-000{epoch - 1}-step-")
    found, again = train(tmp_path / "run", recipe, resume=True)
    assert equal(found, weights)
    assert [one.lr for one in again] == [one.lr for one in history] == [recipe.learning_rate(e) for e in range(3)]
    assert [one.loss for one in again] == [one.loss for one in history]


def test_what_the_settings_say(tmp_path):
    def settings(name, **changes):
        train(tmp_path / name, replace(RECIPE, **changes))
        return json.loads((tmp_path / name / "settings.json").read_text())

    usual = settings("usual")
    assert (usual["algorithm"], usual["schedule"], usual["momentum"], usual["lr_step"]) == ("sgd", "step", 0.9, 30)
    assert not {"epochs", "frozen"} & usual.keys()
    other = settings("other", algorithm="adamw", schedule="cosine")
    assert (other["algorithm"], other["schedule"], other["epochs"]) == ("adamw", "cosine", 3)
    assert not {"momentum", "lr_step", "lr_factor", "lr_drop"} & other.keys()


def test_new_settings_are_named_where_they_are_not_at_their_defaults(tmp_path):
    """So a folder that an earlier version began is one of the same run."""
    train(tmp_path / "usual", RECIPE)
    written = json.loads((tmp_path / "usual" / "settings.json").read_text())
    assert list(written) == [
        *("format", "method", "sigma", "architecture", "normalise", "augment", "batch_size", "parts", "algorithm"),
        *("lr", "schedule", "lr_step", "lr_factor", "lr_drop", "momentum", "weight_decay", "objective", "data"),
        *("images", "shape", "digest", "seed", "extra", "network", "architecture_digits", "precision"),
        *("channels_last", "keep_best", "start"),
    ]
    new = {"schedule": "milestones", "lr_milestones": [1, 3], "lr_warmup": 1, "gradient_clip": 0.5, "initial": "ibp"}
    train(tmp_path / "other", replace(RECIPE, **new))
    assert new.items() <= json.loads((tmp_path / "other" / "settings.json").read_text()).items()
    for name in ("lr_warmup", "gradient_clip", "initial"):
        with pytest.raises(ResultsError, match=rf"begun by another run \({name}: None -> "):
            train(tmp_path / "usual", replace(RECIPE, epochs=4, **{name: new[name]}), resume=True)


def test_a_folder_of_an_earlier_version_goes_on(tmp_path):
    """Its settings do not name what there was no choice of."""
    longer = replace(RECIPE, epochs=4)
    train(tmp_path / "run", RECIPE)
    place = tmp_path / "run" / "settings.json"
    settings = json.loads(place.read_text())
    place.write_text(json.dumps({name: settings[name] for name in settings if name not in ("algorithm", "schedule")}))
    with pytest.raises(ResultsError, match=r"begun by another run \(algorithm: 'sgd' -> 'adamw'; momentum: 0.9 -> Non"):
        train(tmp_path / "run", replace(longer, algorithm="adamw"), resume=True)
    assert equal(train(tmp_path / "run", longer, resume=True)[0], train(tmp_path / "whole", longer)[0])


@pytest.mark.parametrize("epochs", [2, 4])
def test_a_cosine_over_other_epochs_is_another_run(tmp_path, epochs):
    recipe = replace(RECIPE, schedule="cosine")
    train(tmp_path / "run", recipe)
    with pytest.raises(ResultsError, match=rf"begun by another run \(epochs: 3 -> {epochs}\); choose another folder"):
        train(tmp_path / "run", replace(recipe, epochs=epochs), resume=True)
    with pytest.raises(ResultsError, match=r"\(schedule: 'cosine' -> 'step'; epochs: 3 -> None; lr_step: None -> 30;"):
        train(tmp_path / "run", RECIPE, resume=True)


# ---- what is refused, and what is forgotten ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "lion"}, "algorithm: expected one of 'sgd', 'adam', 'adamw', got 'lion'"),
        ({"schedule": "linear"}, "schedule: expected one of 'step', 'milestones', 'cosine', got 'linear'"),
        ({"algorithm": "adam", "momentum": 0.5}, "momentum: only for the optimiser sgd, got 0.5 with adam"),
        ({"schedule": "cosine", "lr_step": 7}, "lr_step: only for the schedule step, got 7 with cosine"),
        ({"lr_milestones": (3,)}, "lr_milestones: only for the schedule milestones, got (3,) with step"),
        (
            {"schedule": "milestones", "lr_milestones": (3,), "lr_step": 7},
            "lr_step: only for the schedule step, got 7 with milestones",
        ),
        ({"schedule": "milestones"}, "lr_milestones: expected epochs beside the schedule milestones, got none"),
        (
            {"schedule": "milestones", "lr_milestones": (3, 2)},
            "lr_milestones: expected numbers of epochs in ascending order, got (3, 2)",
        ),
        (
            {"schedule": "milestones", "lr_milestones": "50"},
            "lr_milestones: expected numbers of epochs in ascending order, got '50'",
        ),
        ({"schedule": "milestones", "lr_milestones": (0,)}, "lr_milestones: expected an integer >= 1, got 0"),
        ({"lr_warmup": -1}, "lr_warmup: expected an integer >= 0, got -1"),
        ({"gradient_clip": 0}, "gradient_clip: expected a finite number > 0, got 0"),
        ({"initial": "zero"}, "initial: expected one of 'default', 'ibp', 'zero-residual', got 'zero'"),
        ({"weight_decay_of": "biases"}, "weight_decay_of: expected one of 'all', 'weights', got 'biases'"),
        ({"nesterov": 2}, "nesterov: expected True or False, got 2"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: expected momentum above 0 beside it, got 0"),
        ({"algorithm": "adam", "nesterov": True}, "nesterov: only for the optimiser sgd, got True with adam"),
        ({"activation": "swish"}, "activation: expected one of relu, silu, gelu,"),
        ({"activation": "celu", "activation_options": {"beta": 2.0}}, "activation celu: "),
        (
            {"schedule": "cosine", "lr_factor": 0.5},
            "lr_factor: only for the schedule step or milestones, got 0.5 with cosine",
        ),
        (
            {"schedule": "cosine", "lr_drop": "reference"},
            "lr_drop: only for the schedule step, got reference with cosi",
        ),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        replace(RECIPE, **changes)
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        RECIPE.changed(**changes)


def test_settings_of_no_use_any_more_are_forgotten():
    recipe = replace(RECIPE, momentum=0.5, lr_step=7, lr_factor=0.5, lr_drop="reference")
    assert recipe.idle == ("lr_milestones",)
    adam = recipe.changed(algorithm="adam", lr=0.001)
    assert adam == replace(recipe, algorithm="adam", lr=0.001, momentum=0.9)
    assert adam.idle == ("momentum", "nesterov", "lr_milestones")
    cosine = recipe.changed(schedule="cosine")
    assert cosine == Recipe(**{**vars(RECIPE), "momentum": 0.5, "schedule": "cosine"})
    assert cosine.idle == ("lr_step", "lr_milestones", "lr_factor", "lr_drop")
    assert recipe.changed(sigma=0.5) == replace(recipe, sigma=0.5)


# ---- what decays, and how momentum is taken -------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sgd", "adam", "adamw"])
def test_the_weights_of_layers_alone_decay(algorithm):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), SmoothReLU(), nn.Flatten(), nn.Linear(8, 3))
    model[4].bias.requires_grad_(False)
    recipe = Recipe(method="gaussian", sigma=1.0, algorithm=algorithm, weight_decay=0.3, weight_decay_of="weights")
    groups = recipe.optimizer(model).param_groups
    decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    found = {name: decay.get(id(value)) for name, value in model.named_parameters()}
    layers = {"0.weight": 0.3, "4.weight": 0.3}
    others = dict.fromkeys(["0.bias", "1.weight", "1.bias", "2.b_raw"], 0.0)
    assert found == {**layers, **others, "4.bias": None}
    everything = replace(recipe, weight_decay_of="all").optimizer(model).param_groups
    assert [group["weight_decay"] for group in everything] == [0.3]


def test_a_decaying_step_moves_nothing_but_weights():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = Recipe(
        method="gaussian", sigma=1.0, lr=0.1, weight_decay=0.5, weight_decay_of="weights", nesterov=True
    ).optimizer(model)
    for value in model.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in model.named_parameters():
        factor = 1 - 0.1 * 0.5 * 1.9 if name == "0.weight" else 1.0  # Nesterov's first step is 1 + momentum times one
        torch.testing.assert_close(value.detach(), factor * before[name])


def test_a_run_with_two_groups_goes_on_bit_for_bit(tmp_path):
    recipe = replace(RECIPE, weight_decay=0.1, weight_decay_of="weights", nesterov=True)
    whole, _ = train(tmp_path / "whole", recipe)
    train(tmp_path / "parts", replace(recipe, epochs=1))
    parts, _ = train(tmp_path / "parts", recipe, resume=True)
    assert equal(parts, whole)
    assert not equal(whole, train(tmp_path / "all", replace(recipe, weight_decay_of="all"))[0])


def test_what_an_earlier_version_did_not_know_is_named_only_where_it_is_not_the_default(tmp_path):
    train(tmp_path / "plain", RECIPE)
    record = json.loads((tmp_path / "plain" / "model.json").read_text())
    assert not {"activation", "activation_options", "nesterov", "weight_decay_of"} & record.keys()
    with pytest.raises(ResultsError, match=r"nesterov: None -> True"):
        train(tmp_path / "plain", replace(RECIPE, nesterov=True), resume=True)
