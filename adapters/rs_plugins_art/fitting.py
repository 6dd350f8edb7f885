"""What ART's `fit` adds to core's training loop."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from rs_plugins.core.training.objective import Batch, Draws, Objective


def in_eval_mode(objective: Objective) -> Objective:
    """Return ``objective`` for a model whose batch normalisation and dropout stay as in evaluation."""

    def frozen(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return objective(model.eval(), batch, draws)

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
