"""Looks for an image in a ball that a classifier takes for another class, before anything is proved about the ball."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rs_plugins.core.attacks.norms import L2, LINF
from rs_plugins.core.attacks.pgd import pgd
from rs_plugins.core.geometry import expand_like, l2_norm

NORMS = {"linf": LINF, "l2": L2}
_WITHIN = 1 - 1e-12  # of a radius: that a sum is rounded up again leaves it in the ball


def smallest_margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return logit_y - max over k other than y of logit_k, (n,), of ``logits`` (n, classes) and labels ``y`` (n,).

    Below 0 the image has another class for certain; at 0 two classes are equal.
    """
    own = functional.one_hot(y, logits.shape[1]).bool()
    others = logits.masked_fill(own, -torch.inf).amax(dim=1)
    return logits.gather(1, y.unsqueeze(1)).squeeze(1) - others


def falsify(
    logits: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: str,
    steps: int,
    restarts: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Climb to other classes by projected gradient steps on the margin; what it finds is judged as it is returned.

    The first run begins at the image, the others at random in the ball, at the same point of it for all images: what is
    found for an image depends on it and the seed, not on the images beside it.

    Args:
        logits: The classifier, (k, *input) to (k, classes), in the type of ``x``.
        x: (n, *input), pixels in [0, 1].
        y: True classes, (n,).
        eps: Radius in pixels.
        norm: ``"linf"`` or ``"l2"``.
        steps: Steps of a run.
        restarts: Runs.
        seed: Seed of random starts.

    Returns:
        Images in the ball and in [0, 1], up to rounding in the type of ``x``, (n, *input), and their `smallest_margin`,
        (n,).
    """

    def view(images: Tensor, rows: Tensor, _: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_()
            margin = smallest_margin(logits(images), y[rows])
            (slope,) = torch.autograd.grad(margin.sum(), images)
        return margin.detach() < 0, -slope

    def height(images: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return -smallest_margin(logits(images), y[rows])

    found = pgd(
        view, x, norm=NORMS[norm], eps=eps, steps=steps, random_start=False, restarts=restarts, height=height, seed=seed
    )
    found = _inside(found, x, eps, norm)
    return found, -height(found, torch.arange(len(x), device=x.device))


def _inside(found: Tensor, x: Tensor, eps: float, norm: str) -> Tensor:
    """Return ``found`` without what rounding let out of the ball."""
    if norm == "linf":
        return torch.minimum(torch.maximum(found, x - eps), x + eps).clamp(0, 1)
    length = l2_norm(found - x)
    shrink = torch.where(length > eps, eps / length * _WITHIN, torch.ones_like(length))
    return (x + expand_like(shrink, x) * (found - x)).clamp(0, 1)
