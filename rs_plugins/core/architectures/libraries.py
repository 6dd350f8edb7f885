"""Networks of torchvision and timm by name, with initial weights: nothing is downloaded."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from rs_plugins.errors import InputError, MissingDependencyError, ModelError

LIBRARIES = ("torchvision", "timm")  # a bare name is looked up in this order

Maker = Callable[[], nn.Module]


def find_network(name: str, *, classes: int, channels: int) -> Maker | None:
    """Return what makes the network ``torchvision.NAME``, ``timm.NAME`` or, in the first that knows it, ``NAME``.

    Args:
        name: The name. Bare names of a package that is not installed are not found.
        classes: Number of logits.
        channels: Of the images.

    Returns:
        A function without arguments, which raises a ModelError if the package fails; None if no package has it.

    Raises:
        InputError: If a network of torchvision is to take other images than those of 3 channels.
        MissingDependencyError: If the package is not installed, or does not import; for a bare name, if neither is.
    """
    library, _, rest = name.partition(".")
    if library in LIBRARIES:
        return _FIND[library](_imported(library), rest, classes, channels)
    there = [library for library in LIBRARIES if _installed(library)]
    if not there:
        raise MissingDependencyError("networks of torchvision and timm need them: pip install torchvision timm")
    makers = (_FIND[library](_imported(library), name, classes, channels) for library in there)
    return next(filter(None, makers), None)


def _torchvision(package: Any, name: str, classes: int, channels: int) -> Maker | None:
    models = package.models
    if name not in models.list_models(module=models):  # its classifiers; others would fetch weights of a backbone
        return None
    if channels != 3:
        raise InputError(f"channels: expected 3 for torchvision.{name}, got {channels}")
    return partial(_made, f"torchvision.{name}", models.get_model, weights=None, num_classes=classes)


def _timm(package: Any, name: str, classes: int, channels: int) -> Maker | None:
    if "." in name or not package.is_model(name):  # after a dot come the weights that would be downloaded
        return None
    options = {"pretrained": False, "num_classes": classes, "in_chans": channels}
    return partial(_made, f"timm.{name}", package.create_model, **options)


_FIND: dict[str, Callable[[Any, str, int, int], Maker | None]] = {"torchvision": _torchvision, "timm": _timm}


def _made(name: str, make: Callable[..., nn.Module], **options: Any) -> nn.Module:
    try:
        return make(name.partition(".")[2], **options)
    except Exception as error:  # somebody else's code may raise anything
        raise ModelError(f"model: {name} cannot be made: {type(error).__name__}: {error}") from error


def _installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ValueError:  # a module without a specification
        return True


def _imported(library: str) -> Any:
    try:
        return import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise _unfit(library, error) from error
        raise MissingDependencyError(f"networks of {library} need it: pip install {library}") from error
    except Exception as error:  # compiled parts that do not fit raise what they like
        raise _unfit(library, error) from error


def _unfit(library: str, error: Exception) -> MissingDependencyError:
    return MissingDependencyError(
        f"{library} is installed but does not import beside torch {torch.__version__} "
        f"({type(error).__name__}: {error}); install the version that fits: pip install --upgrade {library}"
    )
