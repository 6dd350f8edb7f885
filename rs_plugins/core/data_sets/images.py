"""Decodes image files with Pillow, which is imported when the first is read."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rs_plugins.core.data_sets.data_set import Array
from rs_plugins.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image


def open_image(source: Path | bytes, name: str) -> "Image":
    """Return the image in a file, or in its bytes, of which only the header is read so far.

    Raises:
        InputError: If it is no image; ``name`` says which.
        MissingDependencyError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("images need Pillow: pip install 'rs-plugins[images]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a few bytes that ask for much memory
            return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"data: {name}: expected an image, got something else ({error})") from None


def decode(image: "Image", name: str, size: int | None = None) -> Array:
    """Return the 8-bit pixels (3, height, width) of ``image``, which is closed.

    Args:
        image: The image.
        name: What messages call it.
        size: Bring it to ``size`` x ``size`` as is usual for ImageNet: the shorter side to 8/7 of that, then crop.

    Raises:
        InputError: If it cannot be decoded.
    """
    with image:
        try:
            pixels = image.convert("RGB")
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f"data: {name}: cannot be decoded ({error})") from None
    array: Array = np.asarray(pixels if size is None else _centre(pixels, size)).transpose(2, 0, 1)
    return array


def _centre(image: "Image", size: int) -> "Image":
    from PIL.Image import Resampling

    short, shorter = round(size * 8 / 7), min(image.size)
    width, height = (short if side == shorter else short * side // shorter for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))
