"""Gradient ascent in an l2 or linf ball: projected, or by dual averaging."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rs_plugins.core.attacks.norms import L2, LINF, Norm
from rs_plugins.core.checks import check_count, check_flag, check_images
from rs_plugins.core.geometry import add_inside, at_least_single, normalise_l2, per_image, project_box
from rs_plugins.core.streams import stream
from rs_plugins.errors import InputError

Ascent = Callable[[Tensor, int], Tensor]
View = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
Height = Callable[[Tensor, Tensor], Tensor]
Rule = Literal["dual-averaging", "projected"]


def pgd(
    view: View,
    x: Tensor,
    *,
    norm: Norm = L2,
    eps: float | Tensor,
    step: float | Tensor | None = None,
    steps: int,
    rule: Rule = "projected",
    mask: Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    height: Height | None = None,
    seed: int = 0,
) -> Tensor:
    """Climb from ``x`` within the ball of radius ``eps`` and the box [0, 1] (Salman et al. 2019).

    An image whose gradient is zero or not finite takes its step in a random direction, so that it is not stuck; always
    in the same one, so that it reaches the sphere as the others do. Random directions and random starts are the same
    for all images, as the noise is, so that no result depends on how images are batched.

    Args:
        view: Called with the images that still move (k, *input), which of the n they are, (k,), and the number of the
            step, returns which of them have arrived, boolean (k,), and the directions in which to climb, (k, *input),
            whose length does not matter. An image that has arrived stays as it is, and is looked at no more. The
            numbers go on from one run to the next.
        x: (n, *input), pixels in [0, 1].
        norm: `L2` or `LINF`.
        eps: Radius in pixels, a number or one per image.
        step: Length of a step in pixels, a number or one per image. None: 2·eps/steps, or ``eps`` if averaging.
        steps: Number of steps, >= 1.
        rule: ``"projected"``: add a step to the perturbation and go back into ball and box, as in the paper.
            ``"dual-averaging"`` (Nesterov 2009): go to where the mean of all directions seen so far is highest in box
            and ball; of the ball each step opens another ``step``, up to ``eps``. Noise in the gradients averages out.
        mask: Which pixels may change, boolean and broadcastable to ``x``; all of them by default.
        random_start: Whether the first run starts uniformly at random in the ball (over the pixels that may change, and
            from there into the box) instead of at ``x``. The others always do.
        restarts: Number of runs; for each image that result is kept where ``height`` is greatest, or the first that
            arrived.
        height: Called with images (k, *input), and which of the n they are, (k,), returns how high they are, (k,), to
            choose between the results of several runs. One run alone is not judged.
        seed: Seed of the random directions and starts.

    Returns:
        The perturbed images (n, *input), detached: exactly in [0, 1] where they may change, within ``eps`` up to
        rounding in single precision. In half precision each pixel is rounded towards that of ``x``, and one that may
        move by less than the distance to the next number does not move.

    Raises:
        InputError: If an argument has an impossible value.
    """
    check_images(x)
    steps, restarts = check_count(steps, "steps"), check_count(restarts, "restarts")
    random_start = check_flag(random_start, "random_start")
    if rule not in get_args(Rule):
        raise InputError(f"rule: expected one of {', '.join(map(repr, get_args(Rule)))}, got {rule!r}")
    if restarts > 1 and height is None:
        raise InputError(f"height: needed to choose between the results of {restarts} runs")
    eps = per_image(eps, x, "eps")
    step = per_image(step, x, "step") if step is not None else eps if rule == "dual-averaging" else 2 * eps / steps
    x = x.detach().clone()
    free = check_mask(mask, x)
    room = _Room(x, free, eps, step, any_direction(free, seed).to(at_least_single(x)), norm)
    best = _Best(x, height if restarts > 1 else None)
    for run in range(restarts):
        rows = best.left()
        if not len(rows):
            break
        here = room.at(rows)
        delta = here.start(stream(seed, "start", run, device=x.device)) if random_start or run else here.nowhere()
        numbers = range(run * steps, (run + 1) * steps)
        best.take(rows, *_climb(view, here, rows, delta, numbers, rule), first=run == 0)
    return best.images


def pgd_l2(ascent: Ascent, x: Tensor, **settings: Any) -> Tensor:
    """Climb ``ascent`` (images (n, *input) and number of the step to directions) from ``x`` in an l2 ball.

    ``settings`` are those of `pgd` but ``norm``.
    """
    return pgd(_never_arriving(ascent), x, norm=L2, **settings)


def pgd_linf(ascent: Ascent, x: Tensor, **settings: Any) -> Tensor:
    """Climb ``ascent`` (images (n, *input) and number of the step to directions) from ``x`` in an linf ball.

    ``settings`` are those of `pgd` but ``norm``. A step moves each pixel by ``step`` along the sign of its slope; a
    pixel of slope 0 stays, unless all are 0.
    """
    return pgd(_never_arriving(ascent), x, norm=LINF, **settings)


def _never_arriving(ascent: Ascent) -> View:
    def view(images: Tensor, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(rows, dtype=torch.bool), ascent(images, number)

    return view


@dataclass
class _Room:
    """Where images may go: ball and box, and the size of steps there; perturbations are at least in single precision.

    Attributes:
        x: The images, (n, *input).
        free: Which pixels may change, boolean (n, *input).
        eps: Radius, broadcastable.
        step: Length of a step, broadcastable.
        anywhere: The direction for images without gradient, (n, *input).
        norm: That of the radius.
    """

    x: Tensor
    free: Tensor
    eps: Tensor
    step: Tensor
    anywhere: Tensor
    norm: Norm

    def at(self, rows: Tensor) -> "_Room":
        """Return that of the images ``rows`` (k,)."""
        if len(rows) == len(self.x):
            return self
        eps, step = (value if len(value) == 1 else value[rows] for value in (self.eps, self.step))
        return _Room(self.x[rows], self.free[rows], eps, step, self.anywhere[rows], self.norm)

    def nowhere(self) -> Tensor:
        """Return no perturbation."""
        return torch.zeros_like(self.x, dtype=at_least_single(self.x))

    def start(self, source: torch.Generator) -> Tensor:
        """Return a random perturbation."""
        start = self.norm.start(self.free, source)
        return self.norm.project(project_box(self.eps * start.to(self.eps.dtype), self.x), self.eps)

    def step_from(self, delta: Tensor, slope: Tensor) -> Tensor:
        """Return ``delta`` and a step along ``slope``, back in ball and box."""
        delta = delta + self.step * self.norm.direction(self.free * slope, otherwise=self.anywhere)
        return self.norm.project(project_box(delta, self.x), self.eps)

    def unit(self, slope: Tensor) -> Tensor:
        """Return ``slope`` at l2 norm 1."""
        return normalise_l2(self.free * slope, otherwise=self.anywhere)

    def highest(self, total: Tensor, count: int) -> Tensor:
        """Return the highest perturbation along ``total`` in the box and what ``count`` steps open of the ball."""
        reach = torch.minimum(self.eps, count * self.step)
        return self.norm.highest(total, self.x, reach, otherwise=self.anywhere)

    def image(self, delta: Tensor) -> Tensor:
        """Return the images perturbed by ``delta``."""
        return torch.where(self.free, add_inside(self.x, delta), self.x)


class _Best:
    """The best result so far for each of the images ``x`` (n, *input), by ``height``, or the first that arrived."""

    def __init__(self, x: Tensor, height: Height | None) -> None:
        self.images, self._height = x.clone(), height
        self._arrived = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._highest = torch.full((len(x),), -torch.inf, dtype=at_least_single(x), device=x.device)

    def left(self) -> Tensor:
        """Return which images have not arrived, (k,)."""
        return (~self._arrived).nonzero().squeeze(1)

    def take(self, rows: Tensor, found: Tensor, there: Tensor, *, first: bool) -> None:
        """Take in the results ``found`` (k, *input) for the images ``rows``, of which those ``there`` arrived."""
        better = there | first
        if self._height is not None and not bool(there.all()):
            judged = rows[~there]
            value = self._height(found[~there], judged).to(self._highest.dtype)
            better[~there] |= value > self._highest[judged]
            self._highest[judged] = torch.fmax(self._highest[judged], value)  # which ignores NaN
        self.images[rows[better]] = found[better]
        self._arrived[rows] = there


def _climb(view: View, room: _Room, rows: Tensor, delta: Tensor, numbers: range, rule: Rule) -> tuple[Tensor, Tensor]:
    """Return where the images of ``room``, which are ``rows`` of all, come to from ``delta``, and which arrived."""
    result, moving = delta.clone(), torch.arange(len(rows), device=rows.device)
    total = torch.zeros_like(delta)
    whole = room
    for count, number in enumerate(numbers, start=1):
        there, slope = view(room.image(delta), rows[moving], number)
        slope = slope.detach().to(delta.dtype)
        if bool(there.any()):
            result[moving[there]] = delta[there]
            moving, delta, total, slope = (each[~there] for each in (moving, delta, total, slope))
            if not len(moving):
                break
            room = whole.at(moving)
        if rule == "projected":
            delta = room.step_from(delta, slope)
        else:
            total = total + room.unit(slope)
            delta = room.highest(total, count)
    result[moving] = delta
    arrived = torch.ones_like(rows, dtype=torch.bool)
    arrived[moving] = False
    return whole.image(result), arrived


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
