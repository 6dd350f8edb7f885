"""A model whose calls of ReLU as a function are caught while it runs, for code that cannot be rewritten."""

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from rs_plugins.core.activation_replacement.calls import relu_call
from rs_plugins.errors import ModelError


class SmoothedCalls(nn.Module):
    """A model in whose forward pass an activation takes the place of each call of ReLU as a function.

    One activation serves all those calls: a parameter that it learns is shared by them. In-place calls are written back
    to where they were made. Parts of the model that are called by themselves still use ReLU. torch.fx, and so bounds,
    do not see such activations, and this is refused. torch.compile sees some of them (not those instead of
    ``torch.relu_``), so it is kept out: the model runs as it is, and ``fullgraph=True`` fails.

    Args:
        model: The model; kept, not copied.
        activation: The activation.
    """

    def __init__(self, model: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.activation = activation
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model makes of the same arguments."""
        if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
            raise ModelError(
                "model: torch.fx does not see activations that are put in while the model runs; convert it with "
                "mechanism='fx', or write its ReLU calls as modules"
            )
        # nobody compiles who has not imported the compiler, and to do it here would take seconds
        call = torch.compiler.disable(_call) if "torch._dynamo" in sys.modules else _call
        return call(self.model, self.activation, args, kwargs)


def _call(model: nn.Module, activation: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _Replacing(activation):
        return model(*args, **kwargs)


class _Replacing(TorchFunctionMode):
    """Calls an activation where ReLU is called; inside it, ReLU is ReLU."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self._activation = activation

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        call = relu_call(func, args, kwargs)
        if call is None:
            return func(*args, **kwargs)
        if call.in_place:  # the caller may go on with the operand and ignore what is returned
            return call.operand.copy_(self._activation(call.operand.clone()))
        return self._activation(call.operand)
