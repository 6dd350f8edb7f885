"""The sum of images and noise that votes are about, and noise families that make it by themselves, on a grid."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rs_plugins.core.noise import Noise
from rs_plugins.core.noise_promises import draw_into


@runtime_checkable
class NoiseOnGrid(Noise, Protocol):
    """A noise family that adds itself to images on a grid, so that equal sums are equal floats.

    A few of its draws may be *failures*: their votes are for no class, and count against a certificate.
    """

    def check_images(self, images: Tensor, indices: Sequence[int]) -> None:
        """Raise `InputError` if ``images`` (n, *input), at ``indices`` of their data set, are not on the grid."""

    def perturb_(self, out: Tensor, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Do what the function `perturb_` does."""


def perturb_(noise: Noise, out: Tensor, images: Tensor, generator: torch.Generator) -> Tensor | None:
    """Fill ``out`` (n, *input) with independent draws of ``noise``, plus ``images``, (*input) or (n, *input).

    Certificates are about this sum, so whatever counts votes for them makes it here. What is differentiated or trained
    adds the draws of `Noise.draw_` by itself.

    Returns:
        Which of the n are failures, whose votes count for no class, as booleans (n,); None for none.
    """
    own: Callable[[Tensor, Tensor, torch.Generator], Tensor | None] | None = getattr(noise, "perturb_", None)
    if own is not None:  # not isinstance: of a protocol that takes microseconds, and this is called for every block
        return own(out, images, generator)
    draw_into(noise, out, generator).add_(images)
    return None


def check_on_grid(noise: Noise, images: Tensor, indices: Sequence[int]) -> None:
    """Refuse ``images`` (n, *input), at ``indices`` of their data set, that ``noise`` is not made for.

    Raises:
        InputError: If it lives on a grid and they are not on it.
    """
    check: Callable[[Tensor, Sequence[int]], None] | None = getattr(noise, "check_images", None)
    if check is not None:  # also of noise that lacks another part of `NoiseOnGrid`
        check(images, indices)


def may_fail(noise: Noise) -> bool:
    """Return whether draws of ``noise`` can be failures, whose votes are for no class."""
    return hasattr(noise, "perturb_")
