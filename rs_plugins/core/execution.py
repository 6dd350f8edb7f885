"""How a base classifier is run: in which floating-point type and memory layout, and compiled or not.

The caller's model is never changed: where a type or a layout is asked for that it does not have, a copy is run.
"""

import copy
import warnings
from collections.abc import Callable
from itertools import chain
from types import FunctionType

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_flag
from rs_plugins.core.models import device_and_dtype, evaluating
from rs_plugins.errors import InputError, MissingDependencyError, ModelError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Runner(nn.Module):
    """A base classifier as it is run: noisy images (n, *input) in any type to logits (n, classes).

    Args:
        model: The base classifier.
        device: Only needed for a model without parameters.
        dtype: Floating-point type of a copy of the model, which is run instead; None for the model's own.
        channels_last: Whether to run a copy with the channels last in memory, on images (channels, height, width).

    Attributes:
        model: The base classifier that is run: the caller's, or the copy.
        device: Where it computes.
        dtype: The type of its input: images are rounded to it once.

    Raises:
        InputError: If an argument has an impossible value.
        ModelError: If a copy is needed and the model cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in DTYPES):
            expected = ", ".join(map(str, DTYPES))
            raise InputError(f"dtype: expected None or one of {expected}, got {dtype!r}")
        self._layout = torch.channels_last if channels_last else torch.preserve_format
        self.model = _converted(model, dtype, self._layout)
        self.device, own = device_and_dtype(self.model, device)
        self.dtype = dtype or own
        self._compiled: list[Callable[[Tensor], Tensor]] = []

    @property
    def execution(self) -> str:
        """How the model is run, in words: "eager" or "compiled", and "channels last" where it is so."""
        layout = ["channels last"] if self._layout == torch.channels_last else []
        return ", ".join(["compiled" if self._compiled else "eager", *layout])

    def forward(self, batch: Tensor) -> Tensor:
        """Return the logits of ``batch``, not compiled: what a decision is in case of doubt."""
        return self.model(self._enter(batch))  # type: ignore[no-any-return]

    def compile_(self, shape: torch.Size, *sizes: int) -> None:
        """Compile the model for passes of exactly so many images of ``shape``.

        Raises:
            MissingDependencyError: If there is no working C++ compiler.
            ModelError: If the model cannot be compiled.
        """
        try:
            with warnings.catch_warnings(), evaluating(self), torch.autocast(self.device.type, enabled=False):
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's compiler uses what torch deprecates
                self._compiled = [torch.compile(_function_of_its_own(self.model), dynamic=False)]
                for size in sizes:
                    self.compiled(torch.zeros(size, *shape, device=self.device), size)
        except Exception as error:  # the compiler's own errors are of many kinds, and so are a model's
            raise _not_compiled(error) from error

    def compiled(self, batch: Tensor, size: int) -> Tensor:
        """Return the logits of ``batch`` from the compiled model, in passes of ``size`` images filled with zeros."""
        (run,) = self._compiled
        # To the compiler, a tensor made in inference mode is of another kind, for which it would compile once more.
        with torch.inference_mode(False), torch.no_grad():
            parts = self._enter(batch).split(size)
            return torch.cat([run(self._filled(part, size))[: len(part)] for part in parts])

    def _enter(self, batch: Tensor) -> Tensor:
        return batch.to(dtype=self.dtype, memory_format=self._layout)

    def _filled(self, part: Tensor, size: int) -> Tensor:
        """Return ``part`` with ``size`` rows: for another number the model would be compiled again."""
        if len(part) == size:
            return part
        full = part.new_zeros(size, *part.shape[1:]).to(memory_format=self._layout)
        full[: len(part)] = part
        return full


def check_channels_last(channels_last: bool, images: Tensor) -> bool:
    """Return ``channels_last`` if ``images`` can be laid out so.

    Raises:
        InputError: Otherwise.
    """
    if check_flag(channels_last, "channels_last") and images.ndim != 4:
        raise InputError(
            "channels_last: expected images of shape (n, channels, height, width), "
            f"got images of shape {tuple(images.shape)}"
        )
    return bool(channels_last)


def _converted(model: nn.Module, dtype: torch.dtype | None, layout: torch.memory_format) -> nn.Module:
    """Return ``model`` in that type and layout: a copy, unless it is so already."""
    floating = [t for t in chain(model.parameters(), model.buffers()) if t.is_floating_point()]
    if layout == torch.preserve_format and (dtype is None or all(t.dtype == dtype for t in floating)):
        return model
    try:
        twin = copy.deepcopy(model)
    except Exception as error:  # whatever __deepcopy__ of somebody's module may raise
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"model: dtype and channels_last need a copy of it, which failed ({reason})") from error
    twin = twin if dtype is None else twin.to(dtype=dtype)
    return twin if layout == torch.preserve_format else twin.to(memory_format=layout)  # type: ignore[call-overload]


def _function_of_its_own(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return ``model`` as a function with a code object of its own.

    torch compiles one code object for a handful of cases and then falls back to no compilation; that of a module's call
    would be shared by all models of the process.
    """

    def run(batch: Tensor) -> Tensor:
        return model(batch)  # type: ignore[no-any-return]

    return FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)


def _not_compiled(error: Exception) -> Exception:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "InvalidCxxCompiler" in f"{type(error).__name__} {error!r} {error.__cause__!r}":
        return MissingDependencyError(
            f"compile: torch.compile needs a C++ compiler on a CPU, and none works ({reason}); install g++ or clang, "
            "or leave compile=False"
        )
    return ModelError(f"compile: the model cannot be compiled ({type(error).__name__}: {reason}); leave compile=False")
