"""What may be done with somebody else's model: look at it, run it in eval mode, and leave it as it was."""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.errors import InputError, ModelError

# What models raise at inputs that they were not made for; running out of memory is not among it.
_MISUSE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_IN_PLACE = "model: it changes its input in place; let it work on a copy (x = x.clone())"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class NoisyModule(nn.Module):
    """A module that adds noise by itself."""


class SelectiveModule(nn.Module):
    """A module that runs parts of itself on some images of a batch only.

    Which images these are decides how large such a pass is, and so how it rounds: the neighbours have a say. Where
    ``selective`` is False it runs everything on the whole batch.
    """

    selective: bool = True


class UnseenModule(nn.Module):
    """A module whose working torch cannot see; it is known by its ``name``, one line of text."""

    name: str


def check_noiseless(model: nn.Module, name: str) -> nn.Module:
    """Return ``model`` if it is a module and none of its parts adds noise.

    Raises:
        InputError: Otherwise.
    """
    if not isinstance(model, nn.Module):
        advice = "; pass its base_model" if hasattr(model, "base_model") else ""
        raise InputError(f"{name}: expected a torch.nn.Module, got {type(model).__name__}{advice}")
    noisy = [type(part).__name__ for part in model.modules() if isinstance(part, NoisyModule)]
    if noisy:
        got = noisy[0] if isinstance(model, NoisyModule) else f"{type(model).__name__} with a {noisy[0]} inside"
        raise InputError(f"{name}: expected a base classifier, got a {got}; noise would be added twice")
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put ``model`` into eval mode, and every submodule back into its own mode afterwards, also after an exception."""
    with modes_restored(model):
        model.eval()
        yield model


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Put every submodule of ``model`` back into its own mode afterwards, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def whole_batches(model: nn.Module) -> Iterator[None]:
    """Let every `SelectiveModule` in ``model`` run all of itself on all images inside the block."""
    parts = [part for part in model.modules() if isinstance(part, SelectiveModule) and part.selective]
    for part in parts:
        part.selective = False
    try:
        yield
    finally:
        for part in parts:
            del part.selective  # which uncovers that of the class


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of ``model`` ask for a gradient; afterwards each does as before, also after an exception."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def device_and_dtype(
    model: nn.Module, device: torch.device | str | None = None, name: str = "device"
) -> tuple[torch.device, torch.dtype]:
    """Return where ``model`` computes and in which floating-point type; ``name`` is what the caller calls ``device``.

    Raises:
        InputError: If ``model`` has neither parameters nor buffers and ``device`` is not given, or if ``device`` names
            another device than the model's.
    """
    tensors = list(chain(model.parameters(), model.buffers()))
    floating = [t for t in tensors if t.is_floating_point()]
    dtype = floating[0].dtype if floating else torch.float32
    if not tensors:
        if device is None:
            raise InputError(
                f"model: it has no parameters or buffers, so its device is unknown; pass {name}='cpu' (or another)"
            )
        return _computing(check_device(device, name), name), dtype
    home = _computing((floating or tensors)[0].device, "model")
    if device is not None and not _same_device(check_device(device, name), home):
        raise InputError(f"{name}: expected the model's own device {home}, got {device}; move the model there first")
    return home, dtype


def _computing(device: torch.device, name: str) -> torch.device:
    if device.type == "meta":
        raise InputError(f"{name}: expected a device that computes, got 'meta'")
    return device


def check_device(device: torch.device | str, name: str = "device") -> torch.device:
    """Return ``device`` as a torch.device if this machine has it.

    Raises:
        InputError: If the name is unknown, or there is no such device here.
    """
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: expected a device of this machine, got {str(device)!r} ({reason})") from None
    return wanted


def check_logits(logits: object, n: int, classes: int | None = None) -> Tensor:
    """Return ``logits`` if they are a floating-point tensor (n, classes) with at least two columns.

    Raises:
        ModelError: Otherwise.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        got = f"a tensor of {logits.dtype}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"model: expected it to return floating-point logits of shape ({n}, classes), got {got}")
    if logits.layout != torch.strided or logits.is_meta:
        raise ModelError(f"model: expected an ordinary tensor of logits, got {logits.layout} on {logits.device}")
    if logits.ndim != 2 or len(logits) != n:
        raise ModelError(f"model: expected logits of shape ({n}, classes), got shape {tuple(logits.shape)}")
    if logits.shape[1] < 2:
        raise ModelError(
            f"model: expected at least 2 columns of logits, got {logits.shape[1]}; "
            "turn a one-output model into two columns (-z, z)"
        )
    if classes is not None and logits.shape[1] != classes:
        raise ModelError(f"model: expected {classes} columns of logits, got {logits.shape[1]}")
    return logits


