"""Projected gradient descent in an l2 or linf ball."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rs_plugins.core.attacks.norms import L2, LINF, Norm
from rs_plugins.core.checks import check_count, check_images
from rs_plugins.core.geometry import add_inside, expand_like, per_image, project_box
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError

Ascent = Callable[[Tensor, int], Tensor]


def pgd(
    ascent: Ascent,
    x: Tensor,
    *,
    norm: Norm = L2,
    eps: float | Tensor,
    step: float | Tensor,
    steps: int,
    mask: Tensor | None = None,
    random_starts: int = 0,
    height: Callable[[Tensor], Tensor] | None = None,
    seed: int = 0,
) -> Tensor:
    """Climb ``ascent`` from ``x`` within the ball of radius ``eps`` and the box [0, 1] (Salman et al. 2019).

    An image whose gradient is zero or not finite takes its step in a random direction, so that it is not stuck; always
    in the same one, so that it reaches the sphere as the others do. Random directions and random starts are the same
    for all images, as the noise is, so that no result depends on how images are batched.

    Args:
        ascent: Called with the current images (n, *input) and the number of the step, returns the direction in which to
            climb, (n, *input); its length does not matter. The numbers go on from one random start to the next.
        x: (n, *input), pixels in [0, 1].
        norm: `L2` or `LINF`.
        eps: Radius in pixels, a number or one per image.
        step: Length of a step in pixels, a number or one per image.
        steps: Number of steps, >= 1.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        random_starts: 0: start at ``x``. 1: start uniformly at random in the ball (over the pixels that may change),
            and go from there into the box. More: that often, and for each image keep the result where ``height`` is
            greatest.
        height: What is climbed, (n, *input) to (n,); needed to choose between several random starts.
        seed: Seed of the random directions and starts.

    Returns:
        The perturbed images (n, *input), detached: exactly in [0, 1] where they may change, within ``eps`` up to
        rounding.

    Raises:
        InputError: If an argument has an impossible value.
    """
    check_images(x)
    check_count(steps, "steps")
    runs = max(1, check_count(random_starts, "random_starts", least=0))
    if runs > 1 and height is None:
        raise InputError(f"height: needed to choose between the results of {runs} random starts")
    eps, step = per_image(eps, x, "eps"), per_image(step, x, "alpha")
    x = x.detach().clone()
    free = check_mask(mask, x)
    anywhere = any_direction(free, seed).to(x.dtype)

    def climb(run: int) -> Tensor:
        delta = torch.zeros_like(x)
        if random_starts:
            start = norm.start(free, stream(seed, "start", run, device=x.device))
            delta = norm.project(project_box(eps * start.to(x.dtype), x), eps)
        for number in range(run * steps, (run + 1) * steps):
            delta = delta + step * norm.direction(free * ascent(x + delta, number), otherwise=anywhere)
            delta = norm.project(project_box(delta, x), eps)
        return torch.where(free, add_inside(x, delta), x)

    if height is None or runs == 1:
        return climb(0)
    return _highest(climb, runs, height)


def pgd_l2(ascent: Ascent, x: Tensor, **settings: Any) -> Tensor:
    """Climb ``ascent`` from ``x`` in an l2 ball; ``settings`` are those of `pgd` but ``norm``."""
    return pgd(ascent, x, norm=L2, **settings)


def pgd_linf(ascent: Ascent, x: Tensor, **settings: Any) -> Tensor:
    """Climb ``ascent`` from ``x`` in an linf ball; ``settings`` are those of `pgd` but ``norm``.

    A step moves each pixel by ``step`` along the sign of its slope; a pixel of slope 0 stays, unless all are 0.
    """
    return pgd(ascent, x, norm=LINF, **settings)


def any_direction(free: Tensor, seed: int) -> Tensor:
    """Return the direction for images without gradient, float32, zero where ``free`` (n, *input) is not set.

    One direction for all steps and images: a new one each time would be a random walk.
    """
    source = stream(seed, "direction", device=free.device)
    return free * torch.randn(free.shape[1:], generator=source, device=free.device, dtype=torch.float32)


def check_mask(mask: Tensor | None, x: Tensor) -> Tensor:
    """Return which pixels of ``x`` may change, boolean of its shape; all of them for None.

    Raises:
        InputError: If ``mask`` is not boolean, or does not broadcast to ``x``.
    """
    if mask is None:
        return torch.ones_like(x, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"mask: expected a boolean tensor, got {got}")
    try:
        return mask.to(x.device).expand_as(x)
    except RuntimeError:
        shapes = f"{tuple(x.shape)}, got shape {tuple(mask.shape)}"
        raise InputError(f"mask: expected a shape that broadcasts to that of x, {shapes}") from None


def _highest(climb: Callable[[int], Tensor], runs: int, height: Callable[[Tensor], Tensor]) -> Tensor:
    """Return for each image that of the ``runs`` results of ``climb`` at which ``height`` is greatest, NaN lowest."""
    best = climb(0)
    highest = height(best)
    highest = highest.masked_fill(highest.isnan(), -torch.inf)
    for run in range(1, runs):
        found = climb(run)
        value = height(found)
        better = value > highest
        best = torch.where(expand_like(better, best), found, best)
        highest = torch.where(better, value, highest)
    return best
