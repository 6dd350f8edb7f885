"""Some of the images of logs: clean, noisy and attacked, with what is certified of them."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rs_plugins.core.attacks.folder import Columns, read_finished
from rs_plugins.core.certification import majority
from rs_plugins.core.checks import check_count
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.noise import Noise
from rs_plugins.core.perturbing import perturb_
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.results.table import Results
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError, MissingDependencyError, ResultsError

Pixels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """One picture of an image.

    Attributes:
        kind: clean, noisy or adversarial.
        png: The picture, one pixel for each of the image.
        about: What is predicted there, if that is known.
    """

    kind: str
    png: bytes
    about: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a log says of an image.

    Attributes:
        log: Its name.
        outcome: right, wrong or abstains.
        prediction: The certified class; None for an abstention.
        radius: Its certified radius in pixels.
    """

    log: str
    outcome: str
    prediction: int | None
    radius: float


@dataclass(frozen=True)
class Exhibit:
    """One image of the gallery.

    Attributes:
        index: Its position in the data set.
        label: Its true class.
        pictures: How it looks.
        verdicts: What the logs say.
    """

    index: int
    label: int
    pictures: tuple[Picture, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Gallery:
    """Some images of a data set.

    Attributes:
        data: Name of the data set.
        exhibits: The images.
        notes: How they were chosen and made.
    """

    data: str
    exhibits: tuple[Exhibit, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Attacked:
    """A finished attack on images of a data set.

    Attributes:
        name: The attack with its options.
        images: The attacked images by position in the data set, (*input) each.
        predictions: What is predicted of them, -1 for an abstention.
        l2: How far they were moved, in pixels.
        made_with: What the results depend on.
    """

    name: str
    images: Mapping[int, Pixels]
    predictions: Mapping[int, int]
    l2: Mapping[int, float]
    made_with: Mapping[str, Any]


def make_gallery(
    data: DataSet,
    logs: Mapping[str, Results],
    *,
    count: int = 8,
    noise: Noise | None = None,
    attacked: Attacked | None = None,
    records: Mapping[str, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Gallery:
    """Return ``count`` images of ``data``, evenly spaced from the one the first log is most wrong about to the safest.

    Args:
        data: The data set of the logs.
        logs: Logs with radii and rows, by name. Those that are of other images are left out, and named.
        count: How many images; all if there are fewer.
        noise: What the noisy pictures show; without, there are none.
        attacked: An attack: then only attacked images are shown.
        records: The records of logs, as far as there are any: by them data sets and models are told apart.
        seed: Seed of the noise.

    Raises:
        InputError: If none of ``logs`` is of ``data``, ``attacked`` is not, they have no image in common, or the images
            have neither 1 nor 3 channels.
        MissingDependencyError: If Pillow is not installed.
    """
    count = check_count(count, "gallery")
    if len(data.shape) != 3 or data.shape[0] not in (1, 3):
        raise InputError(f"gallery: expected images of 1 or 3 channels, got shape {data.shape}")
    records = records or {}
    known = {name: log for name, log in logs.items() if _fits(log, data, records.get(name, {}).get("digest"))}
    if not known:
        raise InputError(f"data: expected the data set of the logs, got {data.name}, which none of {_list(logs)} is of")
    if attacked is not None and attacked.made_with.get("digest") != data.digest:
        raise InputError(f"attacked: expected an attack on {data.name}, got one on {attacked.made_with.get('data')}")
    first, chief = next(iter(known.items()))
    chosen = _spread(chief, count, None if attacked is None else attacked.images)
    if not chosen:
        raise InputError(f"attacked: expected images that are in {first}, got none of them")
    clean = data.read(chosen)
    shown = {"clean": clean.numpy()}
    if noise is not None:
        noisy = torch.empty_like(clean)
        perturb_(noise, noisy, clean, stream(seed, "gallery"))
        shown["noisy"] = noisy.numpy()
    if attacked is not None:
        shown["adversarial"] = np.stack([_shaped(attacked.images[index], data.shape) for index in chosen])
    exhibits = tuple(
        Exhibit(
            *(index, int(data.labels[index])),
            tuple(Picture(kind, as_png(images[row]), _about(kind, index, attacked)) for kind, images in shown.items()),
            tuple(verdict for name, log in known.items() if (verdict := _verdict(name, log, index)) is not None),
        )
        for row, index in enumerate(chosen)
    )
    notes = [_order(first, attacked), _of_noise(noise), *_of_attack(attacked, records, list(known))]
    if others := [name for name in logs if name not in known]:
        notes.append(f"Of other images, and so left out: {', '.join(others)}.")
    return Gallery(data.name, exhibits, tuple(notes))


def read_attacked(folder: str | Path) -> Attacked:
    """Return the attack of a folder that ``rs-plugins attack`` wrote.

    Raises:
        ResultsError: If it is no such folder, the attack has not finished, or a file is damaged.
    """
    columns, evaluation = read_finished(folder)
    made_with = evaluation["made_with"]
    try:
        predictions = majority(columns["counts_after"], made_with["alpha"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ResultsError(f"{folder}: it is damaged ({error})") from None

    def by_image(values: Any) -> dict[int, Any]:
        return dict(zip(columns["index"].tolist(), values, strict=True))

    images = by_image(columns["images"].astype(np.float32))
    return Attacked(_attack_name(made_with), images, by_image(predictions.tolist()), _moved(columns), made_with)


def as_png(image: Pixels) -> bytes:
    """Return ``image`` (1 or 3, height, width), pixels in [0, 1], clipped to them, as PNG of 8 bits.

    Raises:
        MissingDependencyError: If Pillow is not installed.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise MissingDependencyError("a gallery needs Pillow: pip install 'rs-plugins[plots]'") from error
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file, format="png", optimize=True)
    return file.getvalue()


def _fits(log: Results, data: DataSet, digest: str | None) -> bool:
    """Whether ``log`` is of ``data``, as far as indices, labels and the record tell."""
    if digest is not None and digest != data.digest:
        return False
    return bool(log.idx[-1] < len(data)) and np.array_equal(data.labels[log.idx], log.label)


def _spread(log: Results, count: int, among: Mapping[int, Any] | None) -> list[int]:
    """Return images from the one that is wrong with the largest radius to the one that is right with the largest."""
    sign = np.where(log.correct, 1.0, np.where(log.predict == ABSTAIN, 0.0, -1.0))
    order = log.idx[np.argsort(sign * log.radii, kind="stable")]
    if among is not None:
        order = order[np.isin(order, list(among))]
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    return [int(index) for index in order[places]]


def _shaped(image: Pixels, shape: tuple[int, ...]) -> Pixels:
    """Return an attacked ``image`` in the ``shape`` of the data; grey ones are kept without their channel."""
    if image.shape not in (shape, shape[1:] if shape[0] == 1 else shape):
        raise InputError(f"attacked: expected images of shape {shape}, got {image.shape}")
    return image.reshape(shape)


def _verdict(name: str, log: Results, index: int) -> Verdict | None:
    row = int(np.searchsorted(log.idx, index))
    if row == len(log) or log.idx[row] != index:
        return None
    prediction = int(log.predict[row])
    if prediction == ABSTAIN:
        return Verdict(name, "abstains", None, 0.0)
    return Verdict(name, "right" if log.correct[row] else "wrong", prediction, float(log.radii[row]))


def _about(kind: str, index: int, attacked: Attacked | None) -> str:
    if kind != "adversarial" or attacked is None:
        return ""
    prediction = attacked.predictions[index]
    said = "abstains" if prediction == ABSTAIN else f"predicted {prediction}"
    return f"{said}, moved by {attacked.l2[index]:.2f} (l2)"


def _attack_name(made_with: Mapping[str, Any]) -> str:
    options = made_with.get("options")
    told = ", ".join(f"{name}={value}" for name, value in options.items()) if isinstance(options, dict) else ""
    return f"{made_with.get('attack', 'attack')}({told})"


def _moved(columns: Columns) -> dict[int, float]:
    return dict(zip(columns["index"].tolist(), columns["l2"].tolist(), strict=True))


def _order(first: str, attacked: Attacked | None) -> str:
    among = "" if attacked is None else "attacked "
    return (
        f"The {among}images are evenly spaced in the order of {first}, from the one that is wrong with the largest "
        "radius, over abstentions, to the one that is right with the largest radius: nobody picked them."
    )


def _of_noise(noise: Noise | None) -> str:
    if noise is None:
        return "No noisy images: it is not known with which noise the first log was made."
    return (
        f"Noisy: one draw of {noise.name} noise, sigma {noise.sigma:g}. The network sees it as it is, here it is "
        "clipped to [0, 1]."
    )


def _of_attack(attacked: Attacked | None, records: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    if attacked is None:
        return []
    model = attacked.made_with.get("model")
    models = {name: own for name in names if (own := records.get(name, {}).get("model")) is not None}
    same = [name for name, own in models.items() if own == model]
    whose = f"against the model of {', '.join(same)}" if same else "against a model that is not known to be a log's"
    return [f"Adversarial: {attacked.name}, {whose}. Its prediction is a vote on noise that the attack has not seen."]


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "these logs"
