"""What bounds left open, for a complete verifier: the network as ONNX, one VNN-LIB file per image, a list of both.

The layout is that of the verification competition (VNN-COMP), which α,β-CROWN and others read: a line of
``instances.csv`` has the network, the property and how many seconds to spend.
"""

import inspect
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_images, check_positive
from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.files import write_whole
from rs_plugins.core.frozen_copy import frozen_copy, unwrapped
from rs_plugins.core.models import probe
from rs_plugins.core.relaxations.bound_results import BoundCertificate, BoundResults
from rs_plugins.errors import InputError, MissingDependencyError, ModelError, RSPluginsError

MODEL, PROPERTIES, INSTANCES = "model.onnx", "vnnlib", "instances.csv"
TIMEOUT = 300.0  # seconds
OPSET = 13  # which all verifiers know
DIGITS = 17  # of the ends of pixels


@dataclass(frozen=True, eq=False)
class _Problem:
    """Is the ``image`` (*input) at position ``index`` of the class ``label`` everywhere in its ball?"""

    index: int
    label: int
    image: Tensor


def export_unknown(
    model: nn.Module,
    certificates: Sequence[BoundCertificate],
    x: Tensor,
    folder: str | Path,
    *,
    timeout: float = TIMEOUT,
) -> list[int]:
    """Write what a complete verifier needs to settle the certificates whose status is unknown.

    ``folder`` gets `MODEL`, `PROPERTIES`/image_INDEX.vnnlib and `INSTANCES`. Files of these names are overwritten.

    Args:
        model: The classifier; written in single precision, for one image at a time, (1, *input).
        certificates: The certificates; those that are not unknown are left out.
        x: The images of all certificates, (n, *input).
        folder: Made if there is none; its parent has to be there.
        timeout: Seconds that the verifier may spend on an image.

    Returns:
        The indices of the images that were written.

    Raises:
        InputError: If ``x`` has another number of images, or the certificates are of several balls or of the l2 norm,
            which VNN-LIB has no words for.
        MissingDependencyError: If the package onnx is not installed.
        ModelError: If the model cannot be run, or cannot be written as ONNX.
        ResultsError: If a file cannot be written.
    """
    if len(check_images(x)) != len(certificates):
        raise InputError(f"x: expected one image per certificate ({len(certificates)}), got {len(x)}")
    pairs = zip(certificates, x, strict=True)
    open_ones = [_Problem(c.index, c.label, image) for c, image in pairs if c.status == "unknown"]
    return _export(model, open_ones, tuple(x.shape[1:]), BoundResults.of(certificates), folder, timeout)


def export_unknown_of_log(
    model: nn.Module, data: DataSet, results: BoundResults, folder: str | Path, *, timeout: float = TIMEOUT
) -> list[int]:
    """Do the same as `export_unknown` for the rows of a log whose images are in ``data``.

    Raises:
        InputError: If the log is of several balls or of the l2 norm.
        MissingDependencyError: If the package onnx is not installed.
        ModelError: If the model cannot be run, or cannot be written as ONNX.
        ResultsError: If a file cannot be written.
    """
    rows = (results.status == "unknown").nonzero()[0]
    chosen = results.idx[rows].tolist()
    images = data.read(chosen) if chosen else ()
    problems = list(map(_Problem, chosen, results.label[rows].tolist(), images))
    return _export(model, problems, data.shape, results, folder, timeout)


def check_exportable(norm: str) -> None:
    """See whether unknown images in balls of ``norm`` could be written; for before they are known.

    Raises:
        InputError: If it is another norm than linf.
        MissingDependencyError: If the package onnx is not installed.
    """
    if norm != "linf":
        raise InputError(f"norm: VNN-LIB has words for balls of linf only, got {norm!r}")
    if find_spec("onnx") is None:
        raise MissingDependencyError("to write a network as ONNX needs onnx: pip install 'rs-plugins[onnx]'")


def vnnlib(image: Tensor, label: int, classes: int, eps: float) -> str:
    """Return the property file of one image: a verifier that finds it unsatisfiable has verified the image.

    Pixels are the variables X_0, X_1, … in the order of the flattened image, logits Y_0, Y_1, …; the ends of pixels are
    rounded outwards.

    Args:
        image: (*input), pixels in [0, 1].
        label: True class.
        classes: Number of classes.
        eps: Radius in pixels, linf.
    """
    pixels = image.detach().double().flatten().tolist()
    others = [k for k in range(classes) if k != label]
    lines = [
        f"; class {label} within {eps!r} (linf) of an image",
        *(f"(declare-const X_{place} Real)" for place in range(len(pixels))),
        *(f"(declare-const Y_{k} Real)" for k in range(classes)),
        *_box(pixels, eps),
        "(assert (or",
        *(f"    (and (>= Y_{k} Y_{label}))" for k in others),
        "))",
    ]
    return "\n".join(lines) + "\n"


def _box(pixels: Sequence[float], eps: float) -> Iterator[str]:
    down, up = (Context(prec=DIGITS, rounding=rounding) for rounding in (ROUND_FLOOR, ROUND_CEILING))
    radius, none, one = Decimal(eps), Decimal(0), Decimal(1)
    for place, pixel in enumerate(map(Decimal, pixels)):
        # a pixel that is outside [0, 1] by a rounding stays in its own box
        low = min(max(down.subtract(pixel, radius), none), down.plus(pixel))
        high = max(min(up.add(pixel, radius), one), up.plus(pixel))
        yield f"(assert (>= X_{place} {low:f}))"
        yield f"(assert (<= X_{place} {high:f}))"


def _export(
    model: nn.Module,
    problems: Sequence[_Problem],
    shape: tuple[int, ...],
    results: BoundResults,
    folder: str | Path,
    timeout: float,
) -> list[int]:
    seconds = check_positive(timeout, "timeout")
    if results.eps is None or results.norm is None:
        raise InputError("certificates: expected those of one eps and norm, got none or several")
    check_exportable(results.norm)
    copy = frozen_copy(unwrapped(model), own=True).to("cpu", torch.float32)
    classes = probe(copy, torch.full((1, *shape), 0.5))
    home = Path(folder)
    try:
        (home / PROPERTIES).mkdir(exist_ok=True, parents=home.parent.is_dir())
    except OSError as error:
        raise InputError(f"folder: {home} cannot be made ({error.strerror})") from error
    write_whole(home / MODEL, _onnx(copy, shape))
    lines = []
    for problem in problems:
        name = f"{PROPERTIES}/image_{problem.index}.vnnlib"
        write_whole(home / name, vnnlib(problem.image, problem.label, classes, results.eps).encode())
        lines.append(f"{MODEL},{name},{seconds:g}\n")
    write_whole(home / INSTANCES, "".join(lines).encode())
    return [problem.index for problem in problems]


def _onnx(model: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Return ``model`` as ONNX, by the exporter that traces: the newer one writes operators that verifiers lack."""
    options: dict[str, Any] = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    file: Any = io.BytesIO()  # not all versions say that they take it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is the older one, and what tracing may miss
            torch.onnx.export(
                model,
                (torch.full((1, *shape), 0.5),),
                file,
                input_names=["X"],
                output_names=["Y"],
                opset_version=OPSET,
                **options,
            )
    except RSPluginsError:
        raise
    except Exception as error:  # of many kinds, torch's own and the model's
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ModelError(f"model: it cannot be written as ONNX ({reason})") from error
    content: bytes = file.getvalue()
    return content
