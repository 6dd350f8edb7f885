"""Opens a data set by a text such as ``mnist:DIR``, as the command line names it."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets import cifar10, digits, image_folder, mnist, npz
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.errors import InputError, ModelError, ModelWarning

SPLITS = ("test", "train")

# format → (its reader, whether it has a train and a test part)
_ON_DISK: dict[str, tuple[Callable[[Path, str], DataSet], bool]] = {
    "mnist": (mnist.open_mnist, True),
    "cifar10": (cifar10.open_cifar10, True),
    "npz": (npz.open_npz, False),
    "npz-jpeg": (npz.open_npz_jpeg, True),
}


def open_data_set(text: str, *, split: str | None = None, image_size: int | None = None) -> DataSet:
    """Open ``digits``, ``mnist:DIR``, ``cifar10:DIR``, ``imagefolder:DIR``, ``npz:FILE`` or ``npz-jpeg:FILE``.

    Args:
        text: The format and where the files are.
        split: ``"test"`` (the default) or ``"train"``, of a data set that has these parts.
        image_size: Side in pixels to which the images of an image folder are brought.

    Raises:
        InputError: If there is no such format, the files are not there or damaged, or the option does not fit.
        MissingDependencyError: If reading this format needs a package that is not installed.
    """
    name, _, place = text.partition(":")
    if split not in (None, *SPLITS):
        raise InputError(f"split: expected test or train, got {split!r}")
    if image_size is not None and name != "imagefolder":
        raise InputError(f"image_size: only for imagefolder, got it with {name}")
    if name == "digits" and not place:
        return digits.open_digits(split or "test")
    if name not in (*_ON_DISK, "imagefolder") or not place:
        formats = "digits, mnist:DIR, cifar10:DIR, imagefolder:DIR, npz:FILE or npz-jpeg:FILE"
        raise InputError(f"data: expected {formats}, got {text!r}")
    path = Path(place).expanduser()
    if not os.path.exists(path):  # unlike Path.exists it raises nothing, whatever the name
        raise InputError(f"data: {name}: there is no {path}")
    if split is not None and not has_parts(text):
        raise InputError(f"split: {name} has no parts; name the folder or file of the part that you want")
    if image_size is not None:
        image_size = check_count(image_size, "image_size")
    try:
        if name == "imagefolder":
            return image_folder.open_image_folder(path, image_size)
        open_it, _ = _ON_DISK[name]
        return open_it(path, split or "test")
    except OSError as error:
        raise InputError(f"data: {name}: {error.filename or path} cannot be read ({error.strerror})") from error


def open_training_set(text: str, *, image_size: int | None = None) -> DataSet:
    """Open the part "train" of a data set as `open_data_set` does; one without parts as it is."""
    return open_data_set(text, split="train" if has_parts(text) else None, image_size=image_size)


def has_parts(text: str) -> bool:
    """Whether a text as `open_data_set` takes it names a data set with a part "train" and a part "test"."""
    name = text.partition(":")[0]
    return name == "digits" or _ON_DISK.get(name, (None, False))[1]


def as_data_set(data: object) -> DataSet:
    """Return ``data`` if it is a data set, or the one that it names, as in ``"mnist:DIR"``.

    Raises:
        InputError: If it is neither.
    """
    opened = open_data_set(data) if isinstance(data, str) else data
    if not isinstance(opened, DataSet):
        raise InputError(
            f'data: expected a data set, as open_data_set("mnist:DIR") makes it, got {type(data).__name__}'
        )
    return opened


def as_training_set(data: object) -> DataSet:
    """Do the same for training: of a data set with parts that is named, the part "train".

    Raises:
        InputError: If it is neither.
    """
    return open_training_set(data) if isinstance(data, str) else as_data_set(data)


def check_classes(classes: int, data: DataSet) -> None:
    """Compare the number of the model's classes with the labels, and warn if they may mean others.

    Raises:
        ModelError: If there are fewer classes than labels.
    """
    labels = int(data.labels.max()) + 1
    if classes < labels:
        raise ModelError(f"model: expected at least {labels} classes, as {data.name} has, got {classes}")
    if data.classes is not None and classes != data.classes:
        warnings.warn(
            f"model: it has {classes} classes, {data.name} has {data.classes}; do they mean the same?",
            ModelWarning,
            stacklevel=3,
        )
