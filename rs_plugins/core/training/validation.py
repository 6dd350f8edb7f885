"""How well a network does under noise while it is trained."""

import torch
from torch import nn

from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.models import device_and_dtype, evaluating
from rs_plugins.core.noise import Noise
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.draws import BlockDraws

_AT_ONCE = 256  # images


def noisy_accuracy(model: nn.Module, data: DataSet, noise: Noise, seed: int) -> float:
    """Return the share of images whose class is right under one draw of ``noise``, the same at each call.

    That is what Gaussian training works on: the accuracy of the base classifier, not of the smoothed one.
    """
    device, dtype = device_and_dtype(model)
    right = 0
    with evaluating(model), torch.no_grad():
        for first in range(0, len(data), _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, len(data)))
            x = data.read(rows).to(device, dtype)
            e = BlockDraws(seed, "validation", first=first, device=device).noise(noise, x, 1)
            found = noisy_logits(model, x, e)[:, 0].argmax(dim=1).cpu()
            right += int((found == torch.from_numpy(data.labels[rows.start : rows.stop])).sum())
    return right / len(data)
