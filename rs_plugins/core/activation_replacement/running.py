"""Runs of a model that leave nothing behind: to compare what comes out, and to count what is called."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.activation_replacement.calls import CallCounter, KernelCounter
from rs_plugins.core.global_randomness import global_randomness
from rs_plugins.core.models import modes_restored

_SEED = 0
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5  # on GPUs, two runs of the same model may round differently


def outputs(model: nn.Module, images: Tensor, *, training: bool) -> list[Tensor]:
    """Return the tensors that ``model`` makes of ``images`` in train or eval mode; modes and buffers are put back.

    Random numbers, as of dropout, are the same at each call; the global generators are as before.
    """
    with _undisturbed(model), torch.no_grad():
        model.train(training)
        return [tensor.detach().clone() for tensor in _tensors(model(images.clone()))]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Return whether two lists of tensors are equal but for rounding; NaN equals NaN."""
    if [value.shape for value in first] != [value.shape for value in second]:
        return False
    return all(torch.allclose(a, b, _RELATIVE, _ABSOLUTE, equal_nan=True) for a, b in zip(first, second, strict=True))


def reads_what_it_handed_in(model: nn.Module, images: Tensor, in_place: Iterable[nn.Module]) -> bool:
    """Return whether the outputs of ``model`` depend on tensors after they were handed to the modules ``in_place``.

    Those are poisoned with NaN as soon as the modules have read them. Modes in which ``model`` fails do not count.
    """

    def poison(module: nn.Module, args: Any, output: Any) -> None:
        args[0].fill_(torch.nan)

    for training in (False, True):
        try:
            expected = outputs(model, images, training=training)
        except Exception:  # whatever the model may raise where it cannot be trained on two images
            continue
        with ExitStack() as hooks:
            for module in in_place:
                hooks.callback(module.register_forward_hook(poison).remove)
            try:
                found = outputs(model, images, training=training)
            except Exception:
                return True
        if not same(expected, found):
            return True
    return False


def count(model: nn.Module, images: Tensor, instead: Iterable[nn.Module], *, training: bool) -> CallCounter:
    """Return which calls ``model`` makes, where the modules ``instead`` are in the place of ReLU.

    In eval mode, what only torch's kernels show counts, too.
    """
    calls = CallCounter()
    with calls.outside(instead), calls:
        outputs(model, images, training=training)
    if training:
        return calls
    kernels = KernelCounter()
    with kernels:
        outputs(model, images, training=False)
    hidden = {"fused transformer layer": kernels.fused, "inside torch or C++": kernels.relu - calls.every}
    if not calls.relu:
        calls.relu.update({name: number for name, number in hidden.items() if number > 0})
    return calls


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with modes_restored(model), global_randomness(_SEED):
        try:
            yield
        finally:
            for buffer, value in before:
                with torch.no_grad():
                    buffer.copy_(value)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
