"""What the verbs that run a model on a data set have in common: options, and how they are read."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rs_plugins.cli.ensembles import DEFAULT, agreed, ensemble_option, make_ensemble, member_option
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
        help="Returns the model, normalisation inside; or a folder that rs-plugins train or adapt wrote.",
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
        "--sigma", type=float, help="Noise, in pixels of [0, 1].  [that of training, where a model is a folder]"
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

    With ``member`` it is the sigma of those that say one, and they have to agree.

    Raises:
        InputError: As `load_any_network`, or if there is no noise level, or several.
    """
    target = options["model"]
    folders = [place for place in (target, *options["member"]) if os.path.isdir(place)]
    if options["sigma"] is None and ":" in target and not folders:
        raise InputError(f"sigma: expected --sigma beside {target}, got none; only a folder of a trained model says it")
    network, trained_with = _load(options)
    sigma = options["sigma"] if options["sigma"] is not None else agreed("sigma", trained_with)
    if sigma is None:
        raise InputError(
            f"sigma: the network in {' and '.join(folders) or target} was trained without noise; expected --sigma, or "
            "certify --bounds NAME --eps R, which does without"
        )
    return network, sigma


def load_any_network(options: Mapping[str, Any]) -> "nn.Module":
    """Return the model that ``model`` and ``weights`` name; with ``member`` the ``ensemble`` of that one and of those.

    A function that a folder names is called only with ``trust_model``: folders come from others, command lines do not.
    Without weights, what a function returns has to be the same each time.

    Raises:
        InputError: If it is not, or the options do not go together.
    """
    network, _ = _load(options)
    return network


def _load(options: Mapping[str, Any]) -> "tuple[nn.Module, list[float | None]]":
    """Return the network, and the sigma of each model's training, None where there is none or nobody knows."""
    first = _load_one(options["model"], options["weights"], trust=options["trust_model"])
    others = [_load_one(place, None, trust=options["trust_model"], option="member") for place in options["member"]]
    networks, trained_with = zip(first, *others, strict=True)
    if others:
        return make_ensemble(options["ensemble"] or DEFAULT, networks), list(trained_with)
    if options["ensemble"] is not None:
        raise InputError(f"ensemble: expected --member beside --ensemble {options['ensemble']}, got none")
    return networks[0], list(trained_with)


def _load_one(
    target: str, weights: Path | None, *, trust: bool, option: str = "model"
) -> "tuple[nn.Module, float | None]":
    from rs_plugins.core.checkpoints import load_weights, make_model
    from rs_plugins.core.models import digest
    from rs_plugins.core.training.trained import load_trained

    if os.path.isdir(target):  # unlike Path.is_dir it raises nothing, whatever the name
        if weights is not None:
            raise InputError(f"weights: the folder {target} has its own, expected no --weights beside it")
        trained = load_trained(target, trust=trust)
        return trained.model, trained.sigma
    if ":" not in target:
        raise InputError(
            f"{option}: expected PACKAGE.MODULE:FUNCTION, or a folder that rs-plugins train wrote, got {target!r}"
        )
    network = make_model(target)
    if weights is not None:
        load_weights(network, weights)
    elif digest(network) != digest(make_model(target)):
        wanted = (
            "give --weights"
            if option == "model"
            else "--weights is for --model alone, so a member has to be a folder that rs-plugins train wrote, or a "
            "function that returns trained weights"
        )
        raise InputError(f"{option}: {target} returns other weights each time; {wanted}")
    return network, None


def open_data(options: Mapping[str, Any]) -> "DataSet":
    """Return the data set that the options ``data``, ``split`` and ``image_size`` name."""
    from rs_plugins.core.data_sets.opening import open_data_set

    return open_data_set(options["data"], split=options["split"], image_size=options["image_size"])


def default_device() -> str:
    """Return where to compute if nobody says."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
