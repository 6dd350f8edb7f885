"""Scikit-learn's handwritten digits: 1797 images of 8x8 pixels, which come with the package."""

import numpy as np

from rs_plugins.core.data_sets.data_set import DataSet, in_memory
from rs_plugins.errors import MissingDependencyError

TRAINING_IMAGES = 1500  # the first ones; the last 297 are for tests


def open_digits(split: str) -> DataSet:
    """Open one part of the digits, images (1, 8, 8).

    Raises:
        MissingDependencyError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise MissingDependencyError("the digits need scikit-learn: pip install 'rs-plugins[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    part = slice(TRAINING_IMAGES) if split == "train" else slice(TRAINING_IMAGES, None)
    pixels = (images[part] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return in_memory(f"digits {split}", pixels, labels[part], classes=10)
