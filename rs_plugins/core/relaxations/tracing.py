"""Follows a model's forward pass with torch.fx, once: which calls it makes, of what, with results of which shape."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.models import Holder, check_noiseless, evaluating, probe
from rs_plugins.core.relaxations.activations import activation_of
from rs_plugins.core.streams import stream
from rs_plugins.errors import ModelError

IMAGES = 3  # the batch that is sent through; no reshape meets it by chance
_ROOT = "model"  # where the model hangs while it is traced: the first part of every path


@dataclass(frozen=True)
class Site:
    """A call in the model whose result depends on the input.

    Attributes:
        node: The call.
        values: What each node returned for a batch of `IMAGES`.
        moving: The nodes that depend on the input.
        module: What is called, if it is a module.
        model: The whole.
    """

    node: fx.Node
    values: Mapping[fx.Node, Any] = field(repr=False)
    moving: Mapping[fx.Node, None] = field(repr=False)
    module: nn.Module | None
    model: nn.Module = field(repr=False)

    @property
    def path(self) -> str:
        """The path of the module that is called, or of the one whose forward pass calls a function."""
        stack = self.node.meta.get("nn_module_stack", {})
        path = str(self.node.target) if self.module is not None else next(reversed(stack), "")
        return path.removeprefix(_ROOT).removeprefix(".")

    @property
    def where(self) -> str:
        """Path and type, for messages."""
        target = self.node.target
        what = f"method {target}" if isinstance(target, str) else str(getattr(target, "__name__", target))
        what = what if self.module is None else type(self.module).__name__
        return f"{self.path} ({what})" if self.path else what

    @property
    def source(self) -> Any:
        """The module, the function, or the name of the method."""
        return self.node.target if self.module is None else self.module

    @property
    def args(self) -> tuple[Any, ...]:
        """What is called with: nodes where that is tensors, values where it is numbers."""
        args: tuple[Any, ...] = fx.node.map_arg(self.node.args, self._known)
        return args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The same by keyword."""
        kwargs: dict[str, Any] = fx.node.map_arg(dict(self.node.kwargs), self._known)
        return kwargs

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """Nodes that are called with and depend on the input."""
        return tuple(node for node in self.node.all_input_nodes if node in self.moving)

    def is_moving(self, argument: object) -> bool:
        """Return whether ``argument`` is a node that depends on the input."""
        return isinstance(argument, fx.Node) and argument in self.moving

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """Return the shape of what a node, by default this one, returns; without the batch."""
        return tuple(self.values[self.node if node is None else node].shape[1:])

    def refuse(self, reason: str) -> ModelError:
        """Return the error that says why this call cannot be bounded."""
        return ModelError(f"model: {self.where}: {reason}")

    def _known(self, node: fx.Node) -> Any:
        return node if isinstance(self.values[node], Tensor) else self.values[node]


@dataclass(frozen=True)
class Reference:
    """Stands for the tensor of that name among arguments; torch.fx would look into a tuple."""

    name: str


class Constant(NamedTuple):
    """A tensor of the model that does not depend on its input, as the call that makes it."""

    name: str
    op: str
    target: Any
    args: Any
    kwargs: Any


@dataclass(frozen=True)
class Trace:
    """What a model does.

    Attributes:
        sites: Calls whose result depends on the input, in order; the last one makes the logits.
        input: The node that stands for the images.
        constants: What else they need, in order.
        literals: Tensors that the model made while it ran, by name.
        logits: Of the batch that was sent through.
        images: That batch.
    """

    sites: tuple[Site, ...]
    input: fx.Node
    constants: tuple[Constant, ...]
    literals: Mapping[str, Tensor]
    logits: Tensor
    images: Tensor


def trace(model: nn.Module, shape: tuple[int, ...]) -> Trace:
    """Follow ``model`` in eval mode on images of ``shape``; it is left as it was.

    Raises:
        InputError: If it is no module.
        ModelError: If it fails on such images, has hooks, uses values after they were changed in place, or torch.fx
            cannot follow it.
    """
    check_noiseless(model, "model")
    _check_hooks(model)
    images = _images(model, shape)
    probe(model, images[:1])
    holder = Holder(model)
    with evaluating(model), torch.inference_mode(mode=False), torch.no_grad():
        graph = _follow(holder, model)
        runner = _Runner(holder, graph, model)
        runner.run(images.clone())
        logits = model(images.clone())
    (output,) = (node for node in graph.nodes if node.op == "output")
    return _trace(model, runner.env, output.args[0], logits, images, vars(holder))


