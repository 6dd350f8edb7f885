"""Recipes of training as texts: ``--method smoothmix:steps=4,w_mix=5``, or a preset with changes."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from textwrap import indent
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints

from rs_plugins.cli.named_options import convert, fraction, split_text
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from rs_plugins.core.training.recipe import Recipe

# options of the command that change the recipe's setting of that name
CHANGES = (
    *("architecture", "activation", "initial", "normalise", "augment"),
    *("epochs", "batch_size", "parts", "algorithm"),
    *("lr", "schedule", "lr_step", "lr_milestones", "lr_factor", "lr_drop", "lr_warmup"),
    *("momentum", "nesterov", "weight_decay", "weight_decay_of", "gradient_clip"),
)


def choose_recipe(options: Mapping[str, Any]) -> "Recipe":
    """Return the recipe that ``method`` and ``sigma``, or ``preset``, and `CHANGES` among ``options`` describe.

    Beside a preset, ``epochs`` shortens or stretches it as a whole: what is counted in epochs keeps its proportion.
    Settings of the preset that another optimiser or schedule has no use for are forgotten.

    Raises:
        InputError: If they contradict each other, or one has an impossible value.
    """
    from rs_plugins.core.training.methods import takes_noise
    from rs_plugins.core.training.presets import preset
    from rs_plugins.core.training.recipe import Recipe

    name, method, sigma = (options[option] for option in ("preset", "method", "sigma"))
    changes = {option: options[option] for option in CHANGES if options[option] is not None}
    if changes.get("normalise") == "none":
        changes["normalise"] = None
    if "activation" in changes:
        changes["activation"], changes["activation_options"] = parse_activation(changes["activation"])
    if name is None:
        if method is None:
            raise InputError("method: expected --method NAME, with --sigma for most, or --preset NAME, got neither")
        full, its = parse_method(method)
        if sigma is None and takes_noise(full):
            raise InputError("sigma: expected --sigma beside --method, got none")
        if sigma is not None and not takes_noise(full):
            raise InputError(f"sigma: {full} trains without noise on the images, expected no --sigma beside it")
        return Recipe(method=full, sigma=sigma, options=MappingProxyType({**its, **_noise(full, options)}), **changes)
    if method is not None:
        raise InputError("method: expected --method or --preset, got both")
    recipe = preset(name)
    if options.get("noise") is not None:
        raise InputError(f"noise: the preset {name} has its own, expected no --noise beside it")
    if sigma is not None:
        has = "trains without noise on the images" if recipe.sigma is None else f"has {recipe.sigma:g}"
        raise InputError(f"sigma: the preset {name} {has}, expected no --sigma beside it")
    if "epochs" in changes:
        recipe = recipe.shortened(changes.pop("epochs"))
    return recipe.changed(**changes)


def parse_activation(text: str) -> tuple[str, dict[str, Any]]:
    """Return the activation and its options in ``NAME`` or ``NAME:OPTION=VALUE,…``.

    Raises:
        InputError: If there is no such activation or option, or a value is none for it; the message says what there is.
    """
    from rs_plugins.core.activations import ACTIVATIONS

    name, given = split_text(text, "activation")
    if name not in ACTIVATIONS:
        raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    known = inspect.signature(ACTIVATIONS[name]).parameters
    for option in given:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"activation: {name} has no option {option!r}; {has}")
    return name, {
        option: convert(option, value, known[option].annotation, "activation") for option, value in given.items()
    }


def _noise(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise family that ``noise`` names as an option of the method, if it names any."""
    from rs_plugins.cli.noise import family_called
    from rs_plugins.core.training.methods import takes_noise

    if (name := options.get("noise")) is None:
        return {}
    if not takes_noise(method):
        raise InputError(f"noise: {method} trains without noise on the images, expected no --noise beside it")
    if ":" in name:
        raise InputError(f"noise: train takes no options of a noise, expected NAME alone, got {name!r}")
    return {"family": family_called(name)}


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Return the method and its options in ``NAME`` or ``NAME:OPTION=VALUE,…``.

    Of a method with an attack inside, ``attack`` is the name of one, and the options of the attack stand among the
    method's, as in ``smoothadv:attack=ddn,eps=0.5,samples=2``.

    Raises:
        InputError: If there is no such method or option, or a value is none for it; the message says what there is.
    """
    from rs_plugins import registry
    from rs_plugins.core.training.methods import METHODS, takes_noise

    name, given = split_text(text, "method")
    if name not in METHODS:
        methods, where = ", ".join(METHODS), ""
        if any(trainer.name == name for trainer in registry.components("trainer")):
            where = ", a plugin's trainer, which is for Python: rs_plugins.core.training.loop.train"
        raise InputError(
            f"method: expected one of {methods}, with options as in smoothmix:steps=4, got {name!r}{where}"
        )
    own = _hints(METHODS[name])
    attack = _attack(METHODS[name], given)
    inner = {} if attack is None else _hints(attack)
    for option in given:
        if option == "sigma" and takes_noise(name):
            raise InputError("method: sigma is no option of a method but of the command, --sigma")
        if option not in (*own, *inner):
            its = f", and of its attack {', '.join(inner)}" if inner else ""
            raise InputError(f"method: {name} has no option {option!r}; it has {', '.join(own)}{its}")
    options, of_attack = (
        {
            option: convert(option, value, hints[option], "method", number=fraction)
            for option, value in given.items()
            if option in hints and option != "attack"
        }
        for hints in (own, inner)
    )
    if attack is not None:
        options["attack"] = attack(**of_attack)
    return name, options


def describe_methods() -> str:
    """Return each method, and each attack inside one, with its options, their defaults and what they mean."""
    from rs_plugins.core.training.inner_attacks import ATTACKS
    from rs_plugins.core.training.methods import METHODS

    named = {**METHODS, **{f"attack={name}": attack for name, attack in ATTACKS.items()}}
    return "\n".join(f"{name}{_defaults(settings)}\n{_about(settings)}\n" for name, settings in named.items())


def _defaults(settings: Any) -> str:
    """Return the options with their defaults as they are written on the command line."""
    its = {field.name: field.default for field in fields(settings) if field.name in _hints(settings)}
    written = [f"{name}={str(value).lower()}" for name, value in its.items() if value is not MISSING]
    return f":{','.join(written)}" if written else ""


def _about(settings: Any) -> str:
    about = (inspect.getdoc(settings) or "").partition("\n\nRaises:")[0]
    return indent(about.replace("Args:\n", "Options:\n"), "    ")


def _attack(method: Any, given: Mapping[str, str]) -> Any:
    """Return the class of the attack inside, that of the method's default if none is given; None for none."""
    from rs_plugins.core.training.inner_attacks import ATTACKS

    field = next((field for field in fields(method) if field.name == "attack"), None)
    if field is None:
        return None
    if "attack" in given:
        if given["attack"] in ATTACKS:
            return ATTACKS[given["attack"]]
        raise InputError(f"method: attack: expected one of {', '.join(ATTACKS)}, got {given['attack']!r}")
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return None if default is None else type(default)


def _hints(settings: Any) -> dict[str, Any]:
    """Return what can be set of a method or an attack, with the annotations."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in fields(settings) if field.name not in ("sigma", "family")}
