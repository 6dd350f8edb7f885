"""The training methods by name."""

from collections.abc import Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from rs_plugins.core.training.consistency import Consistency
from rs_plugins.core.training.gaussian import Gaussian
from rs_plugins.core.training.macer import Macer
from rs_plugins.core.training.objective import Objective
from rs_plugins.core.training.smoothadv import SmoothAdv
from rs_plugins.core.training.smoothmix import SmoothMix
from rs_plugins.core.training.stability import Stability, StabilityConfSeq, StabilityRs4a
from rs_plugins.errors import InputError

METHODS: Mapping[str, Any] = MappingProxyType(
    {
        "consistency": Consistency,
        "gaussian": Gaussian,
        "macer": Macer,
        "smoothadv": SmoothAdv,
        "smoothmix": SmoothMix,
        "stability": Stability,
        "stability-confseq": StabilityConfSeq,
        "stability-rs4a": StabilityRs4a,
    }
)


def make_objective(method: str, sigma: float, **options: Any) -> Objective:
    """Return the objective of ``method`` under noise of ``sigma`` pixels, with its ``options``.

    Raises:
        InputError: If there is no such method, it has no such option, or a value is impossible.
    """
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    known = option_names(method)
    if unknown := options.keys() - {*known, "family"}:
        raise InputError(f"{min(unknown)}: {method!r} has no such option, expected one of {', '.join(known)}")
    return METHODS[method](sigma, **options)  # type: ignore[no-any-return]


def option_names(method: str) -> list[str]:
    """Return the names of the options of ``method``, without the noise, which all methods have."""
    return [field.name for field in fields(METHODS[method]) if field.name not in ("sigma", "family")]
