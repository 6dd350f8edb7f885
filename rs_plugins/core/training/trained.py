"""A trained network in a folder: ``model.safetensors``, and ``model.json``, which says what it is. No pickles."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rs_plugins.core.architectures.named import make_network
from rs_plugins.core.checkpoints import load_weights
from rs_plugins.core.checks import check_positive
from rs_plugins.core.results_writer import record_text, write_whole
from rs_plugins.errors import InputError

WEIGHTS, RECORD = "model.safetensors", "model.json"
_OURS = {"format": "rs-plugins model"}


@dataclass(frozen=True, eq=False)
class Trained:
    """A network and how it was trained.

    Attributes:
        model: The base classifier, in eval mode.
        sigma: Standard deviation of the noise it was trained with, in pixels.
        record: What ``model.json`` says: method, network, data, seed, versions.
    """

    model: nn.Module
    sigma: float
    record: Mapping[str, Any]


def save_trained(folder: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the weights of ``model`` and its ``record``, which is plain data, into an existing folder.

    Raises:
        ResultsError: If they cannot be written.
    """
    write_whole(folder / WEIGHTS, save(plain_tensors(model.state_dict())))
    write_whole(folder / RECORD, record_text({**_OURS, **record}))


def load_trained(folder: str | Path, *, model: nn.Module | None = None) -> Trained:
    """Return the network that a training run left in ``folder``, or one of its checkpoints.

    Args:
        folder: Where ``model.safetensors`` and ``model.json`` are.
        model: A network of the same architecture, whose weights are overwritten; needed only if it was not trained by
            name.

    Raises:
        InputError: If a file is missing, damaged or of another program, or the weights do not fit the network.
    """
    folder = Path(folder)
    record = read_record(folder)
    sigma = check_positive(record.get("sigma", 0), f"{folder / RECORD}: sigma")
    if model is None:
        if not isinstance(record.get("network"), dict):
            raise InputError(f"model: {folder / RECORD} does not name the network; pass one of the same architecture")
        model = make_network(**record["network"])
    load_weights(model, folder / WEIGHTS)
    return Trained(model.eval(), sigma, record)


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``model.json`` says.

    Raises:
        InputError: If there is none, or it is of another program.
    """
    place = folder / RECORD
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"model: expected a folder with {RECORD} and {WEIGHTS}, got {folder} ({error})") from None
    except ValueError:
        raise InputError(f"model: {place} is damaged") from None
    if not isinstance(record, dict) or not _OURS.items() <= record.items():
        raise InputError(f"model: {place} was not written by rs-plugins")
    return record


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU that share no memory, in the plain order of memory: what safetensors takes."""
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, value in state.items()
    }
