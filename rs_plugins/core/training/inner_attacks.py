"""The attacks inside training: on the very noise draws of the step, which are the image's own (Salman et al. 2019).

All climb J(x') = -log((1/m) Σ_i F_y(x' + e_i)). Salman et al. bound the mean from below by 1e-20, where their gradient
ends; here it is computed in log space and goes on.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rs_plugins.core.attacks.ddn import ddn
from rs_plugins.core.attacks.noisy_loss import fooled
from rs_plugins.core.attacks.pgd import pgd_l2
from rs_plugins.core.checks import check_count, check_positive, check_probability
from rs_plugins.core.geometry import expand_like, l2_norm, project_l2
from rs_plugins.core.models import evaluating, frozen
from rs_plugins.core.objectives import chosen, count_votes, input_gradient, noisy_logits
from rs_plugins.core.training.losses import check_range
from rs_plugins.errors import InputError

GUARD = 1e-8  # added to the norm of a gradient by Jeong and Shin (2020) and Jeong et al. (2021)


class Attack(Protocol):
    """Looks for images near ``x`` that the smoothed classifier gets wrong."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, e: Tensor, share: float) -> Tensor:
        """Return the perturbed images (n, *input), detached and in [0, 1].

        Args:
            model: In eval mode and frozen.
            x: (n, *input), pixels in [0, 1].
            y: Labels (n,), of type int64.
            e: Each image's own noise draws, (n, m, *input).
            share: Share of the budget that may be used, in (0, 1].
        """