def evaluate(constants: tuple[Constant, ...], literals: Mapping[str, Tensor], root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that do not depend on the input, by name; parameters are looked up now, from ``root``."""
    known: dict[str, Tensor] = {}

    def value(argument: Any) -> Any:
        return known[argument.name] if isinstance(argument, Reference) else argument

    for constant in constants:
        args, kwargs = (fx.node.map_aggregate(part, value) for part in (constant.args, constant.kwargs))
        known[constant.name] = _result(constant, args, kwargs, literals, root)
    return known


def _result(constant: Constant, args: Any, kwargs: Any, literals: Mapping[str, Tensor], root: nn.Module) -> Any:
    if constant.op == "get_attr":
        return literals[constant.target] if constant.target in literals else _attribute(root, constant.target)
    if constant.op == "call_method":
        return getattr(args[0], constant.target)(*args[1:], **kwargs)
    function = root.get_submodule(constant.target) if constant.op == "call_module" else constant.target
    return function(*args, **kwargs)


def _attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _Runner(fx.Interpreter):
    """Runs the calls one by one, and sees when a value is used that was changed in place after it was computed."""

    def __init__(self, holder: Holder, graph: fx.Graph, model: nn.Module) -> None:
        super().__init__(fx.GraphModule(holder, graph), garbage_collect_values=False)
        self.extra_traceback = False  # which would be put into the message
        self._model = model
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for before in n.all_input_nodes:
            if _version(self.env[before]) != self._versions[before]:
                site = Site(n, self.env, {}, _module(self._model, n), self._model)
                raise site.refuse("expected values as they were computed, got a tensor that was changed in place since")
        value = super().run_node(n)
        self._versions[n] = _version(value)
        return value


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, Normalise) or activation_of(m) is not None
        return known or super().is_leaf_module(m, module_qualified_name)


def _follow(holder: nn.Module, model: nn.Module) -> fx.Graph:
    try:
        return _Tracer().trace(holder)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ModelError(
            f"model: torch.fx cannot follow the forward pass of {type(model).__name__}, as where it branches on values "
            f"or shapes: {type(error).__name__}: {reason}"
        ) from error


def _trace(
    model: nn.Module, values: Mapping[fx.Node, Any], last: fx.Node, logits: Tensor, images: Tensor, made: dict[str, Any]
) -> Trace:
    needed = _ancestors(last)
    nodes = [node for node in values if node in needed]
    moving: dict[fx.Node, None] = {}
    for node in nodes:
        depends = node.op == "placeholder" or any(before in moving for before in node.all_input_nodes)
        if depends and _holds_tensors(values[node]):
            moving[node] = None
    sites = [Site(node, values, moving, _module(model, node), model) for node in moving if node.op != "placeholder"]
    rest = [node for node in nodes if node not in moving and _holds_tensors(values[node])]
    constants = tuple(_constant(node, values) for node in rest)
    literals = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    first = next(node for node in moving if node.op == "placeholder")
    return Trace(tuple(sites), first, constants, literals, logits, images)


def _ancestors(last: fx.Node) -> set[fx.Node]:
    found, new = {last}, [last]
    while new:
        before = [node for node in new.pop().all_input_nodes if node not in found]
        found.update(before)
        new.extend(before)
    return found


def _module(model: nn.Module, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return model.get_submodule(str(node.target).removeprefix(_ROOT).removeprefix("."))


def _constant(node: fx.Node, values: Mapping[fx.Node, Any]) -> Constant:
    def known(before: fx.Node) -> Any:
        return Reference(before.name) if _holds_tensors(values[before]) else values[before]

    args, kwargs = (fx.node.map_arg(part, known) for part in (node.args, dict(node.kwargs)))
    return Constant(node.name, node.op, node.target, args, kwargs)


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _check_hooks(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"{name} ({type(module).__name__})" if name else type(module).__name__
        if "forward" in vars(module):
            raise ModelError(
                f"model: {where}: it has a forward of its own instead of that of its class, which bounds cannot see"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise ModelError(
                f"model: {where}: it has forward hooks, which bounds cannot see through; remove them (pruning: "
                "torch.nn.utils.prune.remove; weight norms: torch.nn.utils.parametrizations has forms without)"
            )


def _images(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    found = next((t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()), torch.zeros(0))
    pixels = torch.rand(IMAGES, *shape, generator=stream(0, "tracing"), dtype=torch.float64)
    return pixels.to(found.device, found.dtype)
