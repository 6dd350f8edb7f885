"""DDN, the smallest adversarial perturbation by decoupling its direction and norm (Rony et al. 2019)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from rs_plugins.core.attacks.pgd import any_direction, check_mask
from rs_plugins.core.checks import check_count, check_images
from rs_plugins.core.geometry import (
    add_inside,
    at_least_single,
    expand_like,
    l2_norm,
    normalise_l2,
    per_image,
    project_l2,
)
from rs_plugins.errors import InputError

View = Callable[[Tensor, int], tuple[Tensor, Tensor]]
LAST_RATE = 0.01  # the step length falls from 1 to this, in pixels


def ddn(
    view: View,
    x: Tensor,
    *,
    steps: int = 100,
    gamma: float = 0.05,
    init_norm: float | Tensor = 1.0,
    max_norm: float | Tensor | None = None,
    levels: int | None = 256,
    mask: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Look for the adversarial image of smallest l2 distance to ``x`` in [0, 1] (Rony et al. 2019, algorithm 1).

    Each step climbs by a falling length, then sets the norm of the perturbation: a little smaller than before if the
    image was adversarial, a little larger if not. Repaired against Salman et al.'s code: every image that is judged
    already holds the box and ``max_norm``, and what is returned is the very image that was judged, where theirs is
    scaled and rounded afterwards; the image after the last step is judged too; nothing is divided by a norm of zero.

    Args:
        view: Called with the current images (n, *input) and the number of the step, from 0 to ``steps``, returns which
            of them are adversarial, boolean (n,), and the direction in which to climb, (n, *input). At ``steps`` the
            direction is not used.
        x: (n, *input), pixels in [0, 1].
        steps: Number of steps, >= 1.
        gamma: By which share the norm changes at each step, in (0, 1).
        init_norm: The norm to begin with, in pixels, > 0, a number or one per image.
        max_norm: No perturbation is longer than this, in pixels, a number or one per image; None: no such bound.
        levels: Pixels are rounded to this many levels at each step, but where that would break ``max_norm``, an image
            is scaled back and leaves them; None: never rounded.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        seed: Seed of the direction for images without gradient, which is the same for all.

    Returns:
        The images (n, *input), detached, exactly in [0, 1] where they may change, within ``max_norm`` up to rounding
        in single precision; and which of them were seen to be adversarial, boolean (n,). Of these it is the one nearest
        to ``x`` that was seen, ``x`` itself if it is adversarial. Of the others it is where the search ended: not the
        unchanged image.

    Raises:
        InputError: If an argument has an impossible value.
    """
    check_images(x)
    steps = check_count(steps, "steps")
    if not 0 < gamma < 1:
        raise InputError(f"gamma: expected a number in (0, 1), got {gamma}")
    if levels is not None:
        check_count(levels, "levels", least=2)
    norm = per_image(init_norm, x, "init_norm")
    if not bool((norm > 0).all()):
        raise InputError(f"init_norm: expected finite values > 0, got {init_norm}")
    x = x.detach().clone()
    free = check_mask(mask, x)
    wide = x.to(at_least_single(x))
    limit = expand_like(l2_norm(free * torch.maximum(wide, 1 - wide)), x)  # the farthest corner of the box
    if max_norm is not None:
        limit = torch.minimum(limit, per_image(max_norm, x, "max_norm"))
    norm = torch.minimum(norm, limit)
    anywhere = any_direction(free, seed).to(wide.dtype)

    current = torch.where(free, x.clamp(0, 1), x)
    best = current
    nearest = wide.new_full((len(x),), math.inf)
    for number in range(steps + 1):
        bad, direction = view(current, number)
        distance = l2_norm(current - wide)
        better = bad & (distance < nearest)
        best = torch.where(expand_like(better, x), current, best)
        nearest = torch.where(better, distance, nearest)
        if number == steps:
            break
        direction = normalise_l2(free * direction.to(wide.dtype), otherwise=anywhere)
        delta = current - wide + _rate(number, steps) * direction
        norm = torch.minimum(limit, norm * (1 + gamma - 2 * gamma * expand_like(bad.to(wide.dtype), x)))
        current = _at_norm(x, delta, norm, limit, free, anywhere, levels)
    found = nearest.isfinite()
    return torch.where(expand_like(found, x), best, current), found


def _rate(number: int, steps: int) -> float:
    """Return the length of step ``number`` of 0 … steps-1: half a cosine from 1, at ``LAST_RATE`` in the last step."""
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (number + 1) / steps)) / 2


def _at_norm(
    x: Tensor, delta: Tensor, norm: Tensor, limit: Tensor, free: Tensor, anywhere: Tensor, levels: int | None
) -> Tensor:
    """Return ``x`` plus ``delta`` stretched to length ``norm``, on the ``levels``, in the box and within ``limit``.

    ``delta`` is at least in single precision, and rounded to the type of ``x`` before its length is judged.
    """
    image = x + norm * normalise_l2(delta, otherwise=anywhere)
    if levels is not None:
        image = (image * (levels - 1)).round() / (levels - 1)
    image = image.clamp(0, 1)
    rounded, delta = image.to(x.dtype), (image - x) * free
    inside = expand_like(l2_norm((rounded - x.to(image.dtype)) * free), x) <= limit
    return torch.where(free, torch.where(inside, rounded, add_inside(x, project_l2(delta, limit))), x)