@contextmanager
def check_unchanged(batch: Tensor) -> Iterator[None]:
    """Look whether ``batch`` is changed in place inside the block; costs nothing, but cannot see inference tensors.

    Raises:
        ModelError: If it is.
    """
    before = None if batch.is_inference() else batch._version
    yield
    if before is not None and batch._version != before:
        raise ModelError(_IN_PLACE)


class Unchanged:
    """Sees whether weights of a model were changed in place since it was made, also through others that share them.

    It looks at torch's counters of such changes, which costs next to nothing; ``.data`` goes past them.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._state()

    def check(self) -> None:
        """Look.

        Raises:
            ModelError: If a weight was changed, or put in another's place.
        """
        now = self._state()
        if now != self._before:
            names = [name for name in now if now[name] != self._before.get(name)]
            raise ModelError(
                f"model: its weights ({names[0]}) were changed while it was in use, maybe by training another that "
                "shares them; let it work on a copy"
            )

    def _state(self) -> dict[str, tuple[int, int]]:
        found = self._model.named_parameters()
        return {name: (id(value), 0 if value.is_inference() else value._version) for name, value in found}


def probe(model: nn.Module, image: Tensor, classes: int | None = None) -> int:
    """Run ``model`` once on ``image`` (1, *input) and return its number of classes.

    Raises:
        ModelError: If it cannot be run on that shape, changes its input, or does not return logits (1, classes)
            without NaN.
    """
    image = image.detach().clone()
    before = image.clone()
    with evaluating(model), torch.no_grad(), check_unchanged(image):
        try:
            logits = model(image)
        except ModelError:
            raise
        except _MISUSE as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"model: it fails on an input of shape {tuple(image.shape)}: {reason}") from error
    if not torch.equal(image, before):  # by way of NumPy or .data, which no counter of torch sees
        raise ModelError(_IN_PLACE)
    logits = check_logits(logits, len(image), classes)
    if bool(logits.isnan().any()):
        raise ModelError("model: it returns NaN logits on a clean image; nothing it says can be certified")
    return logits.shape[1]


def digest(model: nn.Module) -> str:
    """Return a SHA-256 over the architecture's printed form, parameters and buffers, as 64 hexadecimal digits.

    Buffers that are not persistent count; addresses in the printed form do not. The working of an `UnseenModule` cannot
    be seen: the digits then come after the names of those. `rs_plugins.core.identity.identity` covers more.
    """
    sha = hashlib.sha256(without_addresses(repr(model)).encode())
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()], key=itemgetter(0)):
        sha.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    unseen = [f"black box {part.name}, " for part in model.modules() if isinstance(part, UnseenModule)]
    return "".join(unseen) + sha.hexdigest()


def without_addresses(text: str) -> str:
    """Return a printed form without the addresses of objects, which are others in every process."""
    return _ADDRESS.sub("", text)


def _same_device(wanted: torch.device, home: torch.device) -> bool:
    return wanted.type == home.type and (wanted.index is None or wanted.index == home.index)


class Holder(nn.Module):
    """Calls ``model``: what torch.fx follows, so that constants which it finds are not hung into the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Return what the model returns."""
        return self.model(x)
