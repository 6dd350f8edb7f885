"""Saving and loading a classifier: weights as safetensors, settings as JSON in their header, nothing of it executed.

The state of an optimiser is in a file of torch's beside it, of which only tensors and plain values are read.
"""

import json
import os
from pathlib import Path
from typing import Any

import art
import numpy as np
import torch
from art import config
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

import rs_plugins
from rs_plugins.core.files import whole
from rs_plugins.core.models import digest
from rs_plugins.errors import InputError, ModelError

_FORMAT = "rs-plugins smoothed classifier 1"


def stem(filename: str, path: str | None) -> Path:
    """Return the path without ending of ``filename`` in the folder ``path``, ART's data folder if it is None."""
    return Path(os.fspath(config.ART_DATA_PATH if path is None else path)) / filename.removesuffix(".safetensors")


def save_classifier(stem: Path, model: nn.Module, settings: dict[str, Any], optimizer: Any) -> None:
    """Write ``<stem>.safetensors`` and, if there is an optimiser, ``<stem>.optimizer.pt``.

    Args:
        stem: Path without ending; missing folders are made.
        model: The base model, whose weights are written.
        settings: What else is needed to build the classifier again; JSON.
        optimizer: A torch optimiser, of which the state is written, or None.

    Raises:
        ResultsError: If a file cannot be written; one of that name is then as it was.
    """
    os.makedirs(stem.parent, exist_ok=True)
    header = {"format": _FORMAT, "settings": settings, "digest": digest(model), "versions": _versions()}
    with whole(_weights(stem)) as draft:
        save_model(model, str(draft), metadata={"rs-plugins": json.dumps(header)})
    if optimizer is not None:
        with whole(_optimizer(stem)) as draft:
            torch.save(optimizer.state_dict(), draft)


def read_settings(stem: Path) -> dict[str, Any]:
    """Return the settings that `save_classifier` wrote.

    Raises:
        InputError: If there is no such file, or another program wrote it.
    """
    settings = _header(stem)["settings"]
    if not isinstance(settings, dict):
        raise InputError(f"filename: expected settings in {_weights(stem)}, got {type(settings).__name__}")
    return settings


def load_weights(stem: Path, model: nn.Module, optimizer: Any) -> None:
    """Put the saved weights into ``model``, in place, and the saved state into ``optimizer`` unless it is None.

    Raises:
        InputError: If a file is missing or was written by another program.
        ModelError: If ``model`` has another architecture than the one saved.
    """
    header = _header(stem)
    try:
        load_model(model, str(_weights(stem)))
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(f"model: expected the architecture that was saved: {error}") from error
    if digest(model) != header["digest"]:
        raise ModelError(
            "model: its weights fit, but it is not the architecture that was saved: its printed form differs "
            f"(saved with {header['versions']}; this is {_versions()})"
        )
    if optimizer is not None:
        if not _optimizer(stem).is_file():
            raise InputError(f"filename: expected the optimiser's state in {_optimizer(stem)}, which does not exist")
        try:
            optimizer.load_state_dict(torch.load(_optimizer(stem), map_location="cpu", weights_only=True))
        except Exception as error:  # a damaged file can raise anything
            raise InputError(
                f"filename: expected the optimiser's state in {_optimizer(stem)}, got something else ({error})"
            ) from error


def _header(stem: Path) -> dict[str, Any]:
    path = _weights(stem)
    if not path.is_file():
        raise InputError(f"filename: expected a saved classifier, but {path} does not exist; path= names the folder")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("rs-plugins", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"filename: expected a safetensors file, but {path} is none ({error})") from error
    found = header.get("format") if isinstance(header, dict) else header
    if found != _FORMAT:
        raise InputError(f"filename: expected a file of format {_FORMAT!r}, got {found!r:.80} in {path}")
    if missing := [name for name in ("settings", "digest", "versions") if name not in header]:
        raise InputError(f"filename: expected {missing[0]} in the header of {path}, which is damaged")
    return dict(header)


def _versions() -> str:
    return (
        f"rs-plugins {rs_plugins.__version__}, torch {torch.__version__}, numpy {np.__version__}, ART {art.__version__}"
    )


def _weights(stem: Path) -> Path:
    return stem.with_name(stem.name + ".safetensors")


def _optimizer(stem: Path) -> Path:
    return stem.with_name(stem.name + ".optimizer.pt")
