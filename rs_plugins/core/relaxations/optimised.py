"""Alpha-CROWN: lower slopes of activations optimised for each margin (Xu et al. 2021), between fixed bounds."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rs_plugins.core.relaxations.regions import best

Slopes = Mapping[str, Tensor]
Ends = Mapping[str, tuple[Tensor, Tensor]]

# Where CROWN's slopes of 0 and 1 begin, so that they may move both ways.
_INSIDE = 0.05


def intersection(first: Ends, second: Ends) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the tighter of two bounds (lower, upper) by name, element by element, without a gradient."""
    return {
        name: (best(lower, second[name][0].detach()), -best(-upper, -second[name][1].detach()))
        for name, (lower, upper) in first.items()
    }


def highest(bound: Callable[[Slopes], Tensor], start: Slopes, *, steps: int, lr: float) -> Tensor:
    """Return the best bound found while its slopes climb, (n, rows), without a gradient.

    Every slope in [0, 1] gives a sound bound, whatever the steps do, so that the best of each row is kept.
    Slopes are put back into [0, 1] after a step, outside the graph: a clamp inside would have no gradient at 0 and 1.

    Args:
        bound: From slopes to lower bounds (n, rows).
        start: First slopes in [0, 1] of each activation by name, (n, rows, *node), or (n, *node) for all rows; then
            what is best for one row may not be for another.
        steps: How many steps of Adam.
        lr: Their length at first; each next one is 2% shorter.
    """
    slopes = {name: value.clamp(_INSIDE, 1 - _INSIDE).requires_grad_() for name, value in start.items()}
    if not slopes:
        return bound(slopes).detach()
    optimiser = torch.optim.Adam(list(slopes.values()), lr=lr)
    reached: Tensor | None = None
    for step in range(steps + 1):
        with torch.enable_grad():
            bounds = bound(slopes)
            loss = -bounds.sum()
        reached = bounds.detach() if reached is None else best(reached, bounds.detach())
        if step == steps:
            break
        gradients = torch.autograd.grad(loss, list(slopes.values()))
        for value, gradient in zip(slopes.values(), gradients, strict=True):
            value.grad = gradient
        optimiser.step()
        for group in optimiser.param_groups:
            group["lr"] *= 0.98
        with torch.no_grad():
            for value in slopes.values():
                value.clamp_(0, 1)
    assert reached is not None
    return reached
