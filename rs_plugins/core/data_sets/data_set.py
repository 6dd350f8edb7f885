"""A data set: labels in memory, images read when they are asked for."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_plugins.core.checks import PIXEL_TOLERANCE, check_count
from rs_plugins.errors import InputError

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DataSet:
    """Labelled images; an image's position in it is what a certificate calls its index.

    Attributes:
        name: The format and, where it has parts, the part, such as "mnist test".
        labels: True classes, (n,).
        shape: Shape of one image, (channels, height, width).
        digest: SHA-256 of what identifies the data, as 64 hexadecimal digits.
        read: Returns the images at some positions as pixels in [0, 1], float32, (k, *shape).
        classes: Number of classes, where the data set names them.
    """

    name: str
    labels: Ints
    shape: tuple[int, ...]
    digest: str
    read: Callable[[Sequence[int]], Tensor]
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> dict[str, str | int]:
        """What tells this data set from others, to be written beside results."""
        return {"data": self.name, "images": len(self), "shape": "x".join(map(str, self.shape)), "digest": self.digest}


def in_memory(name: str, images: Array, labels: Array, *, classes: int | None = None) -> DataSet:
    """Return the data set of ``images`` (n, channels, height, width), 8-bit or floating point in [0, 1].

    Raises:
        InputError: If images and labels do not go together, there are none, or a pixel is out of range.
    """
    labels = check_labels(name, labels, len(images))
    if images.dtype != np.uint8:
        _check_pixels(name, images)
    digest = hashlib.sha256(f"{images.dtype}{images.shape}".encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(labels.data)
    return DataSet(
        *(name, labels, tuple(images.shape[1:]), digest.hexdigest(), partial(_pixels_of, images)), classes=classes
    )


def spaced_images(data: DataSet, count: int) -> DataSet:
    """Return ``count`` images of ``data``, evenly spaced, as a data set; all of it if there are no more.

    Raises:
        InputError: If ``count`` is no integer >= 1.
    """
    if check_count(count, "images") >= len(data):
        return data
    return _part(data, _spaced(len(data), count), f"spaced {count}")


def split_off(data: DataSet, count: int) -> tuple[DataSet, DataSet]:
    """Return what is left of ``data`` when ``count`` images, evenly spaced, are held out, and those, each in order.

    Both know the number of classes as far as ``data`` does; without, the labels of one may be fewer.

    Raises:
        InputError: If ``count`` is no integer >= 1 that leaves others over.
    """
    if len(data) == 1:
        raise InputError(f"held_out: expected at least 2 images to take one away, got 1 of {data.name}")
    count = check_count(count, "held_out", most=len(data) - 1)
    held = _spaced(len(data), count)
    others = np.delete(np.arange(len(data)), held)
    return (
        replace(_part(data, others, f"all but {count}"), name=f"{data.name}, all but {count}"),
        replace(_part(data, held, f"held out {count}"), name=f"{data.name}, {count} held out"),
    )


def _spaced(n: int, count: int) -> Ints:
    """Return ``count`` <= ``n`` positions from 0 to ``n`` - 1, evenly spaced."""
    return np.arange(count) * n // count


def _part(data: DataSet, chosen: Ints, how: str) -> DataSet:
    digest = hashlib.sha256(f"{data.digest} {how}".encode()).hexdigest()
    return replace(data, labels=data.labels[chosen], digest=digest, read=partial(_read_chosen, data, chosen))


def _read_chosen(data: DataSet, chosen: Ints, positions: Sequence[int]) -> Tensor:
    return data.read([int(chosen[position]) for position in positions])


def check_labels(name: str, labels: Array, n: int) -> Ints:
    """Return ``labels`` if they are ``n`` >= 1 integers >= 0.

    Raises:
        InputError: Otherwise.
    """
    if labels.shape != (n,):
        raise InputError(f"data: {name}: expected one label for each of {n} images, got shape {labels.shape}")
    if not n:
        raise InputError(f"data: {name}: expected images, got none")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        got = f"the label {labels.min()}" if labels.dtype.kind in "iu" else f"{labels.dtype}"
        raise InputError(f"data: {name}: expected integer labels >= 0, got {got}")
    return np.ascontiguousarray(labels, dtype=np.int64)


def scaled(images: Array) -> Tensor:
    """Return 8-bit or floating-point ``images`` as float32 pixels in [0, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    return pixels / 255 if images.dtype == np.uint8 else pixels


def _pixels_of(images: Array, positions: Sequence[int]) -> Tensor:
    return scaled(images[np.asarray(positions, dtype=np.int64)])


def _check_pixels(name: str, images: Array) -> None:
    if images.dtype.kind != "f":
        raise InputError(f"data: {name}: expected 8-bit or floating-point images, got {images.dtype}")
    low, high = (float(bound) for bound in (images.min(), images.max()))
    if not (low >= -PIXEL_TOLERANCE and high <= 1 + PIXEL_TOLERANCE):  # NaN fails too
        got = "NaN" if np.isnan(low) else f"values from {low:.6g} to {high:.6g}"
        raise InputError(
            f"data: {name}: expected floating-point pixels in [0, 1], got {got}; store 8-bit images as uint8"
        )
