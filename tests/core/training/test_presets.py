"""Methods by name, and the papers' recipes: what they say, and that they can be carried out."""

import dataclasses
import json

import numpy as np
import pytest
from torch import nn

from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.inner_attacks import PGD
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.methods import METHODS, make_objective, takes_noise
from rs_plugins.core.training.presets import PRESETS, SIGMAS, preset
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.core.training.stability import Stability
from rs_plugins.errors import InputError, RSPluginsWarning

# name: objective, parts of a batch
MNIST = {
    "gaussian-mnist-0.5": (Gaussian(0.5), 1),
    "stability-mnist-0.25": (Stability(0.25, lam=2.0), 1),
    "smoothadv-mnist-1.0": (SmoothAdv(1.0, attack=PGD(eps=0.99609375, steps=10), samples=4, warmup=10), 4),
    "macer-mnist-0.25": (Macer(0.25, lam=16.0, deferred=30), 1),
    "macer-mnist-0.5": (Macer(0.5, lam=16.0, deferred=30), 1),
    "macer-mnist-1.0": (Macer(1.0, lam=6.0, deferred=30), 1),
    "consistency-mnist-0.25": (Consistency(0.25, lam=10.0, w_ent=0.5, samples=2), 2),
    "consistency-mnist-0.5": (Consistency(0.5, lam=5.0, w_ent=0.5, samples=2), 2),
    "consistency-mnist-1.0": (Consistency(1.0, lam=5.0, w_ent=0.5, samples=2), 2),
    "smoothmix-mnist-0.25": (SmoothMix(0.25, steps=2, w_mix=5.0, mix_step=0, samples=4), 4),
    "smoothmix-mnist-0.25-w1": (SmoothMix(0.25, steps=3, w_mix=1.0, mix_step=0, samples=4), 4),
    "smoothmix-mnist-0.5": (SmoothMix(0.5, steps=4, w_mix=5.0, mix_step=0, samples=4), 4),
    "smoothmix-mnist-0.5-onestep": (SmoothMix(0.5, steps=4, w_mix=5.0, mix_step=1, samples=4), 4),
    "smoothmix-mnist-1.0-onestep-w1": (SmoothMix(1.0, steps=8, w_mix=1.0, mix_step=1, samples=4), 4),
}
CIFAR10 = {
    "gaussian-cifar10-1.0": (Gaussian(1.0), 1),
    "smoothadv-cifar10-0.25": (SmoothAdv(0.25, attack=PGD(eps=1.0), samples=4), 4),
    "smoothadv-cifar10-0.5": (SmoothAdv(0.5, attack=PGD(eps=1.0), samples=8), 8),
    "smoothadv-cifar10-1.0": (SmoothAdv(1.0, attack=PGD(eps=2.0), samples=2), 2),
    "consistency-cifar10-0.25": (Consistency(0.25, lam=20.0, w_ent=0.5), 2),
    "consistency-cifar10-1.0": (Consistency(1.0, lam=10.0, w_ent=0.5), 2),
    "smoothmix-cifar10-0.25": (SmoothMix(0.25, steps=4, step=0.5, w_mix=5.0, samples=2), 2),
    "smoothmix-cifar10-0.5-onestep": (SmoothMix(0.5, steps=4, step=1.0, w_mix=5.0, samples=2, mix_step=1), 2),
    "smoothmix-cifar10-1.0": (SmoothMix(1.0, steps=4, step=2.0, w_mix=5.0, samples=2), 2),
}


@pytest.mark.parametrize("name", MNIST)
def test_recipes_on_mnist(name):
    found = preset(name)
    assert (found.objective(), found.parts) == MNIST[name]
    assert (found.epochs, found.batch_size, found.lr, found.lr_step, found.architecture) == (90, 256, 0.01, 30, "lenet")
    assert (found.normalise, found.augment, found.lr_factor) == (None, False, 0.1)


@pytest.mark.parametrize("name", CIFAR10)
def test_recipes_on_cifar10(name):
    found = preset(name)
    assert (found.objective(), found.parts) == CIFAR10[name]
    assert (found.epochs, found.batch_size, found.lr, found.lr_step) == (150, 256, 0.1, 50)
    assert (found.architecture, found.normalise, found.augment, found.lr_factor) == ("resnet110", "cifar10", True, 0.1)


def test_every_preset_is_named_after_what_it_is():
    noisy = {name: found for name, found in PRESETS.items() if found.sigma is not None}
    for name, found in noisy.items():
        method, data, sigma, *_ = name.split("-")
        assert (method, float(sigma)) == (found.method, found.sigma)
        assert found.sigma in SIGMAS
        assert found.architecture == {"mnist": "lenet", "cifar10": "resnet110"}[data]
        assert type(found.objective()) is METHODS[method]
        assert found.objective().sigma == found.sigma
    assert len(noisy) == 3 * (5 + 4) + 3 * (3 + 2)


