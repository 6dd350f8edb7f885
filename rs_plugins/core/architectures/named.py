"""Networks by name: ours, those of torchvision and timm, and what a function of one's own makes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

from rs_plugins.core.activation_replacement.converting import smooth_activations
from rs_plugins.core.architectures.cifar_resnet import CifarResNet, Shortcut
from rs_plugins.core.architectures.cnn import cnn3, cnn5, cnn7
from rs_plugins.core.architectures.lenet import lenet
from rs_plugins.core.architectures.libraries import find_network
from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.checkpoints import make_model
from rs_plugins.core.checks import check_count, check_seed
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, MissingDependencyError


class _Recipe(NamedTuple):
    """How a network is made, called without arguments, and how many channels it takes, None where nobody knows."""

    make: Callable[[], nn.Module]
    channels: int | None


def make_network(
    name: str,
    *,
    classes: int = 10,
    channels: int | None = None,
    size: int | None = None,
    width: float | None = None,
    activation: str = "relu",
    activation_options: Mapping[str, Any] | None = None,
    shape: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Return a network with initial weights, on the CPU.

    The weights are made from ``seed``; the global generators are as before. With ``mean`` the result is
    ``Sequential(Normalise(mean, std), network)``, otherwise the network alone.

    Args:
        name: ``lenet``, ``resnet20``, ``resnet56``, ``resnet110``, ``cnn3``, ``cnn5`` or ``cnn7``; ``torchvision.NAME``
            or ``timm.NAME``, or just ``NAME``, where torchvision comes before timm; or ``PACKAGE.MODULE:FUNCTION``, a
            function that returns the network and takes no arguments. Nothing is downloaded.
        classes: Number of logits; a function of one's own is not told.
        channels: Of the images; by default 1 for the LeNet, 3 for all others. A function of one's own is not told.
        size: Height and width of the images; only for ``cnn3``, ``cnn5`` and ``cnn7``, by default 28 for 1 channel and
            32 for others.
        width: What the numbers of channels and hidden neurons are multiplied by; only for these, 1 by default.
        activation: What is put in the place of ReLU (`smooth_activations`), a name that `make_activation` takes;
            ``"relu"`` leaves the network as it is.
        activation_options: The options of that activation.
        shape: Of one image, beside another activation than ReLU: on one of this shape it is tried.
        mean: What is subtracted from each channel, in pixels; None for no normalisation.
        std: What each channel is divided by, in pixels; None only centres.
        seed: Of the initial weights.

    Raises:
        InputError: If there is no such network, or an option does not fit it.
        MissingDependencyError: If it is not ours, and the package that may have it is not installed or does not import.
        ModelError: If a function of one's own, or a package, fails to make it.
    """
    check_count(classes, "classes", least=2)
    if channels is not None:
        check_count(channels, "channels")
    weights = stream(check_seed(seed), "weights").initial_seed()
    with torch.device("cpu"):
        normalise = _normalise(mean, std)
    with global_randomness(weights):  # what is imported for the first time may draw, or seed
        recipe = _recipe(name, classes, channels, {"size": size, "width": width})
    if normalise is not None and recipe.channels not in (None, len(normalise.mean)):
        expected, got = recipe.channels, len(normalise.mean)
        raise InputError(f"mean: expected one number per channel, {expected} for {name}, got {got}")
    with torch.device("cpu"), global_randomness(weights):
        network = recipe.make()
    network = _with_activation(network, activation, activation_options or {}, shape)
    return network if normalise is None else nn.Sequential(normalise, network)


def _with_activation(
    network: nn.Module, activation: str, options: Mapping[str, Any], shape: Sequence[int] | None
) -> nn.Module:
    if activation == "relu":
        if options:
            raise InputError(f"activation_options: expected another activation than relu beside them, got {options}")
        return network
    if shape is None:
        raise InputError(f"shape: expected that of an image beside activation={activation!r}, got None")
    return smooth_activations(network, activation, shape, **options).model  # an error if there is nothing to replace


def _normalise(mean: Sequence[float] | None, std: Sequence[float] | None) -> Normalise | None:
    if mean is None and std is not None:
        raise InputError("mean: expected one number per channel beside std, got None")
    return None if mean is None else Normalise(mean, std)


def _recipe(name: str, classes: int, channels: int | None, scale: Mapping[str, Any]) -> _Recipe:
    if not isinstance(name, str):
        raise InputError(f"model: expected a name, got {type(name).__name__}")
    given = {option: value for option, value in scale.items() if value is not None}
    if given and name not in SIZED:
        raise InputError(f"{min(given)}: only for {', '.join(SIZED)}, got {given[min(given)]} with {name}")
    if ":" in name:
        with suppress(Exception):  # `make_model` says what is wrong
            import_module(name.partition(":")[0])
        return _Recipe(partial(make_model, name), None)
    if name in NETWORKS:
        return NETWORKS[name](classes, channels, **given)
    takes = 3 if channels is None else channels
    ours = ", ".join(NETWORKS)
    try:
        found = find_network(name, classes=classes, channels=takes)
    except MissingDependencyError as error:
        raise MissingDependencyError(f"model: {name} is not one of {ours}, and {error}") from error
    if found is None:
        raise InputError(
            f"model: expected one of {ours}, torchvision.NAME, timm.NAME or PACKAGE.MODULE:FUNCTION, got {name!r}"
        )
    return _Recipe(found, takes)


def _lenet(classes: int, channels: int | None) -> _Recipe:
    if channels not in (None, 1):
        raise InputError(f"channels: expected 1 for lenet, got {channels}")
    return _Recipe(partial(lenet, classes=classes), 1)


def _resnet(depth: int, shortcut: Shortcut, classes: int, channels: int | None) -> _Recipe:
    takes = 3 if channels is None else channels
    return _Recipe(partial(CifarResNet, depth, classes=classes, channels=takes, shortcut=shortcut), takes)


def _cnn(
    make: Callable[..., nn.Module], classes: int, channels: int | None, size: int | None = None, width: float = 1.0
) -> _Recipe:
    takes = 3 if channels is None else channels
    side = (28 if takes == 1 else 32) if size is None else size
    return _Recipe(partial(make, classes=classes, channels=takes, size=side, width=width), takes)


SIZED = ("cnn3", "cnn5", "cnn7")  # networks for images of one size
# name → what takes classes and channels, None for the network's own; those in `SIZED` also size and width
NETWORKS: Mapping[str, Callable[..., _Recipe]] = MappingProxyType(
    {
        "lenet": _lenet,
        "resnet20": partial(_resnet, 20, "pad"),
        "resnet56": partial(_resnet, 56, "pad"),
        "resnet110": partial(_resnet, 110, "conv"),
        "cnn3": partial(_cnn, cnn3),
        "cnn5": partial(_cnn, cnn5),
        "cnn7": partial(_cnn, cnn7),
    }
)
