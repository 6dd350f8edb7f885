"""MNIST and its relatives in the idx format (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from rs_plugins.core.data_sets.data_set import Array, DataSet, in_memory
from rs_plugins.core.data_sets.files import first_existing
from rs_plugins.errors import InputError

_UNSIGNED_BYTES = b"\0\0\x08"  # an idx file of 8-bit numbers begins so; the number of axes follows
_PREFIX = {"train": "train", "test": "t10k"}


def open_mnist(folder: Path, split: str) -> DataSet:
    """Open one part of MNIST, images (1, 28, 28), in ``folder``, ``folder/raw`` or ``folder/MNIST/raw``.

    Raises:
        InputError: If a file is missing or damaged.
    """
    images = _read_part(folder, f"{_PREFIX[split]}-images", axes=3)
    labels = _read_part(folder, f"{_PREFIX[split]}-labels", axes=1)
    return in_memory(f"mnist {split}", images[:, None], labels, classes=10)


def _read_part(folder: Path, stem: str, axes: int) -> Array:
    names = [f"{stem}{dash}idx{axes}-ubyte{end}" for dash in "-." for end in ("", ".gz")]
    places = [place / name for place in (folder, folder / "raw", folder / "MNIST" / "raw") for name in names]
    return read_idx(first_existing("mnist", places), axes)


def read_idx(path: Path, axes: int) -> Array:
    """Return the array of 8-bit numbers with ``axes`` axes in an idx file.

    Raises:
        InputError: If it is no such file, or longer or shorter than it says.
    """
    data = path.read_bytes()
    if path.suffix == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"data: {path}: expected a gzip file, got a damaged one ({error})") from None
    magic, start = _UNSIGNED_BYTES + bytes([axes]), 4 + 4 * axes
    if len(data) < start or data[:4] != magic:
        raise InputError(f"data: {path}: expected an idx file that begins with {magic.hex()}, got {data[:4].hex()}")
    shape = np.frombuffer(data, dtype=">u4", count=axes, offset=4).tolist()
    if len(data) - start != math.prod(shape):
        size = "x".join(map(str, shape))
        raise InputError(f"data: {path}: expected {size} bytes of data, got {len(data) - start}; is it cut off?")
    array: Array = np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
    return array
