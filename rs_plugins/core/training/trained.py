"""A trained network in a folder: ``model.safetensors``, and ``model.json``, which says what it is. No pickles."""

import copy
import json
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from rs_plugins.core.architectures.named import NETWORKS, SIZED, make_network
from rs_plugins.core.certifying_adapters.adapted import AdaptedClassifier
from rs_plugins.core.certifying_adapters.design import AdapterDesign, adapt
from rs_plugins.core.checkpoints import load_weights, read_weights
from rs_plugins.core.checks import check_count, check_flag, check_plain, check_positive, check_seed
from rs_plugins.core.files import record_text, write_whole
from rs_plugins.errors import InputError, ModelError

WEIGHTS, RECORD = "model.safetensors", "model.json"
_OURS = {"format": "rs-plugins model"}
_MOST_VALUES = 2**24  # of an image that an adapted network is made for


@dataclass(frozen=True, eq=False)
class Trained:
    """A network and how it was trained.

    Attributes:
        model: The base classifier, in eval mode; an `AdaptedClassifier` where it has a certifying adapter.
        sigma: Standard deviation of the noise it was trained with, in pixels; None if it was trained without.
        record: What ``model.json`` says: method, network, data, seed, versions.
    """

    model: nn.Module
    sigma: float | None
    record: Mapping[str, Any]


