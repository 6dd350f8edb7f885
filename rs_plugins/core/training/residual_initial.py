"""Initial weights with which each residual block is its shortcut (Goyal et al. 2017), as in training with SAT."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rs_plugins.errors import InputError

_LAST = ("bn3", "bn2")  # what ResNets call the last normalisation of a block: ours, torchvision's and timm's


@torch.no_grad()
def zero_residual(model: nn.Module, like: nn.Module | None = None) -> nn.Module:
    """Set the scale of the last batch normalisation of each residual block of ``model`` to 0, and return ``model``.

    A block is known by its parts: ``bn2`` or ``bn3``, and ``downsample``, which goes past it where it changes shapes.

    Args:
        model: A ResNet of ours, torchvision's or timm's; changed in place.
        like: A network with the same parameters in which the blocks are looked up, if ``model`` was rewritten; by
            default ``model`` itself.

    Raises:
        InputError: If it has no such block.
    """
    parameters = dict(model.named_parameters())
    names = _scales(model if like is None else like)
    if not names or not parameters.keys() >= set(names):
        raise InputError(
            "initial: zero-residual is for ResNets, whose blocks have a downsample and end with bn2 or bn3; found none"
        )
    for name in names:
        parameters[name].zero_()
    return model


def _scales(model: nn.Module) -> list[str]:
    """Return the names of the scales that end the blocks."""
    found = []
    for path, part in model.named_modules():
        last = next((name for name in _LAST if isinstance(getattr(part, name, None), _BatchNorm)), None)
        if last is not None and hasattr(part, "downsample"):
            found.append(f"{path}.{last}.weight" if path else f"{last}.weight")
    return found
