"""How well a network does on images that are kept apart while it is trained."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rs_plugins.core.data_sets.data_set import DataSet
from rs_plugins.core.models import check_logits, device_and_dtype, evaluating
from rs_plugins.core.noise import GaussianNoise, Noise
from rs_plugins.core.objectives import noisy_logits
from rs_plugins.core.training.draws import BlockDraws

NOISY, CLEAN, ADVERSARIAL = "noisy accuracy", "clean accuracy", "adversarial accuracy"
_AT_ONCE = 256  # images


@runtime_checkable
class Validating(Protocol):
    """An objective that says by itself on which images a network does well."""

    @property
    def figure(self) -> str:
        """What the share of such images is, such as ``"certified accuracy"``: words without underscores."""

    def validate(self, model: nn.Module, x: Tensor, y: Tensor) -> int:
        """Return on how many of the images ``x`` (n, *input) with labels ``y`` (n,) the network does well.

        It is called in eval mode, without gradients.
        """


def figure_of(objective: object) -> str:
    """Return what `measured` measures.

    It is what the objective itself says if it is `Validating`; else the accuracy under one draw of the noise that it is
    for (`NOISY`), or on the images as they are if it is for none (`CLEAN`).
    """
    if isinstance(objective, Validating):
        return objective.figure
    return CLEAN if getattr(objective, "sigma", None) is None else NOISY


def measured(objective: object, model: nn.Module, data: DataSet, seed: int) -> float:
    """Return the share of images on which ``model`` does well, by the figure of ``objective`` (`figure_of`)."""
    if isinstance(objective, Validating):
        return _share(model, data, lambda x, y, _first: objective.validate(model, x, y))
    sigma: float | None = getattr(objective, "sigma", None)
    if sigma is not None:
        its: Any = getattr(objective, "noise", None)
        return noisy_accuracy(model, data, its if hasattr(its, "draw_") else GaussianNoise(sigma), seed)
    return _share(model, data, lambda x, y, _first: _right(check_logits(model(x), len(x)), y))


def noisy_accuracy(model: nn.Module, data: DataSet, noise: Noise, seed: int) -> float:
    """Return the share of images whose class is right under one draw of ``noise``, the same at each call.

    That is what Gaussian training works on: the accuracy of the base classifier, not of the smoothed one.
    """

    def count(x: Tensor, y: Tensor, first: int) -> int:
        e = BlockDraws(seed, "validation", first=first, device=x.device).noise(noise, x, 1)
        return _right(noisy_logits(model, x, e)[:, 0], y)

    return _share(model, data, count)


def _share(model: nn.Module, data: DataSet, count: Callable[[Tensor, Tensor, int], int]) -> float:
    """Return which share of ``data`` is counted: ``count`` takes images, labels and the place of the first of them."""
    device, dtype = device_and_dtype(model)
    found = 0
    with evaluating(model), torch.no_grad():
        for first in range(0, len(data), _AT_ONCE):
            rows = range(first, min(first + _AT_ONCE, len(data)))
            x = data.read(rows).to(device, dtype)
            found += int(count(x, torch.from_numpy(data.labels[rows.start : rows.stop]).to(device), first))
    return found / len(data)


def _right(logits: Tensor, y: Tensor) -> int:
    return int((logits.argmax(dim=1) == y).sum())
