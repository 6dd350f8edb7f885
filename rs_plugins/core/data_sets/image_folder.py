"""Images in one subfolder per class, as ImageNet is usually kept."""

import hashlib
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor

from rs_plugins.core.data_sets.data_set import DataSet, check_labels, scaled
from rs_plugins.core.data_sets.images import decode, open_image
from rs_plugins.errors import InputError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_END = 4096  # bytes


def open_image_folder(folder: Path, image_size: int | None) -> DataSet:
    """Open the images of ``folder``, (3, height, width); the sorted names of its subfolders are the classes.

    The headers of all files are read now, the pixels when they are asked for. What identifies the data set is
    ``image_size`` and, of each file, name, size, and content of the first and last 4 KiB: reading all of ImageNet first
    would take minutes. So files that are exchanged, replaced or encoded anew are found out, but not a change in the
    middle of a large one that keeps its size.

    Args:
        folder: The folder with a subfolder for each class.
        image_size: As in `rs_plugins.core.data_sets.images.decode`; None where all images are of one size already.

    Raises:
        InputError: If there are no classes or images, one cannot be opened, or their sizes differ and no
            ``image_size`` is given.
        MissingDependencyError: If Pillow is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"data: imagefolder: expected a folder, got {folder}")
    classes = sorted(place for place in folder.iterdir() if place.is_dir())
    found = [(path, label) for label, place in enumerate(classes) for path in _images_in(place)]
    if not found:
        raise InputError(f"data: imagefolder: expected subfolders with images in {folder}, found none")
    files = [path for path, _ in found]
    shape = _common_shape(files, image_size)
    sha = hashlib.sha256(f"{shape}{image_size}{[place.name for place in classes]}".encode())
    for path in files:
        size, ends = _ends(path)
        sha.update(f"{path.relative_to(folder).as_posix()}:{size};".encode() + hashlib.sha256(ends).digest())
    labels = check_labels("imagefolder", np.array([label for _, label in found]), len(files))
    read = partial(_read, files, image_size)
    return DataSet("imagefolder", labels, shape, sha.hexdigest(), read, classes=len(classes))


def _images_in(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _ends(path: Path) -> tuple[int, bytes]:
    """Return the size of a file and the content of its first and last 4 KiB, all of it where they meet."""
    with path.open("rb") as file:
        start, size = file.read(_END), file.seek(0, os.SEEK_END)
        file.seek(max(len(start), size - _END))
        return size, start + file.read()


def _common_shape(files: Sequence[Path], image_size: int | None) -> tuple[int, int, int]:
    """Open every file, so that one that is no image is found before the work and not in the middle of it."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in files:
        with open_image(path, str(path)) as image:
            sizes.setdefault(image.size, path)
    if image_size is not None:
        return 3, image_size, image_size
    if len(sizes) > 1:
        got = ", ".join(f"{width}x{height} ({path.name})" for (width, height), path in list(sizes.items())[:2])
        raise InputError(f"data: imagefolder: expected images of one size, got {got}; give an image size")
    ((width, height),) = sizes
    return 3, height, width


def _read(files: Sequence[Path], image_size: int | None, positions: Sequence[int]) -> Tensor:
    chosen = [files[position] for position in positions]
    return scaled(np.stack([decode(open_image(path, str(path)), str(path), image_size) for path in chosen]))
