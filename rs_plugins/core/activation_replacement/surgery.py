"""Module surgery: other modules in the place of ReLU modules, at the same paths, so state-dict keys stay."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field

from torch import Tensor, nn

from rs_plugins.core.activation_replacement.calls import RELU, is_capped, is_relu

_TRANSFORMERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_HOOKS = [name for name in vars(nn.Module()) if "hook" in name]


class WrittenBack(nn.Module):
    """An activation that also overwrites what it is called with, as an in-place ReLU does.

    Needed where the model goes on with the tensor that it handed in: ``self.relu(z)`` as a statement of its own.

    Args:
        activation: The activation.
    """

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that it has in torch's activations
        """Return ``input``, of any shape, after it was overwritten; gradients go through the activation."""
        return input.copy_(self.activation(input.clone()))


@dataclass
class Replacements:
    """What has been put in the place of ReLU.

    Attributes:
        make: Makes a fresh activation, on the model's device and in its type.
        write_back: Whether what replaces an in-place ReLU overwrites its input, too.
        modules: All that were made.
        in_place: Those of them that replace an in-place ReLU.
        surgery: Number of ReLU modules that are gone.
        sites: Number of calls in the source that are rewritten.
        uncapped: Where a ReLU6 was.
    """

    make: Callable[[], nn.Module]
    write_back: bool = False
    modules: list[nn.Module] = field(default_factory=list)
    in_place: list[nn.Module] = field(default_factory=list)
    surgery: int = 0
    sites: int = 0
    uncapped: list[str] = field(default_factory=list)

    def new(self, path: str, *, training: bool, in_place: bool = False, capped: bool = False) -> nn.Module:
        """Return a fresh activation for a ReLU at ``path``."""
        made = self.make()
        made = WrittenBack(made) if in_place and self.write_back else made
        made.train(training)
        self.modules.append(made)
        self.in_place += [made] if in_place else []
        self.uncapped += [path] if capped and path not in self.uncapped else []
        return made

    def instead_of(self, relu: nn.Module, path: str) -> nn.Module:
        """Return a fresh activation with the hooks of the module ``relu``."""
        in_place = bool(getattr(relu, "inplace", False))
        made = self.new(path, training=relu.training, in_place=in_place, capped=is_capped(relu))
        vars(made).update({name: copy(vars(relu)[name]) for name in _HOOKS if vars(relu)[name]})
        return made


def replace_modules(model: nn.Module, replacements: Replacements) -> nn.Module:
    """Put an activation in the place of each ReLU module of ``model``, in place; the model itself may be one.

    A ReLU at several paths is one module, and so is what replaces it. Transformer layers of torch, which call ReLU as a
    function, count as well: they no longer take the fast path that has ReLU built in.
    """
    paths = {id(module): path for path, module in model.named_modules() if is_relu(module)}
    relus = {id(module): module for module in model.modules() if id(module) in paths}
    instead = {
        key: replacements.instead_of(relus[key], path or type(relus[key]).__name__) for key, path in paths.items()
    }
    put(model, instead)
    for path, part in list(model.named_modules()):
        if isinstance(part, _TRANSFORMERS):
            _renew_transformer(part, path, replacements)
    replacements.surgery += len(instead)
    _forbid_fast_path(model, replacements)
    return instead.get(id(model), model)


def put(model: nn.Module, instead: dict[int, nn.Module]) -> None:
    """Put modules in the place of others, which are known by id, wherever ``model`` has them."""
    for part in list(model.modules()):
        for name, child in list(part._modules.items()):  # named_children leaves out second names
            if id(child) in instead:
                setattr(part, name, instead[id(child)])


def _renew_transformer(layer: nn.Module, path: str, replacements: Replacements) -> None:
    activation = getattr(layer, "activation", None)
    if not isinstance(activation, nn.Module) and activation in RELU:
        layer.activation = replacements.new(f"{path}.activation".lstrip("."), training=layer.training)
        replacements.surgery += 1


def _forbid_fast_path(model: nn.Module, replacements: Replacements) -> None:
    """Let no transformer layer whose activation was replaced use the kernel that has ReLU in it."""
    made = set(map(id, replacements.modules))
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoderLayer) and id(part.activation) in made:
            part.activation_relu_or_gelu = 0
    for part in model.modules():
        inside = part.modules() if isinstance(part, nn.TransformerEncoder) else ()
        if any(isinstance(layer, nn.TransformerEncoderLayer) and id(layer.activation) in made for layer in inside):
            part.use_nested_tensor = False  # type: ignore[assignment]
