"""What ``rs-plugins adapt`` works on: a classifier by name or from a folder, and images that are no training images."""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rs_plugins.errors import InputError, ResultsError, ResultsWarning

if TYPE_CHECKING:
    from torch import nn

    from rs_plugins.core.certifying_adapters.design import AdapterDesign
    from rs_plugins.core.data_sets.data_set import DataSet
    from rs_plugins.core.selection import Selection

_TEST = "test.npz"
_MOST_TEST = 1000  # images that are set aside where there are none for tests
_LOOKED_AT = 200  # test images without noise, where none are certified


@dataclass(frozen=True, kw_only=True)
class Images:
    """The images, and how the command line calls those that are certified.

    Attributes:
        train: Those to train on.
        test: Those of which some are certified.
        chosen: Which of them.
        name: The test images as words of the command line.
        place: Where they are to be written, if that is what they are called.
    """

    train: "DataSet"
    test: "DataSet"
    chosen: "Selection"
    name: Sequence[str]
    place: Path | None = None


def load_inputs(
    out: Path, count: int, design: "AdapterDesign", options: Mapping[str, Any]
) -> "tuple[nn.Module, dict[str, Any], Images]":
    """Return the classifier, the arguments of `make_network` that make it again, and the images.

    Args:
        out: The folder for results; nothing is written yet.
        count: How many images are certified at most; 0: none.
        design: Which certifying adapter the classifier has to fit.
        options: Those of the command.

    Raises:
        InputError: If an option has an impossible value, does not go with another, or the design does not fit.
        ModelError: If the classifier cannot be run on the images.
        ResultsError: If ``out`` holds other test images.
    """
    from rs_plugins.core.certifying_adapters.design import adapt
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.data_sets.data_set import spaced_images
    from rs_plugins.core.data_sets.opening import open_training_set
    from rs_plugins.core.models import probe
    from rs_plugins.core.selection import Selection

    whole = open_training_set(options["data"], image_size=options["image_size"])
    train, test, name, place = _parts(whole, out, options)
    model, network, record = _classifier(whole, train, options)
    if place is not None:
        _warn_of_seen(record, whole, len(test), options["model"])
    if options["train_images"] is not None:
        train = spaced_images(train, check_count(options["train_images"], "train_images"))
    probe(model, whole.read([0]))
    adapt(model, whole.shape, design)  # what does not fit is said before anything is written
    chosen = Selection(skip=max(1, -(-len(test) // (count or _LOOKED_AT))))
    images = Images(train=train, test=test, chosen=chosen, name=name, place=place)
    return model.to(options["device"]), network, images


def written_test(images: Images) -> Images:
    """Write the test images if they are a part of the data that has no name otherwise, and take them from there.

    Raises:
        InputError: If they cannot be written.
    """
    from rs_plugins.core.data_sets.npz import write_npz
    from rs_plugins.core.data_sets.opening import open_data_set

    if images.place is None:
        return images
    if not images.place.exists():
        write_npz(images.test, images.place)
    return replace(images, test=open_data_set(f"npz:{images.place}"))


def _classifier(
    whole: "DataSet", train: "DataSet", options: Mapping[str, Any]
) -> "tuple[nn.Module, dict[str, Any], Mapping[str, Any]]":
    """Return the classifier, the arguments of `make_network` that make it again, and the record of its training."""
    from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
    from rs_plugins.core.checkpoints import make_model
    from rs_plugins.core.checks import check_count
    from rs_plugins.core.models import digest
    from rs_plugins.core.training.initial import describe_network, initial_network
    from rs_plugins.core.training.trained import load_trained

    target, normalise = options["model"], options["normalise"]
    if Path(target).is_dir():
        for name in ("weights", "normalise", "classes"):
            if options[name] is not None:
                raise InputError(f"{name}: the folder {target} has its own, expected no --{name} beside it")
        trained = load_trained(target, trust=options["trust_model"])
        if isinstance(trained.model, AdaptedClassifier):
            raise InputError(f"model: {target} has a certifying adapter already; give the classifier without")
        return trained.model, trained.record["network"], trained.record
    train = replace(train, classes=int(whole.labels.max()) + 1 if whole.classes is None else whole.classes)
    network = describe_network(train, target, normalise=None if normalise == "none" else normalise)
    if options["classes"] is not None:
        network["classes"] = check_count(options["classes"], "classes", least=2)
    model = initial_network(network, options["weights"])
    if options["weights"] is None and (":" not in target or digest(make_model(target)) != digest(make_model(target))):
        why = "returns other weights each time" if ":" in target else "has initial weights alone"
        raise InputError(f"weights: expected --weights beside --model {target}, got none; it {why}")
    return model, network, {}


def _warn_of_seen(record: Mapping[str, Any], whole: "DataSet", count: int, model: str) -> None:
    """Warn if the classifier was trained on some of the ``count`` images of ``whole`` that are set aside."""
    import numpy as np

    from rs_plugins.core.data_sets.data_set import split_off

    numbered = replace(whole, labels=np.arange(len(whole)))
    held = set(split_off(numbered, count)[1].labels.tolist())
    sources = [record, record.get("extra")]
    seen = held & {place for source in sources if isinstance(source, Mapping) for place in _places(source, numbered)}
    if seen:
        warnings.warn(
            f"{model} was trained on {len(seen)} of the {count} images of --data that are set aside to be certified, "
            "so the figures with and without certifying adapters will be too good; name others with --test",
            ResultsWarning,
            stacklevel=2,
        )


def _places(source: Mapping[str, Any], numbered: "DataSet") -> set[int]:
    """Return which images of a data set, whose labels are their places, the identity of a training set tells of."""
    from rs_plugins.core.data_sets.data_set import spaced_images, split_off

    parts, images = [numbered], source.get("images")
    without = re.search(r", all but ([0-9]{1,9})$", str(source.get("data")))  # as rs-plugins train --held-out
    if without is not None and 0 < int(without[1]) < len(numbered):
        parts.append(split_off(numbered, int(without[1]))[0])
    if isinstance(images, int) and images > 0:  # as rs-plugins train --train-images
        parts += [spaced_images(part, images) for part in parts]
    return {int(place) for part in parts if part.digest == source.get("digest") for place in part.labels}


def _parts(
    whole: "DataSet", out: Path, options: Mapping[str, Any]
) -> "tuple[DataSet, DataSet, list[str], Path | None]":
    """Return the images to train on, those to certify, how the command line calls these, and where they are to be."""
    from rs_plugins.core.data_sets.data_set import split_off
    from rs_plugins.core.data_sets.opening import has_parts, open_data_set

    text = options["test"] or (options["data"] if has_parts(options["data"]) else None)
    if text is None:
        train, held = split_off(whole, min(_MOST_TEST, max(1, len(whole) // 10)))
        place = out / _TEST
        _check_written(held, place)
        return train, held, ["--data", f"npz:{place}"], place
    size = options["image_size"] if text.startswith("imagefolder:") else None
    test = open_data_set(text, image_size=size)
    if test.digest == whole.digest:
        raise InputError(f"test: expected other images than those that are trained on, got {text}")
    if test.shape != whole.shape:
        raise InputError(f"test: expected images of shape {whole.shape} as of --data, got {test.shape}")
    return whole, test, ["--data", text, *([] if size is None else ["--image-size", str(size)])], None


def _check_written(data: "DataSet", place: Path) -> None:
    """Compare test images with those in a file, if it is there.

    Raises:
        ResultsError: If they are others.
    """
    import torch

    from rs_plugins.core.data_sets.opening import open_data_set

    if not place.exists():
        return
    held, everything = open_data_set(f"npz:{place}"), range(len(data))
    same = held.shape == data.shape and held.labels.tolist() == data.labels.tolist()
    if not (same and torch.equal(held.read(everything), data.read(everything))):
        raise ResultsError(f"{place}: it holds other test images than those of this run; choose another folder")
