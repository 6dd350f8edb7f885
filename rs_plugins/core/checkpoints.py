"""Models by name, and their weights from files of which nothing is executed."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rs_plugins.errors import InputError, ModelError

State = dict[str, Tensor]

# Keys of published checkpoints → keys of the same network on its own. They are those of Sequential(normalise, network),
# of which network may be wrapped in DataParallel.
_NETWORK = ("1.module.", "module.1.", "1.", "module.")
# What batch normalisation counts since PyTorch 0.4.1; nothing that is computed in eval mode depends on it.
_COUNTER = ".num_batches_tracked"


def make_model(target: str) -> nn.Module:
    """Return the model that the function called ``target``, ``"package.module:function"``, makes without arguments.

    Raises:
        InputError: If it cannot be imported, or is no function.
        ModelError: If it raises, or returns something else than a module.
    """
    factory = _import(target)
    try:
        model = factory()
    except Exception as error:
        raise ModelError(f"model: {target}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: expected {target}() to return a torch.nn.Module, got {type(model).__name__}")
    return model


def _import(target: str) -> Callable[[], Any]:
    name, _, attribute = target.partition(":")
    if not name or not attribute:
        raise InputError(f"model: expected PACKAGE.MODULE:FUNCTION, got {target!r}")
    if name.endswith(".py"):
        write = f"{'.'.join(Path(name).with_suffix('').parts)}:{attribute}"
        raise InputError(f"model: expected PACKAGE.MODULE:FUNCTION, got a file, {target!r}; write {write}")
    try:
        module = import_module(name)
    except Exception as error:  # a module may raise anything when imported
        raise InputError(f"model: cannot import {name}: {type(error).__name__}: {error}") from error
    try:
        factory = attrgetter(attribute)(module)
    except AttributeError:
        offers = ", ".join(item for item, value in vars(module).items() if callable(value) and item[0] != "_")
        raise InputError(f"model: {name} has no {attribute}; it offers {offers or 'nothing to call'}") from None
    if not callable(factory) or isinstance(factory, nn.Module):
        got = type(factory).__name__
        raise InputError(f"model: expected {target} to be a function that returns the model, got {got}")
    made: Callable[[], Any] = factory
    return made


def load_weights(model: nn.Module, path: str | Path, *, fixed: Iterable[str] = ()) -> None:
    """Put the weights of a safetensors or torch file into ``model``.

    The file holds a state_dict, or a dict with one as ``state_dict``. Its keys may be those of Sequential(normalise,
    network), of DataParallel, or of the network alone; ``model`` may be either. Constants of the normalisation may be
    missing in it.

    Args:
        model: Whose weights are overwritten, in place.
        path: The file.
        fixed: Names of parts of ``model`` that are not written to, as others may share their memory; the file has to
            have the same weights for them.

    Raises:
        InputError: If the file is not there, damaged or would have to be executed, its keys or shapes do not fit, or it
            has other weights for a part that is fixed; ``model`` is then as before.
    """
    state, own = read_weights(path), dict(model.state_dict())
    state = _renamed(state, own)
    missing = sorted(own.keys() - state.keys() - _optional(model))
    foreign = sorted(state.keys() - own.keys())
    if missing or foreign:
        raise InputError(f"weights: {path} does not fit the model: {_differences(missing, foreign)}")
    for key in state:
        if state[key].shape != own[key].shape:
            expected, got = tuple(own[key].shape), tuple(state[key].shape)
            raise InputError(f"weights: {path}: {key}: expected shape {expected}, got {got}")
    inside = tuple(f"{name}." for name in fixed)
    for key in sorted(key for key in state if key.startswith(inside)):
        if not _same_bits(state.pop(key), own[key]):
            raise InputError(
                f"weights: {path}: {key}: expected the same as in the model, where {key.partition('.')[0]} is frozen, "
                "got others; pass a model with the same one"
            )
    model.load_state_dict(state, strict=False)


def read_weights(path: str | Path) -> State:
    """Return the tensors of a safetensors or torch file by name, on the CPU.

    Raises:
        InputError: If the file is not there, damaged, or would have to be executed.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file it raises nothing, whatever the name
        got = f"{path} is a folder" if os.path.isdir(path) else f"there is no file {path}"
        raise InputError(f"weights: {got}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"weights: {path}: expected a safetensors file, got a damaged one ({error})") from None
    return _state_dict(path, _load_torch(path))


def _load_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's doubts about the form of what it then refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        if not _looks_pickled(path):
            raise InputError(f"weights: {path}: expected a safetensors or torch file, got neither") from None
        raise InputError(
            f"weights: {path}: expected a torch file of tensors only, got one with Python objects, which would be "
            "executed; if you trust it, load it yourself and save model.state_dict()"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"weights: {path}: expected a torch file, got a damaged one ({reason})") from None


def _looks_pickled(path: Path) -> bool:
    """Whether a file begins as a zip archive or a binary pickle does: what torch.save writes, now and formerly."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


def _state_dict(path: Path, content: object) -> State:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"weights: {path}: expected a state_dict, got {type(content).__name__} of other things")
    for key, value in content.items():
        if not isinstance(key, str):
            raise InputError(f"weights: {path}: expected names of weights, got {key!r:.80}")
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = f"{value.dtype}, {value.layout}, on {value.device}"
            raise InputError(f"weights: {path}: {key}: expected plain real numbers, got {kind}")
    return dict(content)


def _same_bits(stored: Tensor, own: Tensor) -> bool:
    """Whether it would change nothing to load ``stored`` into ``own``, which may be of another type."""
    one, other = (value.detach().to("cpu", own.dtype).contiguous().reshape(-1) for value in (stored, own))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _renamed(state: State, own: State) -> State:
    """Return ``state`` under the model's own keys, if its keys tell the same network in another wrapping."""
    if state.keys() == own.keys():
        return state
    for theirs in ("", *_NETWORK):
        for ours in ("", *_NETWORK):
            renamed = {_rewrapped(key, theirs, ours): value for key, value in state.items()}
            if len(own.keys() & renamed.keys()) == len(state):
                return renamed
    return state


def _rewrapped(key: str, theirs: str, ours: str) -> str:
    return ours + key.removeprefix(theirs) if key.startswith(theirs) else key


def _optional(model: nn.Module) -> set[str]:
    """Return the keys that a file may lack: counters, and the constants of a normalisation that comes first."""
    constants = {name for name, _ in model.named_buffers() if name.startswith("0.")}
    return {key for key in model.state_dict() if key in constants or key.endswith(_COUNTER)}


def _differences(missing: list[str], foreign: list[str]) -> str:
    parts = [
        f"{what} {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("the file lacks", missing), ("the model lacks", foreign))
        if keys
    ]
    return "; ".join(parts)