# name: radius, epochs, milestones, batch, ramp; of IBP and CROWN-IBP: weights of L1 and of the certified loss
GLS = {
    "gls-mnist-0.1": (0.2, 70, (50, 60), 256, (0, 20), (2e-6, 0.7), (5e-6, 0.7)),
    "gls-mnist-0.3": (0.3, 70, (50, 60), 256, (0, 20), (2e-6, 0.7), (1e-6, 0.7)),
    "gls-cifar10-2-255": (2 / 255, 160, (120, 140), 128, (1, 81), (1e-6, 0.8), (3e-6, 1)),
    "gls-cifar10-8-255": (8 / 255, 240, (200, 220), 128, (1, 121), (0, 1), (0, 1)),
}


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("name", GLS)
def test_recipes_of_gls(name, bound):
    eps, epochs, milestones, batch, (start, end), *of_bounds = GLS[name]
    full = name if bound == "ibp" else f"{name}-{bound}"
    found = preset(full)
    gls = found.objective()
    assert (gls.eps, gls.bound, gls.gradient, gls.sigma_w, gls.sigma_w_end) == (eps, bound, "rgs", 0.1, 0.01)
    assert (gls.ramp_start, gls.schedule.end, gls.noise_scale(epochs)) == (start, end, pytest.approx(0.1))
    assert (gls.l1, gls.w_rob) == of_bounds[bound != "ibp"]
    assert (found.epochs, found.lr_milestones, found.batch_size) == (epochs, milestones, batch)
    assert (found.algorithm, found.lr, found.lr_factor, found.gradient_clip) == ("adam", 5e-4, 0.2, 10)
    assert (found.architecture, found.initial, found.weight_decay, found.sigma) == ("cnn7", "ibp", 0, None)
    cifar10 = "cifar10" in name
    assert (found.augment, found.normalise) == (cifar10, "cifar10" if cifar10 else "data")
    plain = preset(f"{full}-plain").objective()
    noise = {"gradient": "plain", "sigma_w": None, "sigma_w_end": None, "decay": None}
    assert plain == dataclasses.replace(gls, **noise)
    if not cifar10:
        pgpe = preset(f"{full}-pgpe")
        assert pgpe.objective() == dataclasses.replace(plain, gradient="pgpe", population=256, sigma_w=0.01)
        assert pgpe.architecture == "cnn3"


def test_there_are_no_others_of_gls():
    assert sum(name.startswith("gls-") for name in PRESETS) == 3 * (2 * 3 + 2 * 2)


def test_a_shorter_recipe_of_gls():
    short = preset("gls-cifar10-2-255").shortened(8)
    gls = short.objective()
    assert (gls.ramp_start, gls.ramp, gls.decay) == pytest.approx((0.05, 4, 3.95))
    assert short.lr_milestones == (6, 7)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("gaussian-mnist-0.5").lr = 1.0
    with pytest.raises(TypeError):
        preset("smoothmix-mnist-0.5").options["steps"] = 1
    with pytest.raises(TypeError):
        PRESETS["mine"] = preset("gaussian-mnist-0.5")


def test_the_optimiser_is_that_of_the_recipe():
    (group,) = preset("gaussian-mnist-0.5").optimizer(nn.Linear(2, 2)).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.01, 0.9, 1e-4, False)
    other = dataclasses.replace(preset("gaussian-mnist-0.5"), lr=0.2, momentum=0.5, weight_decay=0.1)
    (group,) = other.optimizer(nn.Linear(2, 2)).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.5, 0.1)


