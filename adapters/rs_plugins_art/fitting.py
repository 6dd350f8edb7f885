"""What ART's `fit` adds to core's training loop."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rs_plugins.core.training.loop import Objective


def in_eval_mode(objective: Objective) -> Objective:
    """Return ``objective`` for a model whose batch normalisation and dropout stay as in evaluation."""

    def frozen(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return objective(model.eval(), x, y, generator)

    return frozen


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put back the ``.grad`` of every parameter afterwards."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient
