"""Runs of a model that leave nothing behind: to compare what comes out, and to count what is called."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.activation_replacement.calls import CallCounter, KernelCounter
from rs_plugins.core.global_randomness import global_randomness

_SEED = 0
_RELATIVE, _ABSOLUTE = 1e-3, 1e-5  # on GPUs, two runs of the same model may round differently


def outputs(model: nn.Module, images: Tensor, *, training: bool) -> list[Tensor]:
    """Return the tensors that ``model`` makes of ``images`` in train or eval mode; it is put back as it was.

    Random numbers, as of dropout, are the same at each call; the global generators are as before.
    """
    with undisturbed(model), torch.no_grad():
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

    def poison(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        (args[0] if args else kwargs["input"]).fill_(torch.nan)

    for training in (False, True):
        try:
            expected = outputs(model, images, training=training)
        except Exception:  # whatever the model may raise where it cannot be trained on two images
            continue
        with ExitStack() as hooks:
            for module in in_place:
                hooks.callback(module.register_forward_hook(poison, with_kwargs=True).remove)
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


def called_again(model: nn.Module, images: Tensor) -> int:
    """Return how often a backward pass in train mode calls ReLU: checkpointing runs parts of ``model`` again.

    No gradients are left. What cannot be differentiated calls none.
    """
    kernels = KernelCounter()
    with undisturbed(model), torch.enable_grad(), suppress(Exception):
        model.train()
        pixels = images.clone().requires_grad_()
        results = [tensor for tensor in _tensors(model(pixels.clone())) if tensor.requires_grad]
        with kernels:
            torch.autograd.backward(results, [torch.ones_like(tensor) for tensor in results])
    model.zero_grad()
    return kernels.relu


class Attributes:
    """What the modules of a model keep beside parameters: modes, buffers, and all else that is assigned to them.

    Args:
        model: The model, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = [(part, dict(vars(part)), dict(part._buffers)) for part in model.modules()]
        self._values = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def changed(self) -> bool:
        """Return whether anything was assigned since, or a buffer was changed in place."""
        kept = [(vars(part), old) for part, old, _ in self._parts] + [(p._buffers, old) for p, _, old in self._parts]
        assigned = any(now.keys() != old.keys() or any(now[name] is not old[name] for name in old) for now, old in kept)
        return assigned or not all(torch.allclose(*pair, 0, 0, equal_nan=True) for pair in self._values)

    def put_back(self) -> None:
        """Undo it."""
        for part, attributes, buffers in self._parts:
            for now, old in ((vars(part), attributes), (part._buffers, buffers)):
                now.clear()
                now.update(old)
        with torch.no_grad():
            for buffer, value in self._values:
                buffer.copy_(value)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put modes, buffers, attributes and the global generators back afterwards; random numbers are known inside."""
    before = Attributes(model)
    with global_randomness(_SEED):
        try:
            yield
        finally:
            before.put_back()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, Iterable) and not isinstance(value, str):
        for part in value:
            yield from _tensors(part)
