"""Settings of attacks: checks that need no images yet, and classes that differ in a default alone."""

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor

from rs_plugins.core.geometry import per_image
from rs_plugins.errors import InputError

Function = TypeVar("Function", bound=Callable[..., Any])


def check_lengths(value: float | Tensor, name: str, *, positive: bool = False) -> None:
    """Look whether ``value`` is a length or a tensor of lengths; how many images there are is only known at the call.

    Args:
        value: A number, or a tensor of one per image, (n,) or (n, 1, …, 1).
        name: What messages call it.
        positive: Whether 0 is refused.

    Raises:
        InputError: If it is neither, is negative, or is not finite.
    """
    try:
        count = torch.as_tensor(value).numel()
    except (TypeError, ValueError, RuntimeError):
        count = 1
    lengths = per_image(value, torch.empty(count, 1), name)
    if positive and not bool((lengths > 0).all()):
        raise InputError(f"{name}: expected finite values > 0, got {value}")


def check_choice(value: str, choices: Any, name: str) -> None:
    """Look whether ``value`` is one of ``choices``, a `Literal`.

    Raises:
        InputError: Otherwise.
    """
    if value not in get_args(choices):
        raise InputError(f"{name}: expected one of {', '.join(map(repr, get_args(choices)))}, got {value!r}")


def with_defaults(function: Function, **defaults: Any) -> Function:
    """Return ``function`` with other ``defaults`` of parameters that may be given by position; the code is shared."""
    assert isinstance(function, FunctionType)
    named = inspect.signature(function).parameters.values()
    values = [
        defaults.pop(p.name, p.default) for p in named if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty
    ]
    assert not defaults, f"no such parameters: {defaults}"
    copy = FunctionType(function.__code__, function.__globals__, function.__name__, tuple(values), function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = function.__annotations__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    return cast(Function, copy)
