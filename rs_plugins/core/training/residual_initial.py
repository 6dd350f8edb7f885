"""Initial weights with which each residual block is its shortcut (Goyal et al. 2017), as in training with SAT."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rs_plugins.errors import InputError

_LAST = ("bn3", "bn2")  # what ResNets call the last normalisation of a block: ours, torchvision's and timm's


@torch.no_grad()
def zero_residual(model: nn.Module) -> nn.Module:
    """Set the scale of the last batch normalisation of each residual block of ``model`` to 0, and return ``model``.

    Args:
        model: A ResNet of ours, torchvision's or timm's; changed in place.

    Raises:
        InputError: If it has no such block.
    """
    last = [next((getattr(part, name) for name in _LAST if hasattr(part, name)), None) for part in model.modules()]
    scales = [part.weight for part in last if isinstance(part, _BatchNorm) and part.affine]
    if not scales:
        raise InputError("initial: zero-residual is for ResNets, whose blocks end with bn2 or bn3; found none")
    for scale in scales:
        scale.zero_()
    return model
