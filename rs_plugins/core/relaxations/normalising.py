"""Normalisation as scale·z + shift, with the statistics of a batch where it trains."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rs_plugins.core.architectures.normalise import Normalise
from rs_plugins.core.relaxations.layers import Call
from rs_plugins.errors import ModelError

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True)
class Normalisation:
    """(z - mean) / std per channel, of a node with ``ndim`` dimensions."""

    module: Normalise
    ndim: int

    def __call__(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and shift."""
        scale = 1 / self.module.std
        return _per_channel(scale, self.ndim), _per_channel(-self.module.mean * scale, self.ndim)


@dataclass(frozen=True)
class BatchNormalisation:
    """Batch normalisation by fixed statistics: its own in eval mode, or those that the call brings for ``name``."""

    module: BatchNorm
    name: str
    ndim: int

    def __call__(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """Return scale and shift.

        Raises:
            ModelError: If it would take the statistics of the batch, and the call brings none.
        """
        module = self.module
        mean, var = call.statistics.get(self.name, (module.running_mean, module.running_var))
        if mean is None or var is None or (module.training and self.name not in call.statistics):
            raise ModelError(
                f"model: {self.name} ({type(module).__name__}) takes the statistics of its batch: collect those of the "
                "clean one with batch_statistics(model) and pass them as statistics, or put the model into eval mode"
            )
        scale = (var + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        shift = -mean * scale if module.bias is None else module.bias - mean * scale
        return _per_channel(scale, self.ndim), _per_channel(shift, self.ndim)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Collect mean and variance of the batch at each batch normalisation in train mode while ``model`` runs.

    Run the model once on the clean batch inside, and pass what was yielded as ``statistics`` to the bounds: they are
    then those of the same normalisation, and gradients go through the statistics. A second pass replaces those of the
    first.

    Args:
        model: The classifier that was given to `RelaxedNetwork`.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def collect(name: str) -> Any:
        def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if module.training or module.running_mean is None:
                (z,) = args
                dims = [dim for dim in range(z.ndim) if dim != 1]
                found[name] = (z.mean(dims), z.var(dims, correction=0))

        return before

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                stack.callback(module.register_forward_pre_hook(collect(name)).remove)
        yield found


def _per_channel(values: Tensor, ndim: int) -> Tensor:
    return torch.reshape(values, (-1, *(1,) * (ndim - 1)))
