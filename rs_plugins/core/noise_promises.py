"""Noise families, which may be anybody's, held to what they promise where they are called."""

from math import inf
from typing import Any, NoReturn

import torch
from torch import Tensor

from rs_plugins.core.checks import is_real
from rs_plugins.core.memory import is_of_memory
from rs_plugins.core.noise import Noise
from rs_plugins.errors import InputError, PluginError, RSPluginsError


def draw_into(noise: Noise, out: Tensor, generator: torch.Generator) -> Tensor:
    """Fill ``out`` with independent draws of ``noise`` from ``generator`` and return it.

    Raises:
        InputError: If the noise returns anything else than ``out``: then nobody knows whether it has filled it.
        PluginError: If it raises anything that is not ours.
    """
    try:
        drawn: object = noise.draw_(out, generator)
    except Exception as error:
        _raise(noise, "draw_", error)
    if drawn is not out:
        got = f"another tensor of shape {tuple(drawn.shape)}" if isinstance(drawn, Tensor) else repr(drawn)[:80]
        raise InputError(f"noise {noise.name!r}: draw_ must fill the tensor that it is given and return it, got {got}")
    return out


def promised_number(noise: Any, method: str, *arguments: float, most: float = inf) -> float:
    """Return what ``method`` of ``noise``, such as ``"radius"``, gives for ``arguments``.

    Raises:
        InputError: If it is no real number from 0 to ``most``.
        PluginError: If the noise raises anything that is not ours.
    """
    try:
        given: object = getattr(noise, method)(*arguments)
    except Exception as error:
        _raise(noise, method, error)
    if not is_real(given) or not 0 <= given <= most:
        asked = ", ".join(f"{argument:.6g}" for argument in arguments)
        expected = "a number >= 0" if most == inf else f"a number from 0 to {most:g}"
        raise InputError(f"noise {noise.name!r}: {method}({asked}) gave {given!r:.80}; expected {expected}")
    return float(given)


def _raise(noise: Noise, method: str, error: Exception) -> NoReturn:
    """Say of an error that is not ours whose it is; of one of memory those hear who can ask for less."""
    if isinstance(error, RSPluginsError) or is_of_memory(error):
        raise error
    reason = str(error) or "no message"
    raise PluginError(f"noise {noise.name!r}: {method} fails: {type(error).__name__}: {reason}") from error
