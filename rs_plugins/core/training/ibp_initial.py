"""Initial weights that keep the widths of intervals from growing with depth (Shi et al. 2021)."""

import math

import torch
from torch import nn

from rs_plugins.core.checks import check_seed
from rs_plugins.core.streams import stream
from rs_plugins.core.training.weight_noise import Weighted, weighted_layers
from rs_plugins.errors import InputError


@torch.no_grad()
def ibp_initial(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Draw the weights of all but the last layer of ``model`` from N(0, (√(2π)/fan_in)²), and return ``model``.

    Under such weights a layer with ReLU leaves the expected width of an interval as it is (Shi et al. 2021). Layers are
    linear ones and convolutions, the last is the last of them in the order of modules. Biases, other modules and what
    asks for a gradient stay as they are.

    Args:
        model: The network; changed in place.
        seed: Of the weights, which are the same on every device.

    Raises:
        InputError: If ``model`` has fewer than two such layers, or the weight of one is computed of others.
    """
    seed, layers = check_seed(seed), weighted_layers(model)
    computed = [name for name, part in model.named_modules() if isinstance(part, Weighted) and part not in layers]
    if computed:
        raise InputError(f"model: expected weights to draw, got {computed[0]}, whose weight is computed of others")
    if len(layers) < 2:
        raise InputError(f"model: expected at least two linear or convolutional layers, got {len(layers)}")
    for index, layer in enumerate(layers[:-1]):
        source = stream(seed, "ibp initial weights", index)
        normal = torch.randn(layer.weight.shape, generator=source)
        layer.weight.copy_(normal * (math.sqrt(2 * math.pi) / layer.weight[0].numel()))
    return model
