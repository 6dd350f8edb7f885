"""Projected gradient descent in an l2 ball."""

from collections.abc import Callable

import torch
from torch import Tensor

from rs_plugins.core.checks import check_count, check_images
from rs_plugins.core.geometry import normalise_l2, per_image, project_box, project_l2
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError


def pgd_l2(
    ascent: Callable[[Tensor, int], Tensor],
    x: Tensor,
    *,
    eps: float | Tensor,
    step: float | Tensor,
    steps: int,
    mask: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Climb ``ascent`` from ``x`` within the l2 ball of radius ``eps`` and the box [0, 1] (Salman et al. 2019).

    An image whose gradient is zero or not finite takes its step in a random direction, so that it is not stuck; always
    in the same one, so that it reaches the sphere as the others do.

    Args:
        ascent: Called with the current images (n, *input) and the number of the step, returns the direction in which to
            climb, (n, *input); its length does not matter.
        x: (n, *input), pixels in [0, 1].
        eps: Radius in pixels, a number or one per image.
        step: Length of a step in pixels, a number or one per image.
        steps: Number of steps, >= 1.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        seed: Seed of the random direction.

    Returns:
        The perturbed images (n, *input), detached: exactly in [0, 1] where they may change, within ``eps`` up to
        rounding.

    Raises:
        InputError: If an argument has an impossible value.
    """
    check_images(x)
    check_count(steps, "steps")
    eps, step = per_image(eps, x, "eps"), per_image(step, x, "alpha")
    x = x.detach().clone()
    free = _check_mask(torch.ones((), dtype=torch.bool) if mask is None else mask, x)
    source = stream(seed, "direction", device=x.device)
    # One direction for all steps: a new one each time would be a random walk.
    anywhere = free * torch.randn(x.shape[1:], generator=source, device=x.device, dtype=torch.float32).to(x.dtype)
    delta = torch.zeros_like(x)
    for number in range(steps):
        delta = delta + step * normalise_l2(free * ascent(x + delta, number), otherwise=anywhere)
        delta = project_l2(project_box(delta, x), eps)
    return torch.where(free, (x + delta).clamp(0, 1), x)  # the sum may round one step out of the box


def _check_mask(mask: Tensor, x: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask: expected a boolean tensor, got {got}")
    try:
        return mask.to(x.device).expand_as(x)
    except RuntimeError:
        shapes = f"{tuple(x.shape)}, got shape {tuple(mask.shape)}"
        raise InputError(f"mask: expected a shape that broadcasts to that of x, {shapes}") from None