def check_attack(attack: object, name: str) -> Attack:
    """Return ``attack`` if it can be called.

    Raises:
        InputError: Otherwise.
    """
    if isinstance(attack, type) or not callable(attack):
        raise InputError(f"{name}: expected an attack such as PGD(eps=1.0, steps=10), got {attack!r}")
    return attack


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into eval mode and freeze its parameters; afterwards all is as before, also after an exception."""
    with evaluating(model), frozen(model):
        yield


@dataclass(frozen=True, kw_only=True)
class _Stepping:
    """Settings of an attack of so many steps within a budget."""

    eps: float
    steps: int
    step: float | None = None

    def __post_init__(self) -> None:
        _check(self, "eps", check_positive)
        _check(self, "steps", check_count)
        if self.step is not None:
            _check(self, "step", check_positive)


@dataclass(frozen=True, kw_only=True)
class PGD(_Stepping):
    """Projected ascent along the normalised gradient of J, box before ball (Salman et al. 2019).

    An image without gradient goes in a random direction that is the same for all (theirs: one for each).

    Args:
        eps: l2 budget in pixels.
        steps: Number of steps (T).
        step: Length of a step in pixels; None: 2·eps/T, of the budget that warm-up leaves.

    Raises:
        InputError: If a setting has an impossible value.
    """

    eps: float = 1.0
    steps: int = 10

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, e: Tensor, share: float) -> Tensor:
        """Return the perturbed images, see `Attack`."""

        def ascent(images: Tensor, _: int) -> Tensor:
            return slope(model, images, y, e)[0]

        return pgd_l2(ascent, x, eps=share * self.eps, step=self.step, steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class BallFirstPGD(_Stepping):
    """Projected ascent as in the code of Jeong and Shin (2020): ball before box, gradient/(norm + 1e-8).

    So a slope far below 1e-8 hardly moves an image. J is summed over the batch (theirs: averaged), so that the guard
    does not depend on the size of the batch.

    Args:
        eps: l2 budget in pixels.
        steps: Number of steps (T).
        step: Length of a step in pixels; None: 2·eps/T, of the budget that warm-up leaves.

    Raises:
        InputError: If a setting has an impossible value.
    """

    eps: float = 2.0
    steps: int = 4

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, e: Tensor, share: float) -> Tensor:
        """Return the perturbed images, see `Attack`."""
        eps = share * self.eps
        step = 2 * eps / self.steps if self.step is None else self.step
        *_, last = ascend(model, x, y, e, steps=self.steps, step=step, max_norm=eps)
        return last


@dataclass(frozen=True, kw_only=True)
class DDN:
    """The smallest perturbation that fools most of the draws, within a budget (Rony et al. 2019; Salman et al. 2019).

    Where none is found, the images come back where the search ended; `rs_plugins.core.attacks.ddn.ddn` says what else
    was repaired.

    Args:
        eps: No perturbation is longer than this, in pixels.
        steps: Number of steps (T); there is one forward pass more, which judges the last image.
        gamma: By which share the norm changes at each step, in (0, 1).
        init_norm: l2 norm to begin with, in pixels. None: the budget that warm-up leaves, which is what Salman et al.'s
            training always takes, whatever their option says.
        levels: Pixels are rounded to this many levels; None: never.

    Raises:
        InputError: If a setting has an impossible value.
    """

    eps: float = 1.0
    steps: int = 10
    gamma: float = 0.05
    init_norm: float | None = None
    levels: int | None = 256

    def __post_init__(self) -> None:
        _check(self, "eps", check_positive)
        _check(self, "steps", check_count)
        _check(self, "gamma", check_probability)
        if self.init_norm is not None:
            _check(self, "init_norm", check_positive)
        if self.levels is not None:
            _check(self, "levels", check_count, least=2)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, e: Tensor, share: float) -> Tensor:
        """Return the perturbed images, see `Attack`."""
        eps = share * self.eps

        def view(images: Tensor, number: int) -> tuple[Tensor, Tensor]:
            if number < self.steps:
                direction, output = slope(model, images, y, e)
            else:  # only judged
                direction, output = images, noisy_logits(model, images, e)
            return fooled(count_votes(output), y, targeted=False), direction

        with torch.no_grad():
            found, _ = ddn(
                view,
                x,
                steps=self.steps,
                gamma=self.gamma,
                init_norm=eps if self.init_norm is None else self.init_norm,
                max_norm=eps,
                levels=self.levels,
            )
        return found


ATTACKS: Mapping[str, Any] = MappingProxyType({"pgd": PGD, "ddn": DDN, "ball-first-pgd": BallFirstPGD})


def ascend(
    model: nn.Module, x: Tensor, y: Tensor, e: Tensor, *, steps: int, step: float, max_norm: float | None
) -> Iterator[Tensor]:
    """Yield a_1, …, a_T: a_{t+1} = a_t + step · G/(‖G‖ + 1e-8), G the gradient of J, from a_0 = x (Jeong et al. 2021).

    Each is brought back to ‖a - x‖ <= ``max_norm`` in pixels, unless that is None, and then into the box.
    """
    here = x.detach()
    for _ in range(steps):
        gradient, _ = slope(model, here, y, e)
        length = expand_like(l2_norm(gradient), gradient)
        here = ball_then_box(here + step * gradient / (length + GUARD), x, max_norm)
        yield here


def ball_then_box(images: Tensor, x: Tensor, max_norm: float | None) -> Tensor:
    """Return ``images`` within l2 distance ``max_norm`` of ``x``, in pixels, if that is not None, then in [0, 1]."""
    if max_norm is not None:
        images = x + project_l2(images - x, x.new_tensor(max_norm))
    return images.clamp(0, 1).detach()


def slope(model: nn.Module, x: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of each image's J in ``x``, (n, *input), and the logits, (n, m, classes).

    Args:
        model: In eval mode and frozen.
        x: (n, *input), pixels.
        y: Labels (n,), of type int64.
        e: Each image's own noise draws, (n, m, *input).

    Raises:
        InputError: If a label is out of range.
        ModelError: If no gradient flows from the logits to the input.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output = noisy_logits(model, leaf, e)
        loss = math.log(e.shape[1]) - chosen(output, check_range(y, output.shape[-1])).logsumexp(dim=1)
        return input_gradient(loss, leaf), output.detach()


def _check(attack: object, name: str, check: Callable[..., Any], **how: Any) -> None:
    """Replace the setting ``name`` by what ``check`` makes of it."""
    object.__setattr__(attack, name, check(getattr(attack, name), name, **how))
