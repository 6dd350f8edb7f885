"""A forward pass rewritten with torch.fx, so that each place that calls ReLU calls an activation of its own."""

import importlib
import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from rs_plugins.core.activation_replacement.calls import RELU, is_relu, relu_call
from rs_plugins.core.activation_replacement.running import Attributes, outputs, same, undisturbed
from rs_plugins.core.activation_replacement.surgery import Replacements, put
from rs_plugins.core.activations import ParametricSoftplus, SmoothReLU
from rs_plugins.core.models import Holder

_ROOT = "model"  # where the model hangs while it is followed: the first part of every path
_SITES = "smooth_activations"  # where activations in the place of functions hang, in the module that called them


class Untraceable(Exception):  # noqa: N818 - a reason, and not always a mistake
    """A model's forward pass cannot be rewritten; the message says why."""


class RewrittenModel(nn.Module):
    """A model with a forward pass that was written by torch.fx: its modules, its state-dict keys, other calls.

    It takes images alone. Parts that are called by themselves still run their own code, with ReLU.

    Args:
        model: What is rewritten; its modules and tensors are shared.
        code: What torch.fx made.
        literals: Tensors that the model made while it was followed, by name.
    """

    def __init__(self, model: nn.Module, code: fx.graph.PythonCode, literals: dict[str, Tensor]) -> None:
        super().__init__()
        vars(self).update(vars(model))
        vars(self).pop("forward", None)  # of its own, which torch.fx has followed
        for name, value in literals.items():
            self.register_buffer(name, value, persistent=False)
        self._source = code.src
        self._imports = {name: value.__name__ for name, value in code.globals.items() if isinstance(value, ModuleType)}
        self._names = {name: value for name, value in code.globals.items() if not isinstance(value, ModuleType)}
        self._run = self._compiled()

    def forward(self, x: Tensor) -> Any:
        """Return what the model makes of images (n, *input)."""
        return self._run(self, x)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name != "_run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._run = self._compiled()

    def _compiled(self) -> Callable[..., Any]:
        modules = {name: importlib.import_module(path) for name, path in self._imports.items()}
        scope: dict[str, Any] = {**self._names, **modules}
        exec(compile(self._source, f"<{type(self).__name__}>", "exec"), scope)
        function: Callable[..., Any] = scope["forward"]
        return function


def rewrite(model: nn.Module, images: Tensor, replacements: Replacements) -> RewrittenModel:
    """Return ``model`` with an activation of its own for each place that calls ReLU, as module or as function.

    Args:
        model: Is changed and partly shared by the result: hand in a copy.
        images: (n, *input), n >= 2; to see that the rewritten forward pass is the model's own.
        replacements: What makes the activations, and keeps the account.

    Raises:
        Untraceable: If torch.fx cannot follow it, or follows only one of several ways that it may go.
    """
    tracer = _Tracer(replacements)
    _check_hooks(model, tracer)
    holder, graph = _followed(model, tracer, training=False)
    _, in_training = _followed(model, tracer, training=True)
    if graph.python_code("self").src != in_training.python_code("self").src:
        raise Untraceable("it goes another way in train mode")
    literals = {name: value for name, value in vars(holder).items() if isinstance(value, Tensor)}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr") and node.target not in literals:
            node.target = _inside(node.target)
    plain = RewrittenModel(model, graph.python_code("self"), literals)
    _check_faithful(model, plain, images)
    sites: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if _is_site(node, model):
            sites.setdefault(_place(node), []).append(node)
    for path, nodes in sites.items():
        _renew(graph, nodes, path, model, replacements)
    graph.lint()
    rewritten = RewrittenModel(model, graph.python_code("self"), literals)
    try:
        outputs(rewritten, images, training=False)
    except Exception as error:
        raise Untraceable(f"with other activations it fails: {type(error).__name__}: {error}") from error
    return rewritten


class _Tracer(fx.Tracer):
    """Does not look into activations that are in the place of ReLU already."""

    def __init__(self, replacements: Replacements) -> None:
        super().__init__()
        self._replacements = replacements

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, SmoothReLU | ParametricSoftplus) or any(m is made for made in self._replacements.modules)
        return ours or super().is_leaf_module(m, module_qualified_name)


