"""Gaussian noise on weights: how much of it each parameter gets, and the loss where it has been added."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rs_plugins.core.training.objective import Draws
from rs_plugins.errors import InputError

WeightNoiseMode = Literal["relative", "fixed"]
Tensors = dict[str, Tensor]  # by the names of the parameters
Weighted = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def weighted_layers(model: nn.Module) -> list[Weighted]:
    """Return the linear and convolutional layers of ``model`` that have a weight of their own, in order."""
    return [part for part in model.modules() if isinstance(part, Weighted) and "weight" in part._parameters]


def trained(loss: nn.Module) -> Tensors:
    """Return the parameters of ``loss`` that ask for a gradient."""
    return {name: value for name, value in loss.named_parameters() if value.requires_grad}


def deviations(loss: nn.Module, sigma_w: float, mode: WeightNoiseMode) -> Tensors:
    """Return the standard deviation of the noise on each parameter that gets some, as constants.

    Args:
        loss: Whose parameters they are; those that are frozen get none.
        sigma_w: How much noise there is.
        mode: ``"relative"``: sigma_w · std(W) for each weight W of a linear or convolutional layer, std over its
            entries, and nothing for biases and all else, such as what parametrised weights are computed of.
            ``"fixed"``: sigma_w for each entry of each parameter.

    Raises:
        InputError: If no parameter would get noise.
    """
    parameters = trained(loss)
    if mode == "fixed":
        return {name: value.new_tensor(sigma_w) for name, value in parameters.items()}
    weights = {id(layer.weight) for layer in weighted_layers(loss)}
    noisy = {name: value for name, value in parameters.items() if id(value) in weights}
    if not noisy:
        raise InputError("mode: 'relative' is for weights of linear and convolutional layers, of which none is trained")
    return {name: sigma_w * value.detach().std(correction=0) for name, value in noisy.items()}


def noise(deviation: Mapping[str, Tensor], like: Mapping[str, Tensor], draws: Draws, key: int) -> Tensors:
    """Return the noise number ``key`` of this step: the same at each call and in each process."""
    source = draws.fresh("weight noise", key)
    drawn = {}
    for name, scale in deviation.items():
        weight = like[name]
        normal = torch.randn(weight.shape, generator=source, device=weight.device, dtype=weight.dtype)
        drawn[name] = normal.mul_(scale)
    return drawn


def moved(weights: Mapping[str, Tensor], by: Mapping[str, Tensor], sign: int) -> Tensors:
    """Return the values of ``weights`` with noise added (``sign`` 1) or subtracted (-1), as tensors of their own."""
    return {
        name: torch.add(value.detach(), by[name], alpha=sign) if name in by else value.detach().clone()
        for name, value in weights.items()
    }


def at(loss: nn.Module, weights: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
    """Return ``loss(*inputs)`` where ``loss`` has these weights; its own stay as they are, its buffers, too."""
    buffers = {name: value.clone() for name, value in loss.named_buffers()}
    return functional_call(loss, {**buffers, **weights}, inputs)  # type: ignore[no-any-return]
