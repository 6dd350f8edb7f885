"""What the verbs that run a model on a data set have in common: options, and how they are read."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from rs_plugins.cli.ensembles import DEFAULT, ensemble_option, make_ensemble, member_option
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from rs_plugins.core.data_sets.data_set import DataSet

INTERRUPTED = 130  # as the shell says it

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _together(*options: Callable[[Any], Any]) -> Callable[[_Command], _Command]:
    """Return one decorator for several options, which help shows in this order."""

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


data_option = click.option(
    "--data",
    required=True,
    metavar="FORMAT[:PLACE]",
    help="digits, mnist:DIR, cifar10:DIR, imagefolder:DIR, npz:FILE (arrays images, labels) or npz-jpeg:FILE.",
)
image_size_option = click.option(
    "--image-size", type=int, help="For imagefolder: scale the shorter side to 8/7 of this, cut out the centre."
)
model_options = _together(
    click.option(
        "--model",
        required=True,
        metavar="PACKAGE.MODULE:FUNCTION|DIR",
        help="Returns the model, normalisation inside; or a folder that rs-plugins train wrote.",
    ),
    click.option(
        "--trust-model",
        is_flag=True,
        help="Where --model is a folder of a network that a function makes, import that function and call it.",
    ),
    click.option("--weights", type=click.Path(path_type=Path), help="safetensors, or a torch file of tensors only."),
    member_option,
    ensemble_option,
    data_option,
    click.option(
        "--split", type=click.Choice(["test", "train"]), help="Part of the data set, if it has parts.  [test]"
    ),
    image_size_option,
    click.option(
        "--sigma", type=float, help="Noise, in pixels of [0, 1].  [that of training, where --model is a folder]"
    ),
)

range_options = _together(
    click.option("--start", type=int, default=0, show_default=True, help="First image."),
    click.option("--stop", type=int, help="Image before which to stop."),
    click.option(
        "--skip", type=int, default=1, show_default=True, help="Take only images whose index is a multiple of this."
    ),
)

device_option = click.option("--device", help="Where to compute.  [cuda if there is one, else cpu]")
quiet_option = click.option(
    "--quiet", is_flag=True, help="No progress bar; there is none either where stderr is no terminal."
)


def find_modules_here() -> None:
    """Put the current folder on the path, as ``python -m`` does."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def load_network(options: Mapping[str, Any]) -> "tuple[nn.Module, float]":
    """Return the model that ``model`` and ``weights`` name, and ``sigma``, by default that of its training.

    Raises:
        InputError: As `load_any_network`, or if there is no noise level.
    """
    target = options["model"]
    if options["sigma"] is None and ":" in target and not os.path.isdir(target):
        raise InputError(f"sigma: expected --sigma beside {target}, got none; only a folder of a trained model says it")
    network, sigma = load_any_network(options)
    if sigma is None:
        raise InputError(
            f"sigma: the network in {target} was trained without noise; expected --sigma, or "
            "certify --bounds NAME --eps R, which does without"
        )
    return network, sigma


def load_any_network(options: Mapping[str, Any]) -> "tuple[nn.Module, float | None]":
    """Return the model that ``model`` and ``weights`` name, and ``sigma``, by default that of its training, if any.

    With ``member`` it is an ``ensemble`` of that model and of those, whose training has to agree in what is not given.
    A function that a folder names is called only with ``trust_model``: folders come from others, command lines do not.
    Without weights, what a function returns has to be the same each time.

    Raises:
        InputError: If it is not, or the options do not go together.
    """
    first = _load_one(options["model"], options["weights"], trust=options["trust_model"])
    others = [_load_one(place, None, trust=options["trust_model"]) for place in options["member"]]
    network = first.network
    if others:
        network = make_ensemble(options["ensemble"] or DEFAULT, [network, *(one.network for one in others)])
        _check_agreement(options, "sigma", [one.sigma for one in (first, *others)])
        _check_agreement(options, "noise", [one.family for one in (first, *others)])
    elif options["ensemble"] is not None:
        raise InputError(f"ensemble: expected --member beside --ensemble {options['ensemble']}, got none")
    return network, first.sigma if options["sigma"] is None else options["sigma"]


def _check_agreement(options: Mapping[str, Any], name: str, values: Sequence[Any]) -> None:
    """Raise an `InputError` if an option is not given and the trained networks have several values for it."""
    known = list(dict.fromkeys(value for value in values if value is not None))
    if options.get(name) is None and len(known) > 1:
        raise InputError(f"{name}: expected --{name}, as members were trained with {' and '.join(map(str, known))}")


class _Loaded(NamedTuple):
    """A network, and the noise that it was trained with, as far as that is known."""

    network: "nn.Module"
    sigma: float | None
    family: str | None


def _load_one(target: str, weights: Path | None, *, trust: bool) -> _Loaded:
    from rs_plugins.core.checkpoints import load_weights, make_model
    from rs_plugins.core.models import digest
    from rs_plugins.core.training.trained import load_trained

    if os.path.isdir(target):  # unlike Path.is_dir it raises nothing, whatever the name
        if weights is not None:
            raise InputError(f"weights: the folder {target} has its own, expected no --weights beside it")
        trained = load_trained(target, trust=trust)
        family = None if trained.sigma is None else trained.record.get("family", "gaussian")
        return _Loaded(trained.model, trained.sigma, family)
    if ":" not in target:
        raise InputError(
            f"model: expected PACKAGE.MODULE:FUNCTION, or a folder that rs-plugins train wrote, got {target!r}"
        )
    network = make_model(target)
    if weights is not None:
        load_weights(network, weights)
    elif digest(network) != digest(make_model(target)):
        raise InputError(f"model: {target} returns other weights each time; give --weights")
    return _Loaded(network, None, None)


def open_data(options: Mapping[str, Any]) -> "DataSet":
    """Return the data set that the options ``data``, ``split`` and ``image_size`` name."""
    from rs_plugins.core.data_sets.opening import open_data_set

    return open_data_set(options["data"], split=options["split"], image_size=options["image_size"])


def default_device() -> str:
    """Return where to compute if nobody says."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
