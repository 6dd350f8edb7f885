"""Copies of somebody else's model that share its weights, frozen or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rs_plugins.core.models import UnseenModule
from rs_plugins.errors import InputError, ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """Return ``model`` out of DataParallel, DistributedDataParallel and torch.compile's wrappers."""
    while True:
        compiled = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled, nn.Module):
            model = compiled
        else:
            return model


def frozen_copy(model: nn.Module, *, own: bool, name: str = "model") -> nn.Module:
    """Return a copy of the modules of ``model``, hooks included, in eval mode and with no parameter to learn.

    What an `UnseenModule` calls is not copied.

    Args:
        model: Stays as it was.
        own: Whether the copy has weights and buffers of its own, or those of ``model``, as long as its modules can be
            copied so.
        name: What the caller calls ``model``.

    Raises:
        InputError: If ``model`` has lazy layers without weights.
        ModelError: If it cannot be copied.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(f"{name}: expected a module that can be copied, got one of TorchScript; pass the original")
    return _copy(model, own, name).requires_grad_(False).eval()


def sharing_copy(model: nn.Module, *, name: str = "model") -> nn.Module:
    """Return a copy of the modules of ``model``, hooks included, with its very weights and buffers.

    The parameters are others in the same memory: what changes them in place changes those of ``model``, but to move or
    cast the copy does not. Modes and what asks for a gradient are as in ``model``. What an `UnseenModule` calls is not
    copied. Modules that refuse to be copied so get weights of their own.

    Args:
        model: Stays as it was.
        name: What the caller calls ``model``.

    Raises:
        InputError: If ``model`` has lazy layers without weights.
        ModelError: If it cannot be copied.
    """
    with torch.inference_mode(mode=False), torch.no_grad():
        return _copy(model, own=False, name=name)


def _copy(model: nn.Module, own: bool, name: str) -> nn.Module:
    if any(is_lazy(value) for value in chain(model.parameters(), model.buffers())):
        raise InputError(f"{name}: expected weights, got a lazy layer that has none yet; run the model once before")
    try:
        twin = deepcopy(model, _instead(model, own))
    except Exception:  # whatever __deepcopy__ of somebody's module may raise
        twin = _full_copy(model, name)
    before = {id(thing) for thing in chain(model.modules(), model.parameters())}
    for thing in chain(twin.modules(), twin.parameters()):
        if id(thing) in before:
            raise ModelError(f"{name}: its copy has the same {type(thing).__name__} in it, which would be changed")
    return twin


def _full_copy(model: nn.Module, name: str) -> nn.Module:
    try:
        return deepcopy(model, dict(_unseen(model)))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{name}: a frozen copy of it is needed, which failed ({reason})") from error


def _instead(model: nn.Module, own: bool) -> dict[int, Any]:
    """Return what a copy of ``model`` has instead of each tensor, by the tensor's id: the memo of a deep copy."""

    def alias(value: Tensor) -> Tensor:
        return value.detach().clone() if own else value.detach()

    memo = {id(value): alias(value) for value in model.buffers()}
    memo |= {id(value): nn.Parameter(alias(value), value.requires_grad) for value in model.parameters()}
    attributes = chain.from_iterable(vars(part).values() for part in model.modules())
    # results of other weights, as pruning and older weight normalisation keep them, which torch refuses to copy
    results = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    return dict(_unseen(model)) | memo | {id(value): value.detach().clone() for value in results}


def _unseen(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield what a copy has in common with ``model``: the functions of modules whose working cannot be seen."""
    for part in model.modules():
        if isinstance(part, UnseenModule):
            yield from ((id(value), value) for name, value in vars(part).items() if not name.startswith("_"))


@contextmanager
def buffers_unchanged(twin: nn.Module) -> Iterator[None]:
    """Look whether buffers, which may be somebody's, are changed in place inside the block, and put them back.

    Raises:
        ModelError: If they are.
    """
    before = [(name, value, value.clone()) for name, value in twin.named_buffers()]
    changed = []
    try:
        yield
    finally:
        for name, value, old in before:
            if not torch.equal(_bits(value), _bits(old)):
                value.copy_(old)
                changed.append(name)
    if changed:
        raise ModelError(f"model: it changes its buffer {changed[0]!r} in eval mode; nothing frozen may do so")


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().reshape(-1).view(torch.uint8)
