"""Noise families by name: ``--noise laplace``, ours and those of plugins."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rs_plugins.cli.ensembles import agreed
from rs_plugins.cli.named_options import convert, split_text
from rs_plugins.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from rs_plugins.core.noise import Family

_Command = TypeVar("_Command", bound=Callable[..., Any])
_DEFAULT = "gaussian"


def noise_option(*, trained: bool) -> Callable[[_Command], _Command]:
    """Return the option of a verb; ``trained`` where --model may be a folder, which says with what it was trained."""
    unless = "[that of training, where a model is a folder, else gaussian]" if trained else "[gaussian]"
    about = (
        "gaussian and lattice-gaussian certify l2 radii, laplace and uniform l1, gaussian-linf and uniform-linf linf; "
        "or a plugin's."
    )
    options = " Options after a colon, as in lattice-gaussian:levels=256." if trained else ""
    metavar = "NAME[:OPTION=VALUE,...]" if trained else "NAME"
    return click.option("--noise", metavar=metavar, help=f"Noise family: {about}{options}  {unless}")


def chosen_family(options: Mapping[str, Any]) -> "Family":
    """Return the noise family that ``noise`` names, by default that of the training of those models that are folders.

    Raises:
        UnknownNameError: If there is none of that name; the message lists what there is.
        InputError: If it calls itself otherwise, or models of an ensemble were trained with several.
    """
    if options["noise"] is not None:
        name, given = split_text(options["noise"], "noise")
        family = family_called(name)
        return partial(family, **_converted(name, family, given)) if given else family
    families = {place: _trained_family(place) for place in (options["model"], *options["member"])}
    trained = agreed("noise", families.values())
    if trained is None or trained == _DEFAULT:
        from rs_plugins.core.noise import GaussianNoise

        return GaussianNoise
    try:
        return family_called(trained)
    except UnknownNameError as error:
        places = " and ".join(place for place, family in families.items() if family == trained)
        raise UnknownNameError(
            f"noise: {places} was trained with {trained!r}: {error}; install its plugin, or choose by --noise"
        ) from None


def _trained_family(place: str) -> str | None:
    """Return the family that the network in a folder was trained with; None if without noise or no folder."""
    from rs_plugins.core.training.trained import read_record

    if not os.path.isdir(place):
        return None
    record = read_record(Path(place))
    return None if record.get("sigma", 0) is None else record.get("family", _DEFAULT)


def _converted(name: str, family: "Family", given: Mapping[str, str]) -> dict[str, Any]:
    """Return the options ``given`` of a family as what its annotations say."""
    known = {option: part for option, part in signature(family).parameters.items() if option != "sigma"}
    for option in given:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"noise: {name} has no option {option!r}; {has}")
    return {option: convert(option, text, known[option].annotation, "noise") for option, text in given.items()}


def family_called(name: str) -> "Family":
    """Return the noise family that a plugin offers as ``name``.

    Raises:
        UnknownNameError: If none does; the message lists what there is.
        InputError: If it calls itself otherwise in results: there could be two of that name.
    """
    from rs_plugins import registry

    family: Any = registry.component("noise", name)
    if not callable(family):
        raise InputError(f"noise: expected {name} to be a class that is called with sigma, got {family!r:.80}")
    if (own := getattr(family, "name", name)) != name:
        raise InputError(f"noise: expected a family that is called {name!r} in results, too, got {own!r}")
    return family  # type: ignore[no-any-return]
