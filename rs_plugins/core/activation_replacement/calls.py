"""What counts as a call of ReLU, what only looks like one, and how both are counted while a model runs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CAP = (0.0, 6.0)  # the ends of ReLU6, which is a hardtanh


class _Function(NamedTuple):
    """A function that is ReLU, or may be: its name, whether it works in place, what follows its first argument."""

    name: str
    in_place: bool = False
    options: tuple[str, ...] = ("inplace",)


_ENDS = ("min_val", "max_val", "inplace")
RELU: dict[Any, _Function] = {
    functional.relu: _Function("torch.nn.functional.relu"),
    functional.relu6: _Function("torch.nn.functional.relu6"),
    functional.hardtanh: _Function("torch.nn.functional.hardtanh(0, 6)", False, _ENDS),
    functional.hardtanh_: _Function("torch.nn.functional.hardtanh_(0, 6)", True, _ENDS),
    torch.relu: _Function("torch.relu"),
    torch.relu_: _Function("torch.relu_", True),
    torch.Tensor.relu: _Function("Tensor.relu"),
    torch.Tensor.relu_: _Function("Tensor.relu_", True),
    "relu": _Function("Tensor.relu"),  # the names that torch.fx has for methods
    "relu_": _Function("Tensor.relu_", True),
}
_CAPPED_NAMES = [known.name for known in RELU.values() if "6" in known.name]
_FUSED_NAMES: dict[Any, str] = {torch.rnn_relu: "torch.rnn_relu", torch.rnn_relu_cell: "torch.rnn_relu_cell"}
_SECOND = {  # of functions that may be ReLU: what their second argument is called
    "clamp": "min",
    "clip": "min",
    "clamp_min": "min",
    "maximum": "other",
    "fmax": "other",
    "max": "other",
    "threshold": "threshold",
    "hardtanh": "min_val",
}
_OF_TWO_TENSORS = ("maximum", "fmax", "max")


class ReluCall(NamedTuple):
    """A call of ReLU or ReLU6.

    Attributes:
        operand: What it is called with: a tensor, or what stands for one.
        name: Of the function.
        in_place: Whether the operand is to hold the result, too.
        capped: Whether it is ReLU6.
    """

    operand: Any
    name: str
    in_place: bool
    capped: bool


def is_relu(module: object) -> bool:
    """Return whether a module computes ReLU or ReLU6: torch's own, or a subclass with the same ``forward``."""
    if not isinstance(module, nn.ReLU | nn.Hardtanh) or "forward" in vars(module):
        return False
    kind = nn.ReLU if isinstance(module, nn.ReLU) else nn.Hardtanh
    return type(module).forward is kind.forward and (kind is nn.ReLU or is_capped(module))


def is_capped(module: object) -> bool:
    """Return whether a module is ReLU6, under whatever name."""
    return isinstance(module, nn.Hardtanh) and (module.min_val, module.max_val) == CAP


def is_capped_name(name: str) -> bool:
    """Return whether the function of that name, as `ReluCall` has it, is ReLU6."""
    return name in _CAPPED_NAMES


def relu_call(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ReluCall | None:
    """Return what a call of a function, or of the method of that name, has to do with ReLU; None if nothing."""
    known = RELU.get(function)
    if known is None:
        return None
    given = dict(zip(("input", *known.options), args, strict=False))
    given.update(kwargs)
    if known.options == _ENDS and (given.get("min_val", -1), given.get("max_val", 1)) != CAP:
        return None
    operand = given["input"]
    if isinstance(operand, Tensor) and not operand.is_floating_point():
        return None
    return ReluCall(operand, known.name, known.in_place or bool(given.get("inplace")), is_capped_name(known.name))


def look_alike(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Return the name of a call that computes max(z, 0), or a capped form, without being called ReLU; else None."""
    name = str(getattr(function, "__name__", "")).strip("_")
    if name not in _SECOND:
        return None
    second = args[1] if len(args) > 1 else kwargs.get(_SECOND[name])
    if name in _OF_TWO_TENSORS:
        zero = isinstance(second, Tensor) and (_is_zero(second) or _is_zero(args[0] if args else kwargs["input"]))
        return f"{name}(z, 0)" if zero else None
    if not _is_zero(second) or (name == "threshold" and (args[2] if len(args) > 2 else kwargs.get("value")) != 0):
        return None
    return f"{name}({'' if name in ('threshold', 'clamp_min') else _SECOND[name] + '='}0)"


def _is_zero(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and not bool(value.any())
    return isinstance(value, int | float) and value == 0


class CallCounter(TorchFunctionMode):
    """Counts calls of ReLU by the name of the function, outside of the modules that were put in ReLU's place.

    Attributes:
        relu: Calls of ReLU, by name.
        similar: Calls that look like ReLU, by name.
        replaced: Calls of modules in the place of ReLU.
        every: Calls of ReLU, also of integers and inside those modules.
        inside: Calls of ReLU and ReLU6 inside those modules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relu: Counter[str] = Counter()
        self.similar: Counter[str] = Counter()
        self.replaced = self.every = self.inside = self._depth = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the call and make it."""
        kwargs = kwargs or {}
        call = relu_call(func, args, kwargs)
        name = call.name if call is not None else _FUSED_NAMES.get(func)
        self.every += func in RELU and not is_capped_name(RELU[func].name)
        if self._depth:
            self.inside += name is not None
        elif name is not None:
            self.relu[name] += 1
        else:
            similar = look_alike(func, args, kwargs)
            self.similar.update(() if similar is None else (similar,))
        return func(*args, **kwargs)

    @contextmanager
    def outside(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Count the calls of ``modules``, and not what they call."""

        def enter(module: nn.Module, args: Any) -> None:
            self.replaced += self._depth == 0
            self._depth += 1

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._depth -= 1

        with ExitStack() as hooks:
            for module in modules:
                hooks.callback(module.register_forward_pre_hook(enter).remove)
                hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield


class KernelCounter(TorchDispatchMode):
    """Counts ReLU where torch has found out what to compute: also inside layers that torch fuses, and C++ functions.

    Attributes:
        relu: Calls of ReLU.
        fused: Transformer layers with ReLU in one kernel.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.relu = self.fused = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Of torch's base class: True would import torch's whole compiler, which takes seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note the call and make it."""
        packet = getattr(func, "overloadpacket", None)
        self.relu += packet in (torch.ops.aten.relu, torch.ops.aten.relu_)
        if packet is torch.ops.aten._transformer_encoder_layer_fwd:
            place = [argument.name for argument in func._schema.arguments].index("use_gelu")
            self.fused += not (args[place] if len(args) > place else (kwargs or {})["use_gelu"])
        return func(*args, **(kwargs or {}))
