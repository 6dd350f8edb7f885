"""What the loop minimises: a function of the model, a batch and its noise, like a paper's equation."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from rs_plugins.core.checks import check_nonnegative
from rs_plugins.core.noise import Family, GaussianNoise, Noise, make_noise
from rs_plugins.core.noise_promises import draw_into
from rs_plugins.core.streams import stream


@dataclass(frozen=True)
class Batch:
    """What one step of the optimiser is taken on.

    Attributes:
        x: (n, *input), pixels in [0, 1].
        y: Labels (n,); some objectives also take class probabilities (n, classes).
        epoch: How many passes over the data are finished; warm-up goes by it.
        elapsed: How many are, with the part of the one under way: what changes from step to step goes by it.
    """

    x: Tensor
    y: Tensor
    epoch: int = 0
    elapsed: float = 0.0


class Draws(Protocol):
    """Where an objective takes its random numbers from; tests hand in known ones."""

    def noise(self, noise: Noise, x: Tensor, samples: int) -> Tensor:
        """Return draws of ``noise`` for ``x`` (n, *input), independent per image and sample, (n, samples, *input)."""

    def uniform(self, x: Tensor) -> Tensor:
        """Return one number for each of the images ``x`` (n, *input), uniform in [0, 1), as (n,)."""

    def fresh(self, purpose: str, key: int = 0) -> torch.Generator:
        """Return a fresh generator for what belongs to no image, such as noise on weights: the same in all processes.

        It begins anew at each call, so that what it has drawn need not be kept.
        """


# The model is in train mode. The result is a scalar.
Objective = Callable[[nn.Module, Batch, Draws], Tensor]


@runtime_checkable
class Choosy(Protocol):
    """An objective that cannot take every model."""

    def check_model(self, model: nn.Module, x: Tensor) -> None:
        """Refuse ``model``, in train mode, if it cannot be trained on images like ``x`` (n, *input).

        Raises:
            ModelError: If so.
        """


@dataclass(frozen=True)
class StreamDraws:
    """Draws from one generator.

    Attributes:
        generator: On the device of the images.
        seed: Of what belongs to no image.
    """

    generator: torch.Generator
    seed: int = 0

    def noise(self, noise: Noise, x: Tensor, samples: int) -> Tensor:
        """Return draws of ``noise`` for ``x`` (n, *input), independent per image and sample, (n, samples, *input)."""
        return draw_into(noise, x.new_empty(len(x), samples, *x.shape[1:]), self.generator)

    def uniform(self, x: Tensor) -> Tensor:
        """Return one number for each of the images ``x`` (n, *input), uniform in [0, 1), as (n,)."""
        exact = torch.promote_types(x.dtype, torch.float32)  # what torch draws in less depends on its version
        drawn = torch.rand(len(x), generator=self.generator, device=x.device, dtype=exact)
        return drawn.to(x.dtype).clamp_(max=1 - torch.finfo(x.dtype).eps / 2)  # rounding gives 1 now and then

    def fresh(self, purpose: str, key: int = 0) -> torch.Generator:
        """Return a fresh generator for what belongs to no image."""
        return stream(self.seed, purpose, key, device=self.generator.device)


@dataclass(frozen=True)
class Method:
    """What all methods under noise have; a method is data, so that a checkpoint can say with what it was trained.

    Attributes:
        sigma: Standard deviation of the noise, in pixels.
        family: The noise family.
    """

    sigma: float
    family: Family = field(default=GaussianNoise, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", self.noise.sigma)

    @property
    def noise(self) -> Noise:
        """Return ``family`` at ``sigma``."""
        return make_noise(self.family, self.sigma)

    def check(self, name: str, check: Callable[..., Any], **how: Any) -> None:
        """Replace the setting ``name`` by what ``check`` makes of it.

        Raises:
            InputError: If it has an impossible value.
        """
        object.__setattr__(self, name, check(getattr(self, name), name, **how))


def weighted(objective: Objective, weight: float) -> Objective:
    """Return ``objective`` times ``weight``, as Salman et al. (2019) weigh pseudo-labelled images (their w).

    Raises:
        InputError: If ``weight`` is not a finite number of at least 0.
    """
    weight = check_nonnegative(weight, "weight")

    def times(model: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return weight * objective(model, batch, draws)

    return times


def warm_up(epoch: int, warmup: int) -> float:
    """Return min(1, (epoch + 1)/warmup), the share of its full strength that something has in ``epoch``, from 0."""
    return min(1.0, (epoch + 1) / warmup)
