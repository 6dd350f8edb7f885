"""Checks of what callers hand in, made before any long work; messages name the argument, the expected and the got."""

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from rs_plugins.errors import InputError, RSPluginsWarning

MOST = 2**63 - 1  # what counters hold
MOST_INDICES = 2**32  # as many images have a noise stream of their own
LIKELY_SIGMA = 4.0  # a larger one is probably meant for pixels in [0, 255]
PIXEL_TOLERANCE = 1e-6  # a round trip through normalisation moves pixels this far out of [0, 1]


def is_real(value: object) -> TypeGuard[float]:
    """Return whether ``value`` is a real number, Python's or NumPy's: no bool, no text, no tensor; it may be NaN."""
    return isinstance(value, float | int | np.floating | np.integer) and not isinstance(value, bool)


def check_positive(value: float, name: str) -> float:
    """Return ``value`` as a float if it is a finite number above 0.

    Raises:
        InputError: Otherwise.
    """
    number = _number(value, name, "a finite number > 0")
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{name}: expected a finite number > 0, got {value}")
    return number


def check_nonnegative(value: float, name: str) -> float:
    """Return ``value`` as a float if it is a finite number of at least 0.

    Raises:
        InputError: Otherwise.
    """
    number = _number(value, name, "a finite number >= 0")
    if not (math.isfinite(number) and number >= 0):
        raise InputError(f"{name}: expected a finite number >= 0, got {value}")
    return number


def check_probability(value: float, name: str) -> float:
    """Return ``value`` as a float if it lies strictly between 0 and 1.

    Raises:
        InputError: Otherwise.
    """
    number = _number(value, name, "a number in (0, 1)")
    if not 0 < number < 1:
        raise InputError(f"{name}: expected a number in (0, 1), got {value}")
    return number


def check_count(value: int, name: str, *, least: int = 1, most: float = math.inf) -> int:
    """Return ``value`` as an int if it is a whole number of at least ``least`` and at most ``most``.

    Raises:
        InputError: Otherwise.
    """
    expected = f"an integer >= {least}" if most == math.inf else f"an integer from {least} to {most}"
    number = _number(value, name, expected)
    if not math.isfinite(number) or number != int(number) or not least <= number <= min(most, MOST):
        raise InputError(f"{name}: expected {expected}, got {value}")
    return int(value)


def check_flag(value: bool, name: str) -> bool:
    """Return ``value`` as a bool if it is True or False, Python's or NumPy's.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_plain(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return ``values`` as a dict if they are plain data: what JSON has, so no infinite numbers.

    Raises:
        InputError: Otherwise.
    """
    for key, value in values.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise InputError(f"{name}: expected plain data without infinite numbers, got {key}={value!r}")
    return dict(values)


