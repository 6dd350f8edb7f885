"""CIFAR-10 in the two forms in which its authors publish it (https://www.cs.toronto.edu/~kriz/cifar.html)."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rs_plugins.core.data_sets.data_set import Array, DataSet, in_memory
from rs_plugins.core.data_sets.files import first_existing
from rs_plugins.errors import InputError

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_FOLDERS = ("", "cifar-10-batches-bin", "cifar-10-batches-py")


def open_cifar10(folder: Path, split: str) -> DataSet:
    """Open one part of CIFAR-10, images (3, 32, 32): the binary version, or the Python version without executing it.

    Raises:
        InputError: If a file is missing or damaged, or a pickle holds anything but numbers, texts and arrays of bytes.
    """
    batches = [_read_batch(_find(folder, name)) for name in _BATCHES[split]]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if labels.size and not 0 <= labels.min() <= labels.max() <= 9:
        raise InputError(f"data: cifar10: expected labels from 0 to 9, got {labels.min()} to {labels.max()}")
    return in_memory(f"cifar10 {split}", images, labels, classes=10)


def _find(folder: Path, batch: str) -> Path:
    return first_existing("cifar10", [folder / place / (batch + end) for place in _FOLDERS for end in (".bin", "")])


def _read_batch(path: Path) -> tuple[Array, Array]:
    return _read_binary(path) if path.suffix == ".bin" else _read_python(path)


def _read_binary(path: Path) -> tuple[Array, Array]:
    data = np.fromfile(path, dtype=np.uint8)
    if data.size % (1 + _PIXELS):
        raise InputError(
            f"data: {path}: expected a multiple of {1 + _PIXELS} bytes (label, image), got {data.size}; is it cut off?"
        )
    rows = data.reshape(-1, 1 + _PIXELS)
    return rows[:, 1:].reshape(-1, *_SHAPE), rows[:, 0].astype(np.int64)


def _read_python(path: Path) -> tuple[Array, Array]:
    try:
        with path.open("rb") as file:
            batch: Any = _Unpickler(file, encoding="bytes").load()
        images, labels = batch[b"data"].array(), np.array(batch[b"labels"], dtype=np.int64)
    except InputError as error:
        raise InputError(f"data: {path}: {str(error).removeprefix('data: ')}") from None
    except Exception as error:  # a damaged pickle can raise anything
        cause = f"{type(error).__name__}: {error}"
        raise InputError(f"data: {path}: expected a batch of CIFAR-10's Python version, got {cause}") from None
    if images.ndim != 2 or images.shape[1] != _PIXELS:
        raise InputError(f"data: {path}: expected images of {_PIXELS} bytes, got an array of shape {images.shape}")
    return images.reshape(-1, *_SHAPE), labels


class _Unpickler(pickle.Unpickler):
    """Reads arrays of bytes without calling anything that the file names: NumPy's classes get harmless stand-ins."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("._core", ".core"), name) in _STAND_INS:
            return _STAND_INS[module.replace("._core", ".core"), name]
        raise InputError(f"data: expected a pickle of numbers, texts and arrays, got one that calls {module}.{name}")


class _RawType:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        pass


class _RawArray:
    """Stands in for ``numpy.ndarray``; the bytes become an array when asked for."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> Array:
        """Return the array of 8-bit numbers."""
        if self.dtype.code != "u1" or self.fortran:
            raise InputError(f"data: expected rows of 8-bit numbers, got an array of {self.dtype.code}")
        array: Array = np.frombuffer(self.data, dtype=np.uint8).reshape(self.shape)
        return array


def _reconstruct(*_: Any) -> _RawArray:
    return _RawArray()


def _encode(text: str, encoding: str | bytes) -> bytes:
    """Stand in for ``_codecs.encode``, by which Python 3 writes bytes in old pickles."""
    return text.encode("latin1")


_STAND_INS: dict[tuple[str, str], Callable[..., Any] | type] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): _RawArray,
    ("numpy", "dtype"): _RawType,
    ("_codecs", "encode"): _encode,
}