@pytest.mark.parametrize(
    ("name", "options", "drops"),
    [
        ("gaussian-mnist-0.5", {}, [30, 60]),
        ("gaussian-mnist-0.5", {"lr_drop": "reference"}, [31, 61]),
        ("gaussian-cifar10-0.5", {"lr_drop": "documented"}, [50, 100]),
        ("gaussian-cifar10-0.5", {"lr_drop": "reference"}, [51, 101]),
    ],
)
def test_the_learning_rate_drops_when_it_should(name, options, drops):
    found = dataclasses.replace(preset(name), **options)
    optimizer = found.optimizer(nn.Linear(2, 2))
    scheduler = found.scheduler(optimizer)
    rates = []
    for _ in range(found.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [epoch for epoch in range(1, found.epochs) if rates[epoch] < rates[epoch - 1]] == drops
    assert rates[-1] == pytest.approx(found.lr / 100)


def test_another_factor_and_the_reference_as_its_code_does_it():
    """Its scheduler is told the number of the epoch that ends."""
    found = dataclasses.replace(preset("gaussian-mnist-0.5"), epochs=9, lr_step=3, lr_factor=0.5, lr_drop="reference")
    optimizer = found.optimizer(nn.Linear(2, 2))
    scheduler = found.scheduler(optimizer)
    for epoch in range(9):
        theirs = found.lr * 0.5 ** (max(epoch - 1, 0) // 3)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs)
        optimizer.step()
        scheduler.step()


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"preset: expected one of gaussian-mnist-0\.25, .*; got 'smoothmix'"):
        preset("smoothmix")
    with pytest.raises(InputError, match=r"method: expected one of 'consistency', 'gaussian', .*, got 'smooth'"):
        make_objective("smooth", 0.5)
    with pytest.raises(InputError, match="step_size: 'smoothmix' has no such option, expected one of step, "):
        make_objective("smoothmix", 0.5, step_size=1.0)
    with pytest.raises(InputError, match="lr_drop: expected one of 'documented', 'reference', got 'late'"):
        dataclasses.replace(preset("gaussian-mnist-0.5"), lr_drop="late")


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_made_by_name(name):
    if takes_noise(name):
        assert make_objective(name, 0.25) == METHODS[name](0.25)
    else:
        assert make_objective(name, eps=0.25) == METHODS[name](eps=0.25)
        with pytest.raises(InputError, match=f"^eps: {name!r} needs this option, got none$"):
            make_objective(name)


def test_a_shorter_recipe_keeps_its_proportions():
    short = preset("smoothmix-mnist-0.5").shortened(9)
    assert (short.epochs, short.lr_step, short.options["warmup"]) == (9, 3, 1)
    assert short.options["steps"] == preset("smoothmix-mnist-0.5").options["steps"]
    assert (short.lr, short.batch_size, short.parts) == (0.01, 256, 4)
    assert preset("macer-mnist-0.5").shortened(30).options["deferred"] == 10
    assert preset("smoothadv-mnist-0.5").shortened(90) == preset("smoothadv-mnist-0.5")
    assert preset("smoothadv-mnist-0.5").shortened(180).options["warmup"] == 20
    assert preset("gaussian-mnist-0.5").shortened(1).lr_step == 1
    with pytest.raises(InputError, match="epochs: expected an integer >= 1, got 0"):
        preset("gaussian-mnist-0.5").shortened(0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_of_its_own_length_stays_as_it_is(name):
    assert preset(name).shortened(preset(name).epochs) == preset(name)


def test_a_shorter_recipe_shortens_what_no_option_says():
    recipe = Recipe(method="smoothadv", sigma=0.5, epochs=90)
    assert recipe.objective().warmup == 10
    assert recipe.shortened(27).objective() == SmoothAdv(0.5, warmup=3)
    assert recipe.shortened(1).objective().warmup == 1
    assert Recipe(method="gaussian", sigma=0.5, epochs=90).shortened(9).options == {}


@pytest.mark.parametrize(("deferred", "expected"), [(None, None), (0, 0), (1, 0), (45, 15), (45.0, 15)])
def test_a_shorter_recipe_defers_in_proportion(deferred, expected):
    recipe = Recipe(method="macer", sigma=0.5, options={"deferred": deferred}, epochs=90)
    assert recipe.shortened(30).objective().deferred == expected


@pytest.mark.parametrize(("epochs", "deferred"), [(1, 0), (2, 1)])
def test_a_recipe_too_short_for_its_deferred_term_warns(epochs, deferred):
    with pytest.warns(RSPluginsWarning, match=f"epochs: {epochs} are too few for 'macer', whose deferred term"):
        short = preset("macer-mnist-0.5").shortened(epochs)
    assert short.objective().deferred == deferred
    assert preset("macer-mnist-0.5").shortened(3).objective().deferred == 1  # so it acts in the last epoch, number 2


def test_a_recipe_of_no_epochs_has_no_proportions():
    with pytest.raises(InputError, match="epochs: nothing of a recipe of 0 epochs can be in proportion to 3"):
        Recipe(method="gaussian", sigma=0.5, epochs=0).shortened(3)


def test_numbers_of_every_kind_are_kept_as_pythons():
    given = {
        **{"sigma": np.float32(0.25), "augment": np.True_, "epochs": 2.0, "batch_size": np.int64(20), "parts": 2.0},
        **{"lr": np.float32(0.5), "lr_step": 3.0, "lr_factor": np.float64(0.5), "momentum": 0, "weight_decay": 1},
    }
    recipe = Recipe(method="gaussian", **given)
    kept = {name: getattr(recipe, name) for name in given}
    assert kept == given
    assert json.loads(json.dumps(kept)) == given
    whole = {"augment": bool, "epochs": int, "batch_size": int, "parts": int, "lr_step": int}
    assert {name: type(value) for name, value in kept.items()} == dict.fromkeys(given, float) | whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "epochs: expected an integer >= 0"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
        ({"parts": 0}, "parts: expected an integer >= 1"),
        ({"lr": 0.0}, "lr: expected a finite number > 0"),
        ({"lr_step": 0}, "lr_step: expected an integer >= 1"),
        ({"lr_factor": -0.1}, "lr_factor: expected a finite number > 0"),
        ({"momentum": -0.1}, "momentum: expected a finite number >= 0"),
        ({"weight_decay": -1}, "weight_decay: expected a finite number >= 0"),
        ({"augment": "yes"}, "augment: expected True or False"),
        ({"sigma": 0.0}, "sigma: expected a finite number > 0"),
        ({"method": "magic"}, "method: expected one of 'consistency'"),
        ({"options": {"steps": 3}}, "steps: 'gaussian' has no such option"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(preset("gaussian-mnist-0.5"), **change)