def save_trained(folder: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Write the weights of ``model`` and its ``record``, which is plain data, into an existing folder.

    Raises:
        ResultsError: If they cannot be written.
    """
    write_whole(folder / WEIGHTS, save(plain_tensors(model.state_dict())))
    write_whole(folder / RECORD, record_text({**_OURS, **record}))


def load_trained(folder: str | Path, *, model: nn.Module | None = None, trust: bool = False) -> Trained:
    """Return the network that a training run left in ``folder``, or one of its checkpoints.

    Args:
        folder: Where ``model.safetensors`` and ``model.json`` are.
        model: A network of the same architecture, whose weights are overwritten; needed only if it was not trained by
            name. Of one with a certifying adapter either the classifier without it, which is copied, or an
            `AdaptedClassifier` with the extractor that it was trained with: what is frozen is compared and not written,
            as its memory may be that of the classifier it was made of.
        trust: Whether a function PACKAGE.MODULE:FUNCTION that ``model.json`` names may be imported and called. Without,
            nothing in the folder is executed: networks of ours, torchvision and timm are made by name.

    Raises:
        InputError: If a file is missing, damaged or of another program, the weights do not fit the network, the
            extractor is another one, or the network is made by a function and there is no ``trust``.
    """
    trust = check_flag(trust, "trust")
    if not isinstance(folder, str | os.PathLike):
        raise InputError(f"folder: expected the path of a folder, got {type(folder).__name__}")
    folder = Path(folder)
    record = read_record(folder)
    sigma = record.get("sigma", 0)
    if sigma is not None:
        sigma = check_positive(sigma, f"{folder / RECORD}: sigma")
    adapter = record.get("adapter")
    if model is not None and (adapter is None or isinstance(model, AdaptedClassifier)):
        load_into(model, folder / WEIGHTS)
        return Trained(model.eval(), sigma, record)
    stored = read_weights(folder / WEIGHTS)
    if model is None:
        network = _network(folder, record, trust=trust)
        with _making(f"{folder / RECORD}: network"):
            model = make_network(**_bounded(network, stored))
    if adapter is not None:
        with _making(f"{folder / RECORD}: adapter"):
            twin = copy.deepcopy(model).to(_floating_type(stored))  # the extractor's digits depend on the type
            model = _adapted(twin, adapter, stored)
    load_weights(model, folder / WEIGHTS)  # nobody else has its memory
    _check_extractor(model, folder, record)
    return Trained(model.eval(), sigma, record)


def load_into(model: nn.Module, path: Path) -> None:
    """Put the weights of a file into ``model``, but where that is an `AdaptedClassifier` nothing into what is frozen.

    Raises:
        InputError: If the file is missing or damaged, or does not fit, or a frozen part is another one in it.
    """
    load_weights(model, path, fixed=model.still if isinstance(model, AdaptedClassifier) else ())


def check_network(network: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return ``network`` as a dict if they are arguments of `make_network`, as plain data; their values it checks.

    Raises:
        InputError: Otherwise.
    """
    known = list(signature(make_network).parameters)
    if not isinstance(network, Mapping) or not isinstance(network.get("name"), str) or network.keys() - set(known):
        raise InputError(f"{name}: expected name, a text, and others of {', '.join(known[1:])}, got {network!r}")
    return check_plain(network, name)


def _network(folder: Path, record: Mapping[str, Any], *, trust: bool) -> dict[str, Any]:
    """Return the arguments of `make_network`, if that may be called with them."""
    place = folder / RECORD
    if record.get("network") is None:
        raise InputError(f"model: {place} does not name the network; pass one of the same architecture")
    network = check_network(record["network"], f"model: {place}: network")
    name = network["name"]
    if ":" in name and not trust:  # all other names are looked up among networks that are known
        noise = [] if record["sigma"] is None else ["--sigma", f"{record['sigma']:g}"]
        words = ["--model", name, "--weights", str(folder / WEIGHTS), *noise]
        by_hand = "" if record.get("adapter") is not None else f" ({shlex.join(words)})"
        raise InputError(
            f"model: {place} names a function, {name}, which would be imported and called; if you trust it, say "
            f"trust=True (--trust-model), or pass the network yourself, model=…{by_hand}"
        )
    return network


@contextmanager
def _making(place: str) -> Iterator[None]:
    """Say of what goes wrong while a network is made of a record where that is."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error.__cause__
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        raise InputError(f"{place}: nothing can be made of it ({type(error).__name__}: {error})") from error


def _bounded(network: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return ``network`` if a network with so many classes and channels may have the weights ``stored``."""
    if ":" not in network["name"]:  # functions are told neither
        for name, least in (("classes", 2), ("channels", 1)):
            if network.get(name) is not None:
                _check_side(network[name], name, stored, least=least)
    if network["name"] in SIZED:
        _check_values(network, sum(value.numel() for value in stored.values()))
    return network


def _check_values(network: Mapping[str, Any], stored: int) -> None:
    """Refuse a ``network`` for images of one size that has more values than are stored, before it takes memory."""
    given = {name: network[name] for name in ("size", "width") if network.get(name) is not None}
    with torch.device("meta"):
        twin = NETWORKS[network["name"]](network.get("classes", 10), network.get("channels"), **given).make()
    if (values := sum(value.numel() for value in twin.state_dict().values())) > stored:
        raise InputError(f"expected at most {stored} values, as many as {WEIGHTS} has, got a network of {values}")


def _check_side(number: Any, name: str, stored: Mapping[str, Tensor], *, least: int = 1) -> None:
    """Refuse a ``number`` that is to be a side of a weight, and is more than the sides of all that are stored.

    Otherwise a few digits in a record could ask for all memory there is.
    """
    sides = [side for value in stored.values() if value.ndim > 1 for side in value.shape]
    longest = max(sides, default=0)
    if check_count(number, name, least=least) > longest:
        raise InputError(f"{name}: expected at most {longest}, the longest side of a weight in {WEIGHTS}, got {number}")


def _adapted(model: nn.Module, adapter: object, stored: Mapping[str, Tensor]) -> AdaptedClassifier:
    """Return ``model`` with the certifying adapter that ``adapter`` describes: an `AdapterDesign`, shape and seed."""
    known = [field.name for field in fields(AdapterDesign)]
    if not isinstance(adapter, Mapping) or not {"shape"} <= adapter.keys() <= {*known, "shape", "seed"}:
        raise InputError(f"expected shape and others of {', '.join(known)}, seed, got {adapter!r}")
    settings = {name: adapter[name] for name in known if name in adapter}
    design = AdapterDesign(**settings | {"sites": _sites(adapter.get("sites", []), most=len(stored))})
    if design.hidden is not None and design.kind != "image":
        _check_side(design.hidden, "hidden", stored)
    try:
        return adapt(model, _shape(adapter["shape"]), design, seed=check_seed(adapter.get("seed", 0)))
    except ModelError as error:
        raise InputError(f"{error}") from error.__cause__


def _floating_type(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the type of the first floating-point tensor of an extractor, or None."""
    extractor = (value for key, value in state.items() if key.startswith("extractor."))
    return next((value.dtype for value in extractor if value.is_floating_point()), None)


def _check_extractor(model: nn.Module, folder: Path, record: Mapping[str, Any]) -> None:
    """Refuse weights of another extractor than the one that the certifying adapter was trained with."""
    expected = record.get("extractor")
    if isinstance(model, AdaptedClassifier) and expected not in (None, model.extractor_fingerprint()):
        raise InputError(
            f"model: {folder}: {WEIGHTS} has another extractor than the one that {RECORD} tells of, or that is printed "
            f"otherwise by other versions (written with {record.get('versions')}); pass the adapted network, model=…"
        )


def _shape(shape: object) -> tuple[int, ...]:
    sides = tuple(check_count(side, "shape") for side in shape) if isinstance(shape, list) else ()
    if not sides or math.prod(sides) > _MOST_VALUES:
        raise InputError(f"shape: expected that of an image, such as [3, 32, 32], got {shape!r}")
    return sides


def _sites(sites: object, *, most: int) -> list[str]:
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise InputError(f"sites: expected a list of names, got {sites!r}")
    if len(sites) > most:
        raise InputError(f"sites: expected at most {most}, the number of tensors in {WEIGHTS}, got {len(sites)}")
    return sites


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``model.json`` says.

    Raises:
        InputError: If there is none, or it is of another program.
    """
    place = folder / RECORD
    try:
        record = json.loads(place.read_text(encoding="utf-8"))
    except OSError as error:
        at = folder / "checkpoints"
        places = sorted(at.glob("epoch-*")) if os.path.isdir(at) else []
        advice = f"; its training has not ended, a checkpoint is {places[-1]}" if places else ""
        expected = f"expected a folder with {RECORD} and {WEIGHTS}, got {folder} ({error.strerror})"
        raise InputError(f"model: {expected}{advice}") from None
    except (ValueError, RecursionError):
        raise InputError(f"model: {place} is damaged") from None
    if not isinstance(record, dict) or not _OURS.items() <= record.items():
        raise InputError(f"model: {place} was not written by rs-plugins")
    return record


def plain_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU that share no memory, in the plain order of memory: what safetensors takes."""
    return {
        key: value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for key, value in state.items()
    }