def _followed(model: nn.Module, tracer: _Tracer, *, training: bool) -> tuple[nn.Module, fx.Graph]:
    holder = Holder(model)
    with undisturbed(model):
        before, generators = Attributes(model.train(training)), _generators()
        try:
            graph = tracer.trace(holder)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else "no reason given"
            raise Untraceable(f"torch.fx cannot follow it: {type(error).__name__}: {reason}") from error
        if before.changed():
            raise Untraceable("its forward pass changes its attributes or buffers")
        if _generators() != generators:
            raise Untraceable("it draws random numbers that torch.fx takes for constants")
    if any(node.target == _ROOT for node in graph.nodes):
        raise Untraceable(f"it is a {type(model).__name__}, into which torch.fx does not look")
    return holder, graph


def _generators() -> tuple[object, ...]:
    """Return the states of the global generators, without a draw: they move when somebody draws."""
    _, key, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), np.asarray(key).tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def _check_hooks(model: nn.Module, tracer: _Tracer) -> None:
    for path, module in model.named_modules():
        leaf = path and tracer.is_leaf_module(module, path)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if not leaf and any(getattr(module, name) for name in hooks):
            raise Untraceable(f"{path or type(module).__name__} has hooks, which would be lost")


def _check_faithful(model: nn.Module, rewritten: nn.Module, images: Tensor) -> None:
    for training in (False, True):
        mode = "train" if training else "eval"
        try:
            expected, got = (outputs(part, images, training=training) for part in (model, rewritten))
        except Exception as error:
            raise Untraceable(f"in {mode} mode it fails on the example: {type(error).__name__}: {error}") from error
        if not same(expected, got):
            raise Untraceable(f"in {mode} mode it computes something else than torch.fx has seen")


def _inside(path: str) -> str:
    return path.removeprefix(_ROOT).removeprefix(".")


def _is_site(node: fx.Node, model: nn.Module) -> bool:
    if node.op == "call_module":
        return is_relu(model.get_submodule(str(node.target)))
    calls = node.op in ("call_function", "call_method") and node.target in RELU
    return calls and relu_call(node.target, node.args, node.kwargs) is not None


def _place(node: fx.Node) -> str:
    """Return where the activations of a call of ReLU hang: where the module was, or below what calls the function."""
    if node.op == "call_module":
        return str(node.target)
    caller = _inside(list(node.meta["nn_module_stack"].values())[-1][0])
    return f"{caller}.{_SITES}".removeprefix(".")


def _renew(graph: fx.Graph, nodes: list[fx.Node], path: str, model: nn.Module, replacements: Replacements) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    made = [_activation(node, path, owner, model, replacements) for node in nodes]
    alone = len(made) == 1 and nodes[0].op == "call_module"
    while nodes[0].op != "call_module" and hasattr(owner, name):
        name += "_"
    new_part = made[0] if alone else nn.ModuleList(made)
    new_part.training = made[0].training
    if nodes[0].op == "call_module":
        put(model, {id(model.get_submodule(path)): new_part})
    else:
        owner.add_module(name, new_part)
    for place, node in enumerate(nodes):
        target = f"{parent}.{name}".removeprefix(".") + ("" if alone else f".{place}")
        operand = node.args[0] if node.args else node.kwargs["input"]
        with graph.inserting_before(node):
            new = graph.create_node("call_module", target, (operand,))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    replacements.sites += len(nodes)


def _activation(node: fx.Node, path: str, owner: nn.Module, model: nn.Module, replacements: Replacements) -> nn.Module:
    if node.op == "call_module":
        return replacements.instead_of(model.get_submodule(str(node.target)), path)
    call = relu_call(node.target, node.args, node.kwargs)
    assert call is not None
    where = path.removesuffix(_SITES).removesuffix(".") or type(model).__name__
    return replacements.new(where, training=owner.training, in_place=call.in_place, capped=call.capped)
