"""Between ART's arrays and core's tensors: images, labels of every form, and the rows that `predict` returns."""

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_plugins.core.checks import check_floating, check_labels
from rs_plugins.errors import InputError, RSPluginsWarning

Array = npt.NDArray[Any]

ROW_SUM = 1 - 1e-7  # of a row of `predict`: not 0, which means "abstained" in ART, and never more than 1


def to_tensor(value: object, name: str) -> Tensor:
    """Return ``value`` as a tensor: a tensor as it is, anything else copied, so that nothing is ever written into it.

    Raises:
        InputError: If it is not numeric.
    """
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name}: expected an array or tensor of numbers, got {type(value).__name__} ({error})"
        ) from None


def to_images(x: object, dtype: torch.dtype, name: str = "x") -> Tensor:
    """Return images (n, *input) as a tensor of the model's ``dtype``, on the device where they are.

    Raises:
        InputError: If they are not floating point, not finite, or no batch.
    """
    return check_floating(to_tensor(x, name), name).to(dtype)


_FAR = 10.0  # attacks leave [0, 1], but not so far


def set_aside_broken(x: object) -> tuple[Tensor, Array]:
    """Return ``x`` with zeros for every image that holds NaN or infinity, and where those are, (n,).

    ART's Square attack asks for predictions of such images, after dividing zero by zero, and expects no error. Values
    far from [0, 1] are warned of.
    """
    images = to_tensor(x, "x").detach()
    if images.ndim < 2 or not images.is_floating_point():
        return images, np.zeros(len(images) if images.ndim else 0, dtype=bool)
    broken = ~images.flatten(1).isfinite().all(dim=1)
    if bool(broken.any()):
        images = torch.where(broken.reshape(-1, *[1] * (images.ndim - 1)), 0, images)
        message = f"x: {int(broken.sum())} of {len(images)} images hold NaN or infinity; their predictions are NaN"
        warnings.warn(message, RSPluginsWarning, stacklevel=4)
    if images.numel() and float(images.abs().max()) > _FAR:
        message = f"x: pixels are expected in [0, 1], got values up to {float(images.abs().max()):g}; divide by 255?"
        warnings.warn(message, RSPluginsWarning, stacklevel=4)
    return images, broken.cpu().numpy()


def to_targets(y: object, *, n: int, classes: int, name: str = "y") -> Tensor:
    """Return labels in any of ART's forms as int64 (n,), or soft labels as floating point (n, classes).

    Args:
        y: Integers (n,) or (n, 1), one-hot rows or class probabilities (n, classes).
        n: Number of images.
        classes: Number of classes.
        name: The argument's name, for messages.

    Raises:
        InputError: If the shape fits none of these, or the values are out of range.
    """
    labels = to_tensor(y, name).detach()
    if labels.ndim == 2 and labels.shape[1] != 1:
        return _from_rows(labels, n, classes, name)
    if labels.ndim == 2:
        labels = labels.squeeze(1)
    if labels.is_floating_point() and bool((labels == labels.round()).all()):
        labels = labels.long()
    return check_labels(labels, n=n, classes=classes, name=name).long()


def to_classes(y: object, *, n: int, classes: int, name: str = "y") -> Tensor:
    """Return labels in any of ART's forms as int64 (n,); of class probabilities, the most likely class.

    Raises:
        InputError: As `to_targets`.
    """
    targets = to_targets(y, n=n, classes=classes, name=name)
    return targets.argmax(dim=1) if targets.ndim == 2 else targets


def _from_rows(rows: Tensor, n: int, classes: int, name: str) -> Tensor:
    if tuple(rows.shape) != (n, classes):
        raise InputError(
            f"{name}: expected labels of shape ({n},), ({n}, 1) or ({n}, {classes}), got shape {tuple(rows.shape)}"
        )
    exact = rows.double()
    sums_to_one = (exact.sum(dim=1) - 1).abs() <= 1e-3
    if not bool(((exact >= 0).all(dim=1) & sums_to_one).all()):
        raise InputError(f"{name}: expected each row to be one-hot or class probabilities that sum to 1")
    one_hot = bool(((exact == 0) | (exact == 1)).all())
    return exact.argmax(dim=1) if one_hot else exact


def host_rows(log_probabilities: Array) -> Array:
    """Return the rows (n, classes), float64, that ART's attacks and metrics want for log-probabilities (n, classes).

    Each row is shifted so that it sums to `ROW_SUM`: the arg max, the differences within the row and its softmax are
    those of the log-probabilities. A row so nearly uniform that the shift would make it a probability vector, which
    ART's APGD refuses, is left as it is.
    """
    rows = log_probabilities.astype(np.float64)
    shifted = rows - rows.mean(axis=1, keepdims=True) + ROW_SUM / rows.shape[1]
    return np.where(shifted.min(axis=1, keepdims=True) >= 0, rows, shifted)


def like(x: object, value: Tensor) -> Any:
    """Return ``value`` as ``x`` came: a tensor of its dtype on its device, or else a float32 array."""
    value = value.detach()
    return value.to(x.device, x.dtype) if isinstance(x, Tensor) else value.float().cpu().numpy()


def wanted_labels(label: Any, n: int, classes: int, device: torch.device) -> list[Tensor]:
    """Return the labels (n,) of each gradient that ``label`` of ART's ``class_gradient`` asks for.

    Args:
        label: None for all classes; one class, or one per image.
        n: Number of images.
        classes: Number of classes.
        device: Where to put them.

    Raises:
        InputError: If there is no such class.
    """
    if label is None:
        return [torch.full((n,), each, device=device) for each in range(classes)]
    labels = np.asarray(label.cpu() if isinstance(label, Tensor) else label)
    if labels.ndim == 0:
        labels = np.full(n, labels)
    return [to_classes(labels, n=n, classes=classes, name="label").to(device)]
