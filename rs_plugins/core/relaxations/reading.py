"""Turns the calls of a model into layers that bounds go through, or says by name what they cannot go through."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.activations import Activation, activation_of
from rs_plugins.core.relaxations.layers import (
    Affine,
    Combination,
    Concatenation,
    Convolution,
    Diagonal,
    Dropout,
    FullyConnected,
    Reshape,
    Sum,
)
from rs_plugins.core.relaxations.normalising import BatchNormalisation, Normalisation
from rs_plugins.core.relaxations.operands import Operand, Scale, Shift
from rs_plugins.core.relaxations.pooling import MaxPool, MeanPool
from rs_plugins.core.relaxations.tracing import IMAGES, Constant, Site, trace
from rs_plugins.errors import ModelError

INPUT = "input"
SUPPORTED = (
    "Conv2d, Linear, BatchNorm1d/2d, Normalise, AvgPool2d, AdaptiveAvgPool2d, MaxPool2d, Flatten and other reshapes, "
    "means, padding, slices, concatenation, sums, constant factors, Dropout in eval mode, ReLU, LeakyReLU, Sigmoid, "
    "Tanh, Softplus, ELU, CELU, SiLU, GELU, Mish, SmoothReLU, ParametricSoftplus"
)
Layer = Affine | Activation | MaxPool
Read = tuple[Layer, tuple[fx.Node, ...]]


@dataclass(frozen=True)
class Node:
    """A layer at its place in the network.

    Attributes:
        name: Its own.
        layer: What it computes.
        inputs: Names of the nodes that it computes it of.
        shape: Of its output, without the batch.
        where: Path and type, for messages.
    """

    name: str
    layer: Layer
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    where: str

    @property
    def linear(self) -> bool:
        """Whether the layer is affine."""
        return hasattr(self.layer, "pull")


@dataclass(frozen=True)
class Network:
    """A model as layers, in the order of its forward pass.

    Attributes:
        shape: Of an image.
        nodes: From the images, which are called `INPUT`, to the logits, which are the last node.
        modules: The modules that are layers, with their paths in the model.
        constants: Calls that make the tensors which do not depend on the input.
        literals: Tensors that the model made while it ran.
        classes: Number of logits.
    """

    shape: tuple[int, ...]
    nodes: tuple[Node, ...]
    modules: tuple[tuple[str, nn.Module], ...]
    constants: tuple[Constant, ...]
    literals: Mapping[str, Tensor]
    classes: int


def read(model: nn.Module, shape: tuple[int, ...]) -> tuple[Network, Tensor]:
    """Return the layers of ``model``, and a batch of images to try them on.

    Raises:
        InputError: If it is no module.
        ModelError: If it cannot be run on images of ``shape``, or something in it is not supported.
    """
    found = trace(model, shape)
    names = {found.input: INPUT, **{site.node: site.node.name for site in found.sites}}
    nodes = []
    for site in found.sites:
        layer, inputs = _layer(site)
        nodes.append(Node(names[site.node], layer, tuple(names[node] for node in inputs), site.shape(), site.where))
    modules = tuple((site.path, site.module) for site in found.sites if site.module is not None)
    if not nodes:
        raise ModelError("model: expected at least one layer, got a model that returns its input")
    network = Network(shape, tuple(nodes), modules, found.constants, found.literals, found.logits.shape[1])
    return network, found.images


def _layer(site: Site) -> Read:
    """Return the layer of a call, and what it is called with."""
    reader = _reader(site.source)
    if reader is not None:
        return reader(site)
    activation = activation_of(_activation(site))
    if activation is None:
        raise site.refuse(f"bounds do not go through it; expected {SUPPORTED}")
    return activation, _one(site)


def _activation(site: Site) -> Any:
    """Return what is called: a module, also in the place of a function with options, or a function without them."""
    if site.module is not None:
        return site.module
    options = site.args[1:], {name: value for name, value in _but_input(site.kwargs).items() if name != "inplace"}
    if site.source in _AS_MODULES:
        return _AS_MODULES[site.source](*options[0], **options[1])
    return None if any(options[1]) else site.source


def _reader(source: Any) -> Callable[[Site], Read] | None:
    if not isinstance(source, nn.Module):
        return _FUNCTIONS.get(source)
    for kind, reader in _MODULES.items():
        # a class of somebody's own counts if it computes what its base does, as a parametrised one
        same = (getattr(type(source), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))
        if isinstance(source, kind) and all(same):
            return reader
    return None


def _one(site: Site) -> tuple[fx.Node, ...]:
    if len(site.operands) != 1:
        raise site.refuse("expected one argument that depends on the input, got several")
    return site.operands


def _convolution(site: Site) -> Read:
    (before,), module = _one(site), site.module
    assert isinstance(module, nn.Conv2d)
    if module.padding_mode != "zeros":
        raise site.refuse(f"expected padding_mode 'zeros', got {module.padding_mode!r}")
    if len(site.shape(before)) != 3:
        raise site.refuse(f"expected images (n, channels, height, width), got (n, *{site.shape(before)})")
    return Convolution(module, site.shape(before)), (before,)


def _fully_connected(site: Site) -> Read:
    assert isinstance(site.module, nn.Linear)
    return FullyConnected(site.module), _one(site)


def _normalise(site: Site) -> Read:
    assert isinstance(site.module, Normalise)
    return Diagonal(Normalisation(site.module, len(site.shape()))), _one(site)


def _batch_norm(site: Site) -> Read:
    assert isinstance(site.module, nn.BatchNorm1d | nn.BatchNorm2d)
    return Diagonal(BatchNormalisation(site.module, site.path, len(site.shape()))), _one(site)


def _reshape(site: Site) -> Read:
    (before,) = _one(site)
    values, given = site.values[site.node], site.values[before]
    if not values.ndim or len(values) != IMAGES or values.numel() != given.numel():
        raise site.refuse(f"expected (n, …) for n images, got shape {tuple(values.shape)} for {IMAGES}")
    return Reshape(site.shape(before), site.shape()), (before,)


def _dropout(site: Site) -> Read:
    if site.module is not None:
        return Dropout(site.module, site.where), _one(site)
    if _called_with(site, lambda p=0.5, training=True, inplace=False: training):
        raise site.refuse("expected dropout that is off in eval mode, got one that is always on")
    return Dropout(site.model, site.where), _one(site)


def _max_pool(site: Site) -> Read:
    (before,) = _one(site)
    if len(site.shape(before)) != 3:
        raise site.refuse(f"expected images (n, channels, height, width), got (n, *{site.shape(before)})")
    if isinstance(site.module, nn.MaxPool2d):
        module = site.module
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        ceil_mode, indices = module.ceil_mode, module.return_indices
    else:
        sizes, ceil_mode, indices = _called_with(site, _max_pool_options)
    if indices:
        raise site.refuse("expected return_indices=False, got True")
    kernel, stride, padding, dilation = map(_pair, sizes)
    return MaxPool(site.shape(before), kernel, stride, padding, dilation, bool(ceil_mode)), (before,)


def _max_pool_options(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> tuple[tuple[Any, ...], bool, bool]:
    return (kernel_size, stride or kernel_size, padding, dilation), ceil_mode, return_indices


@dataclass(frozen=True)
class _Applied:
    """A function or method of a tensor, with the rest of its arguments."""

    source: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, x: Tensor) -> Tensor:
        function = getattr(torch.Tensor, self.source) if isinstance(self.source, str) else self.source
        result: Tensor = function(x, *self.args, **self.kwargs)
        return result


def _combination(site: Site) -> Read:
    (before,) = _one(site)
    if any(isinstance(site.values[node], Tensor) for node in site.node.all_input_nodes if node is not before):
        raise site.refuse("expected numbers beside the input, got a tensor")
    extra = (site.args[1:], _but_input(site.kwargs)) if site.module is None else ((), {})
    function = _Applied(site.source, *extra)
    given = site.values[before]
    alone = given.clone()
    alone[1:] = 0
    with torch.no_grad():
        both, first = function(given), function(alone)
    if not both.ndim or len(both) != IMAGES or not torch.equal(both[:1], first[:1]) or bool(first[1:].any()):
        raise site.refuse("expected a linear map of each image by itself, got another")
    if bool((function(given.abs()) < 0).any()):
        raise site.refuse("expected a linear map without factors below 0, got one with such")
    return Combination(function, site.shape(before), _mean_kernel(site, before)), (before,)


def _mean_kernel(site: Site, before: fx.Node) -> MeanPool | None:
    """Return the convolution that the call is, if it is an average pooling that treats all windows alike."""
    if len(site.shape(before)) != 3:
        return None
    if isinstance(site.module, nn.AvgPool2d):
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        options = _mean_options(*(getattr(site.module, name) for name in names))
    elif site.source is functional.avg_pool2d:
        options = _called_with(site, _mean_options)
    else:
        return None
    return None if options is None else MeanPool(site.shape(before)[0], *options)


def _mean_options(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Any, ...] | None:
    taps, steps, zeros = _pair(kernel_size), _pair(stride or kernel_size), _pair(padding)
    counted = count_include_pad or zeros == (0, 0) or divisor_override is not None
    return (taps, steps, zeros, float(divisor_override or taps[0] * taps[1])) if counted and not ceil_mode else None


def _sum(site: Site) -> Read:
    return _plus(site, minus=False)


def _difference(site: Site) -> Read:
    return _plus(site, minus=True)


def _plus(site: Site, *, minus: bool) -> Read:
    first, second = _two(site)
    if site.is_moving(first) and site.is_moving(second):
        if site.shape(first) != site.shape(second):
            raise site.refuse(f"expected two of the same shape, got {site.shape(first)} and {site.shape(second)}")
        return Sum(minus), (first, second)
    if site.is_moving(first):
        return Diagonal(Shift(_operand(site, second, first), -1.0 if minus else 1.0, False)), (first,)
    return Diagonal(Shift(_operand(site, first, second), 1.0, minus)), (second,)


def _product(site: Site) -> Read:
    first, second = _two(site)
    if site.is_moving(first) and site.is_moving(second):
        raise site.refuse("expected a constant factor, got two that depend on the input")
    moving, constant = (first, second) if site.is_moving(first) else (second, first)
    return Diagonal(Scale(_operand(site, constant, moving), False)), (moving,)


def _quotient(site: Site) -> Read:
    first, second = _two(site)
    if site.is_moving(second):
        raise site.refuse("expected a constant divisor, got one that depends on the input")
    return Diagonal(Scale(_operand(site, second, first), True)), (first,)


def _negative(site: Site) -> Read:
    return Diagonal(Scale(Operand(-1.0, 0), False)), _one(site)


def _concatenation(site: Site) -> Read:
    parts, dim = _called_with(site, lambda tensors, dim=0: (tensors, dim), first=True)
    dim = dim % len(site.values[site.node].shape)
    if dim == 0 or not all(map(site.is_moving, parts)):
        raise site.refuse("expected tensors that depend on the input, one after the other along a dimension above 0")
    return Concatenation(dim, tuple(site.values[part].shape[dim] for part in parts)), tuple(parts)


def _two(site: Site) -> tuple[Any, Any]:
    options = {name: value for name, value in site.kwargs.items() if name not in ("input", "other")}
    if options and options != {"alpha": 1}:
        raise site.refuse(f"expected two arguments alone, got {', '.join(options)} as well")
    first, second = (*site.args, *(site.kwargs[name] for name in ("input", "other") if name in site.kwargs))
    return first, second


def _operand(site: Site, constant: Any, moving: fx.Node) -> Operand:
    ndim = len(site.shape())
    if isinstance(constant, int | float):
        return Operand(float(constant), 0)
    value = site.values[constant]
    if site.shape() != site.shape(moving) or value.ndim > ndim + 1 or (value.ndim == ndim + 1 and len(value) != 1):
        got = f"a constant of shape {tuple(value.shape)} beside (n, *{site.shape(moving)})"
        raise site.refuse(f"expected a constant that is the same for all images and keeps the shape, got {got}")
    return Operand(constant.name, ndim)


def _called_with(site: Site, options: Callable[..., Any], *, first: bool = False) -> Any:
    """Return what ``options`` makes of the arguments after the input, or of all of them."""
    try:
        return options(*site.args[0 if first else 1 :], **(site.kwargs if first else _but_input(site.kwargs)))
    except TypeError as error:
        raise site.refuse(f"it is called in a way that is not known: {error}") from error


def _but_input(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "input"}


def _pair(value: Any) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else (value * 2)[:2]
    return int(first), int(second)


_MODULES: dict[type[nn.Module], Callable[[Site], Read]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _fully_connected,
    Normalise: _normalise,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.MaxPool2d: _max_pool,
    **dict.fromkeys((nn.Flatten, nn.Unflatten, nn.Identity), _reshape),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout), _dropout),
    **dict.fromkeys((nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d), _combination),
}
_AS_MODULES: dict[Any, type[nn.Module]] = {
    functional.gelu: nn.GELU,
    functional.elu: nn.ELU,
    functional.celu: nn.CELU,
    functional.softplus: nn.Softplus,
    functional.leaky_relu: nn.LeakyReLU,
}
_FUNCTIONS: dict[Any, Callable[[Site], Read]] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _sum),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), _difference),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), _product),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), _quotient),
    **dict.fromkeys((operator.neg, torch.neg, "neg"), _negative),
    **dict.fromkeys((torch.cat, torch.concat), _concatenation),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze), _reshape),
    **dict.fromkeys(("flatten", "reshape", "view", "squeeze", "unsqueeze", "contiguous", "clone"), _reshape),
    **dict.fromkeys((functional.avg_pool2d, functional.adaptive_avg_pool2d, functional.pad), _combination),
    **dict.fromkeys((torch.mean, torch.sum, torch.permute, torch.transpose, operator.getitem), _combination),
    **dict.fromkeys(("mean", "sum", "permute", "transpose"), _combination),
    **dict.fromkeys((functional.max_pool2d, torch.max_pool2d), _max_pool),
    functional.dropout: _dropout,
}
