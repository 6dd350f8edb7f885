"""The images of ``rs-plugins train``: those to train on, more of them, and those to measure the accuracy on."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from rs_plugins.core.data_sets.data_set import DataSet

_WATCHED = 1000  # images on which the accuracy is measured


class TrainingData(NamedTuple):
    """What a training run reads.

    Attributes:
        whole: The training part of the data set, which the network is made for.
        chosen: Its images that are trained on.
        extra: More images to train on.
        validation: Images to measure the accuracy on; they are not among ``chosen``.
    """

    whole: "DataSet"
    chosen: "DataSet"
    extra: "DataSet | None"
    validation: "DataSet | None"


def open_training_data(options: Mapping[str, Any]) -> TrainingData:
    """Open what the options of the command name.

    Raises:
        InputError: If they contradict each other, or a data set cannot be opened.
    """
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.data_sets.data_set import spaced_images, split_off
    from rs_plugins.core.data_sets.opening import open_training_set

    _check(options)
    whole = open_training_set(options["data"], image_size=options["image_size"])
    extra = options["extra"] and open_training_set(options["extra"], image_size=_size(options, options["extra"]))
    if options["held_out"] is None:
        chosen, validation = whole, _open_validation(options)
    else:
        chosen, validation = split_off(whole, options["held_out"])
    if options["train_images"] is not None:
        chosen = spaced_images(chosen, check_count(options["train_images"], "train_images"))
    return TrainingData(whole, chosen, extra, validation)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse what contradicts ``held_out``, and to choose an epoch by images on which the network will be measured."""
    for name in ("validation", "validation_images"):
        if options["held_out"] is not None and options[name] is not None:
            raise InputError(f"{name}: expected none beside --held-out, got {options[name]}")
    if options["keep_best"] and options["held_out"] is None and options["validation"] is None:
        raise InputError(
            "keep_best: expected --held-out N beside it (or --validation), got neither; the part test of --data is not "
            "to choose an epoch by"
        )


def _open_validation(options: Mapping[str, Any]) -> "DataSet | None":
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.data_sets.data_set import spaced_images
    from rs_plugins.core.data_sets.opening import has_parts, open_data_set

    count = _WATCHED if options["validation_images"] is None else options["validation_images"]
    count, text = check_count(count, "validation_images", least=0), options["validation"]
    if text is None and has_parts(options["data"]):
        text = options["data"]
    return spaced_images(open_data_set(text, image_size=_size(options, text)), count) if text and count else None


def _size(options: Mapping[str, Any], text: str) -> int | None:
    """Return to what side the images of ``text`` are brought, which is only for image folders."""
    size: int | None = options["image_size"]
    return size if text.startswith("imagefolder:") else None