def check_floating(x: Tensor, name: str = "x") -> Tensor:
    """Return ``x`` if it is a finite floating-point tensor of images (n, *input).

    Raises:
        InputError: If it is no tensor, an integer tensor, of rank below 2, or holds NaN or infinity.
    """
    if not isinstance(x, Tensor):
        advice = "; use torch.from_numpy" if type(x).__module__ == "numpy" else ""
        raise InputError(f"{name}: expected a torch.Tensor, got {type(x).__name__}{advice}")
    check_dense(x, name)
    if not x.is_floating_point():
        raise InputError(f"{name}: expected floating-point pixels in [0, 1], got {x.dtype}; divide 8-bit images by 255")
    if x.ndim < 2:
        raise InputError(f"{name}: expected a batch of shape (n, *input), got shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise InputError(f"{name}: expected finite values, got NaN or infinity")
    return x


def check_dense(x: Tensor, name: str) -> Tensor:
    """Return ``x`` if it is an ordinary tensor with numbers in it.

    Raises:
        InputError: If it is sparse, quantised, or on the device "meta", which has no numbers.
    """
    if x.layout != torch.strided or x.is_meta or x.is_quantized:
        raise InputError(f"{name}: expected an ordinary tensor, got {x.dtype}, {x.layout}, on {x.device}")
    return x


def check_images(x: Tensor, name: str = "x") -> Tensor:
    """Return ``x`` if it is a finite floating-point tensor of images (n, *input) with pixels in [0, 1].

    Raises:
        InputError: As `check_floating`, or if a pixel is outside [0, 1] by more than `PIXEL_TOLERANCE`.
    """
    check_floating(x, name)
    if x.numel():
        low, high = (float(bound) for bound in x.detach().aminmax())
        if low < -PIXEL_TOLERANCE or high > 1 + PIXEL_TOLERANCE:
            raise InputError(
                f"{name}: expected pixels in [0, 1], got values from {low:.6g} to {high:.6g}; "
                "scale to [0, 1] and put normalisation inside the model"
            )
    return x


def check_labels(y: Tensor, *, n: int, classes: int | None = None, name: str = "y") -> Tensor:
    """Return ``y`` if it holds ``n`` integer labels in [0, classes).

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = f"{y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        advice = "; of one-hot labels take y.argmax(1)" if isinstance(y, Tensor) and y.ndim == 2 else ""
        raise InputError(f"{name}: expected a tensor of integer labels, got {got}{advice}")
    check_dense(y, name)
    if y.shape != (n,):
        raise InputError(f"{name}: expected one label per image, shape ({n},), got shape {tuple(y.shape)}")
    if classes is not None and n and not bool(((y >= 0) & (y < classes)).all()):
        low, high = (int(bound) for bound in y.aminmax())
        raise InputError(f"{name}: expected labels in [0, {classes}), got values from {low} to {high}")
    return y


def check_seed(seed: int) -> int:
    """Return ``seed`` if it is an integer.

    Raises:
        InputError: Otherwise.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise InputError(f"seed: expected an integer or None, got {seed!r}")
    return int(seed)


def check_indices(indices: Iterable[int] | None, n: int) -> list[int]:
    """Return ``indices`` as ``n`` distinct ints in [0, 2**32); 0…n-1 for None.

    Raises:
        InputError: If there are more or fewer than ``n``, or they are out of range, repeated or no integers.
    """
    if indices is None:
        return list(range(n))
    positions = [check_count(index, "indices", least=0) for index in check_several(indices, "indices", "integers")]
    if positions and max(positions) >= MOST_INDICES:
        raise InputError(f"indices: expected integers in [0, 2**32), got {max(positions)}")
    if len(positions) != n:
        raise InputError(f"indices: expected one per image ({n}), got {len(positions)}")
    if len(set(positions)) != n:
        raise InputError("indices: expected distinct positions, got a repeated one; its noise would be the same twice")
    return positions


def check_several(values: Iterable[Any], name: str, what: str) -> list[Any]:
    """Return ``values`` as a list if they are several and not one: no text, and nothing without members.

    Raises:
        InputError: Otherwise; the message says ``what`` they are to be.
    """
    if isinstance(values, str | bytes) or (isinstance(values, Tensor | np.ndarray) and values.ndim == 0):
        raise InputError(f"{name}: expected several {what}, got {values!r:.80}")
    try:
        return list(values)
    except TypeError:
        raise InputError(f"{name}: expected several {what}, got {values!r:.80}") from None


def check_choice(value: str, choices: Iterable[str], name: str) -> str:
    """Return ``value`` if it is one of the texts ``choices``.

    Raises:
        InputError: Otherwise.
    """
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise InputError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _number(value: float, name: str, expected: str) -> float:
    if isinstance(value, bool | str | bytes):
        raise InputError(f"{name}: expected {expected}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: expected {expected}, got {value!r}") from None


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def check_sigma(sigma: float) -> None:
    """Warn if ``sigma`` is probably meant for pixels in [0, 255].

    Raises:
        InputError: If it is no finite number above 0.
    """
    if check_positive(sigma, "sigma") > LIKELY_SIGMA:
        warnings.warn(
            f"sigma: {sigma:g} is for pixels in [0, 1]; for noise of {sigma:g} in [0, 255] give {sigma / 255:g}",
            RSPluginsWarning,
            stacklevel=3,
        )
