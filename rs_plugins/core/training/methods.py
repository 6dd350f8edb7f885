"""The training methods by name."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import MappingProxyType
from typing import Any

from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.gls import Gls
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.sat import Sat
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.core.training.stability import Stability, StabilityConfSeq, StabilityRs4a
from rs_plugins.errors import InputError

METHODS: Mapping[str, Any] = MappingProxyType(
    {
        "consistency": Consistency,
        "gaussian": Gaussian,
        "gls": Gls,
        "macer": Macer,
        "sat": Sat,
        "smoothadv": SmoothAdv,
        "smoothmix": SmoothMix,
        "stability": Stability,
        "stability-confseq": StabilityConfSeq,
        "stability-rs4a": StabilityRs4a,
    }
)


def make_objective(method: str, sigma: float | None = None, **options: Any) -> Objective:
    """Return the objective of ``method`` with its ``options``.

    Args:
        method: Its name.
        sigma: Standard deviation of the noise on the images, in pixels; None for a method that trains without.
        options: Its options.

    Raises:
        InputError: If there is no such method, it has no such option, or a value is impossible.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    known = option_names(method)
    noisy, chosen = takes_noise(method), METHODS[method]
    if noisy and sigma is None:
        raise InputError(f"sigma: {method!r} trains under noise, expected a finite number > 0, got None")
    if not noisy and sigma is not None:
        raise InputError(f"sigma: {method!r} trains without noise on the images, expected None, got {sigma}")
    if unknown := options.keys() - {*known, *(("family",) if noisy else ())}:
        raise InputError(f"{min(unknown)}: {method!r} has no such option, expected one of {', '.join(known)}")
    if missing := [name for name in known if name not in options and _needed(chosen, name)]:
        raise InputError(f"{missing[0]}: {method!r} needs this option, got none")
    return chosen(sigma, **options) if noisy else chosen(**options)  # type: ignore[no-any-return]


def takes_noise(method: str) -> bool:
    """Whether ``method``, one of `METHODS`, trains under noise on the images."""
    return any(field.name == "sigma" for field in fields(METHODS[method]))


def _needed(method: Any, option: str) -> bool:
    """Whether an option has no default."""
    (its,) = (field for field in fields(method) if field.name == option)
    return its.default is MISSING and its.default_factory is MISSING


def option_names(method: str) -> list[str]:
    """Return the names of the options of ``method``, without the noise."""
    return [field.name for field in fields(METHODS[method]) if field.name not in ("sigma", "family")]
