"""Images and labels in a NumPy archive, as pixels or as JPEG files end to end."""

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rs_plugins.core.data_sets.data_set import Array, DataSet, check_labels, in_memory, scaled
from rs_plugins.core.data_sets.images import decode, open_image
from rs_plugins.errors import InputError

_CHANNELS = (1, 3)


def open_npz(path: Path, _split: str) -> DataSet:
    """Open the arrays ``images`` and ``labels`` (n,) of an archive.

    Images are (n, height, width), (n, height, width, channels) or (n, channels, height, width) with 1 or 3 channels,
    8-bit or floating point in [0, 1].

    Raises:
        InputError: If it is no such archive, or its arrays are not of these shapes, types and ranges.
    """
    images, labels = _arrays(path, ("images", "labels"))
    return in_memory("npz", _channels_first(images), labels)


def write_npz(data: DataSet, path: str | Path, *, at_once: int = 1000) -> None:
    """Write ``data`` so that `open_npz` reads it; 8-bit where all pixels are multiples of 1/255, else float32.

    Args:
        data: All of its images are held in memory.
        path: Ends in ``.npz``.
        at_once: How many images are read at a time.

    Raises:
        InputError: If ``path`` has another ending, or cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise InputError(f"path: expected a name that ends in .npz, got {path}")
    starts = range(0, len(data), at_once)
    parts = [_eight_bit(data.read(range(start, min(start + at_once, len(data))))) for start in starts]
    if any(part.dtype != np.uint8 for part in parts):
        parts = [scaled(part).numpy() for part in parts]
    images = np.concatenate(parts)
    try:
        # of a grey image without its channel: of 1 x 3 x 3 nobody could tell which of them are channels
        np.savez(path, images=images[:, 0] if images.shape[1] == 1 else images, labels=data.labels)
    except OSError as error:
        raise InputError(f"path: {path} cannot be written ({error.strerror})") from error


def _eight_bit(pixels: Tensor) -> Array:
    levels = (pixels * 255).round()
    return (levels.to(torch.uint8) if torch.equal(levels / 255, pixels) else pixels).numpy()


def open_npz_jpeg(path: Path, split: str) -> DataSet:
    """Open a part of an archive of JPEG files, image i in ``{split}_jpeg[offsets[i]:offsets[i + 1]]``.

    ``{split}_offsets`` is (n + 1,), ``{split}_labels`` (n,). Images are decoded when they are asked for.

    Raises:
        InputError: If it is no such archive.
        MissingDependencyError: If Pillow is not installed.
    """
    jpeg, offsets, labels = _arrays(path, [f"{split}_{name}" for name in ("jpeg", "offsets", "labels")])
    if jpeg.dtype != np.uint8 or offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise InputError(f"data: {path}: expected 8-bit {split}_jpeg and at least two integers in {split}_offsets")
    if offsets[0] != 0 or offsets[-1] != jpeg.size or (np.diff(offsets.astype(np.int64)) <= 0).any():
        raise InputError(
            f"data: {path}: expected {split}_offsets to increase from 0 to {jpeg.size}, the bytes there are"
        )
    name = f"npz-jpeg {split}"
    labels = check_labels(name, labels, len(offsets) - 1)
    sha = hashlib.sha256(jpeg.tobytes())
    sha.update(offsets.astype(np.int64).tobytes() + labels.tobytes())
    with open_image(jpeg[: offsets[1]].tobytes(), f"{name}, image 0") as first:
        shape = (3, first.height, first.width)
    return DataSet(name, labels, shape, sha.hexdigest(), partial(_decode, name, jpeg, offsets, shape))


def _arrays(path: Path, names: Sequence[str]) -> list[Array]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            if missing := [name for name in names if name not in archive]:
                raise InputError(f"data: {path}: expected an array {missing[0]!r}, got {', '.join(archive) or 'none'}")
            return [archive[name] for name in names]
    except InputError:
        raise
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"data: {path}: expected an .npz archive of plain arrays, got {error}") from None


def _channels_first(images: Array) -> Array:
    if images.ndim == 3:
        return images[:, None]
    first = images.ndim == 4 and images.shape[1] in _CHANNELS
    last = images.ndim == 4 and images.shape[3] in _CHANNELS
    if first == last:
        raise InputError(
            "data: npz: expected images (n, height, width), (n, height, width, channels) or "
            f"(n, channels, height, width) with 1 or 3 channels, got shape {images.shape}"
        )
    return images if first else images.transpose(0, 3, 1, 2)


def _decode(name: str, jpeg: Array, offsets: Array, shape: tuple[int, ...], positions: Sequence[int]) -> Tensor:
    images = []
    for position in positions:
        file, what = jpeg[offsets[position] : offsets[position + 1]].tobytes(), f"{name}, image {position}"
        images.append(decode(open_image(file, what), what))
        if images[-1].shape != shape:
            raise InputError(f"data: {what}: expected shape {shape} as of the first, got {images[-1].shape}")
    return scaled(np.stack(images))
