import re
from dataclasses import fields, replace

import pytest

from rs_plugins import registry
from rs_plugins.cli.recipes import CHANGES, choose_recipe, parse_activation, parse_method
from rs_plugins.core.activations import make_activation
from rs_plugins.core.training.inner_attacks import ATTACKS, DDN, PGD, BallFirstPGD
from rs_plugins.core.training.methods import METHODS
from rs_plugins.core.training.presets import PRESETS, preset
from rs_plugins.core.training.recipe import Recipe
from rs_plugins.errors import InputError


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("gaussian", "gaussian", {}),
        ("gaussian:samples=3", "gaussian", {"samples": 3}),
        ("stability-rs4a:lam=1/2", "stability-rs4a", {"lam": 0.5}),
        (
            "smoothmix:steps=4,w_mix=5,mix_step=1,max_norm=none",
            "smoothmix",
            {"steps": 4, "w_mix": 5.0, "mix_step": 1, "max_norm": None},
        ),
        ("macer:deferred=30,lam=6", "macer", {"deferred": 30, "lam": 6.0}),
        ("smoothadv", "smoothadv", {"attack": PGD()}),
        (
            "smoothadv:attack=pgd,eps=255/256,steps=3,step=0.2,samples=2",
            "smoothadv",
            {"attack": PGD(eps=255 / 256, steps=3, step=0.2), "samples": 2},
        ),
        ("smoothadv:eps=2", "smoothadv", {"attack": PGD(eps=2.0)}),
        (
            "smoothadv:attack=ddn,gamma=0.1,levels=none,multi_noise=no",
            "smoothadv",
            {"attack": DDN(gamma=0.1, levels=None), "multi_noise": False},
        ),
        ("consistency:lam=20,form=kl", "consistency", {"lam": 20.0, "form": "kl"}),
        (
            "consistency:attack=ball-first-pgd,steps=7,warmup=2",
            "consistency",
            {"attack": BallFirstPGD(steps=7), "warmup": 2},
        ),
    ],
)
def test_methods_with_their_options(text, name, options):
    assert parse_method(text) == (name, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smooth", "method: expected one of consistency, gaussian, gls, macer, "),
        ("gaussian:lam=1", "method: gaussian has no option 'lam'; it has samples"),
        (
            "smoothadv:epz=1",
            "method: smoothadv has no option 'epz'; it has attack, samples, multi_noise, warmup, "
            "and of its attack eps, steps, step",
        ),
        ("smoothadv:gamma=0.1", "method: smoothadv has no option 'gamma'; "),
        ("consistency:eps=1", "method: consistency has no option 'eps'; it has lam, w_ent, form, samples, attack, "),
        ("smoothadv:attack=fgsm", "method: attack: expected one of pgd, ddn, ball-first-pgd, got 'fgsm'"),
        ("smoothmix:steps=few", "method: steps: expected an integer, got 'few'"),
        ("smoothmix:", "method: expected OPTION=VALUE after smoothmix:, got nothing"),
        ("gaussian:sigma=1", "method: sigma is no option of a method but of the command, --sigma"),
        ("gaussian:family=x", "method: gaussian has no option 'family'"),
        ("smoothadv:eps=-1", "eps: expected a finite number > 0, got -1"),
    ],
)
def test_methods_that_are_none(text, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse_method(text)


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("silu", "silu", {}),
        ("celu:alpha=0.5", "celu", {"alpha": 0.5}),
        ("gelu:approximate=tanh", "gelu", {"approximate": "tanh"}),
        ("smooth-relu:initial=3,learnable=no", "smooth-relu", {"initial": 3.0, "learnable": False}),
        ("relu-update-grad:sharpness=5", "relu-update-grad", {"sharpness": 5.0}),
    ],
)
def test_activations_with_their_options(text, name, options):
    assert parse_activation(text) == (name, options)
    assert make_activation(name, **options) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swish", "activation: expected one of relu, silu, gelu, elu, celu, softplus, mish, smooth-relu, parametric-"),
        ("celu:beta=1", "activation: celu has no option 'beta'; it has alpha, inplace"),
        ("mish:x=1", "activation: mish has no option 'x'; it has inplace"),
        ("celu:alpha=one", "activation: alpha: expected a number, got 'one'"),
        ("smooth-relu:learnable=perhaps", "activation: learnable: expected true or false, got 'perhaps'"),
    ],
)
def test_activations_that_are_none(text, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse_activation(text)


def test_an_activation_and_how_weights_decay_are_part_of_the_recipe():
    chosen = choose_recipe(
        options(method="sat:eps=8/255", activation="celu:alpha=0.5", nesterov=True, weight_decay_of="weights")
    )
    assert (chosen.activation, chosen.activation_options) == ("celu", {"alpha": 0.5})
    assert (chosen.nesterov, chosen.weight_decay_of) == (True, "weights")
    assert choose_recipe(options(method="sat:eps=8/255")).activation == "relu"


def test_no_option_of_an_attack_is_one_of_a_method():
    own = {field.name for method in METHODS.values() for field in fields(method) if hasattr(method, "attack")}
    own |= {field.name for name in ("smoothadv", "consistency") for field in fields(METHODS[name])}
    assert own.isdisjoint(field.name for attack in ATTACKS.values() for field in fields(attack))


def options(**given):
    return {**dict.fromkeys(["method", "sigma", "preset", *CHANGES]), **given}


def test_all_of_a_recipe_can_be_changed():
    assert {*CHANGES, "method", "options", "sigma", "activation_options"} == {field.name for field in fields(Recipe)}


def test_a_method_with_the_defaults_of_a_recipe():
    assert choose_recipe(options(method="gaussian", sigma=0.5)) == Recipe(method="gaussian", sigma=0.5)


def test_a_preset_and_changes():
    name = "smoothmix-cifar10-0.5"
    assert choose_recipe(options(preset=name)) == preset(name)
    changes = {"batch_size": 64, "parts": 1, "lr": 0.5, "lr_step": 7, "lr_factor": 0.5, "lr_drop": "reference"}
    changes |= {"momentum": 0.5, "weight_decay": 0.0, "augment": False, "architecture": "resnet20"}
    assert choose_recipe(options(preset=name, **changes)) == replace(preset(name), **changes)
    assert choose_recipe(options(preset=name, normalise="none")).normalise is None
    assert choose_recipe(options(preset=name, normalise="data")).normalise == "data"


def test_a_preset_with_another_optimiser_and_schedule():
    name = "smoothmix-cifar10-0.5"
    found = choose_recipe(options(preset=name, algorithm="adam", schedule="cosine", lr=0.001, epochs=30))
    assert (found.algorithm, found.schedule, found.lr, found.epochs) == ("adam", "cosine", 0.001, 30)
    assert (found.lr_step, found.options["warmup"]) == (30, 2)  # there are no steps any more
    with pytest.raises(InputError, match=r"^lr_step: only for the schedule step, got 20 with cosine$"):
        choose_recipe(options(preset=name, schedule="cosine", lr_step=20))


def test_fewer_epochs_of_a_preset_shorten_it_as_a_whole():
    found = choose_recipe(options(preset="smoothmix-mnist-0.5", epochs=9))
    assert (found.epochs, found.lr_step, found.options["warmup"]) == (9, 3, 1)
    found = choose_recipe(options(preset="smoothmix-mnist-0.5", epochs=9, lr_step=5))
    assert (found.epochs, found.lr_step, found.options["warmup"]) == (9, 5, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "method: expected --method NAME, with --sigma for most, or --preset NAME, got neither"),
        ({"method": "gaussian"}, "sigma: expected --sigma beside --method, got none"),
        ({"method": "gaussian", "preset": "gaussian-mnist-0.5"}, "method: expected --method or --preset, got both"),
        (
            {"preset": "gaussian-mnist-0.5", "sigma": 0.5},
            "sigma: the preset gaussian-mnist-0.5 has 0.5, expected no --sigma beside it",
        ),
        ({"preset": "gaussian"}, f"preset: expected one of {', '.join(PRESETS)}; got 'gaussian'"),
        ({"preset": "gaussian-mnist-0.5", "epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        (
            {"method": "gaussian", "sigma": 0.5, "algorithm": "adam", "momentum": 0.5},
            "momentum: only for the optimiser sgd, got 0.5 with adam",
        ),
        ({"method": "gaussian", "sigma": 0.5, "lr": 0.0}, "lr: expected a finite number > 0, got 0.0"),
        (
            {"method": "gaussian", "sigma": 0.5, "noise": "lattice-gaussian:levels=16"},
            "noise: train takes no options of a noise, expected NAME alone, got 'lattice-gaussian:levels=16'",
        ),
    ],
)
def test_contradictions(given, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        choose_recipe(options(**given))


def test_a_trainer_of_a_plugin_is_for_python(site, monkeypatch):
    site.plugin("far", '@hookimpl\ndef rs_plugins_components(): return [Component("trainer", "theirs", "a:b")]')
    monkeypatch.setattr(registry, "_DEFAULT", registry.Registry(site.entry_points()))
    for name, where in (
        ("theirs", ", a plugin's trainer, which is for Python: rs_plugins.core.training"),
        ("thers", ""),
    ):
        with pytest.raises(InputError) as caught:
            choose_recipe(options(method=name, sigma=0.5))
        message = str(caught.value)
        assert message.startswith("method: expected one of consistency, gaussian, ")
        assert message.partition(f", got {name!r}")[2].startswith(where)
        assert bool(where) is ("trainer" in message)
