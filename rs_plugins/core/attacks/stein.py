"""The gradient of the soft vote without a gradient of the model: Stein's identity (Salman et al. 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rs_plugins.core.checks import check_count
from rs_plugins.core.noise import GaussianNoise, Noise
from rs_plugins.core.objectives import (
    LOG_MEAN_SOFTMAX,
    Logits,
    Look,
    chosen,
    count_votes,
    exact,
    look_over_images,
    noisy_logits,
    weighted,
    zeros,
)
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class Stein:
    """-log((1/m) Σ_i F_y(x + e_i)), and its gradient estimated from the probabilities F = softmax(f) alone.

    For Gaussian e, ∇E[F_y(x + e)] = E[F_y(x + e) e]/sigma²: a draw that makes y likely points to where y is likely.
    The gradient times exp(-loss) is -(1/(m·sigma²)) Σ_i F_y(x + e_i) e_i, of which the expected value is
    -∇E[F_y(x + e)], also where the draws depend on each other. It is computed with logarithms, so that tiny
    probabilities still have a direction.

    Args:
        sigma: Standard deviation of the draws, in pixels.
        centred: Whether to take the mean of the other draws' F_y from each F_y(x + e_i) first. Far less noisy where the
            classifier is sure; not in the paper. Unbiased for independent draws. Where each draw has its negative among
            them, it only makes the estimate longer, by m/(m-1): their sum is zero, and nothing is left to be centred.
    """

    sigma: float
    centred: bool = False
    name: ClassVar[str] = "log-mean-softmax"

    def loss(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Tensor:
        """Return the loss at ``x`` (n, *input) with labels ``y`` (n,) under ``draws`` (m, *input), as (n,)."""
        return LOG_MEAN_SOFTMAX.loss(logits, x, y, draws, chunk=chunk)

    def look(self, logits: Logits, x: Tensor, y: Tensor, draws: Tensor, *, chunk: int | None = None) -> Look:
        """Return the loss, its estimated gradient and the votes; the model may have no gradient.

        Raises:
            InputError: If there is one draw only, which says nothing about directions.
        """
        m = check_count(len(draws), "samples", least=2)

        def one(xs: Tensor, ys: Tensor, parts: Sequence[Tensor]) -> Look:
            total, towards, votes = zeros(xs) - math.inf, torch.zeros_like(xs, dtype=exact(xs)), ys.new_zeros(1)
            for part in parts:
                output = noisy_logits(logits, xs, part)
                shares = chosen(output, ys)
                new = torch.logaddexp(total, shares.logsumexp(dim=1))
                pull = torch.tensordot((shares - new.unsqueeze(1)).exp(), part.to(shares.dtype), dims=1)
                towards = weighted(towards, total - new) + pull  # Σ F_i e_i / Σ F_i so far
                total, votes = new, votes + count_votes(output)
            if self.centred:
                towards = (towards - draws.to(towards.dtype).mean(dim=0)) * (m / (m - 1))
            return Look(math.log(m) - total, (-towards / self.sigma**2).to(xs.dtype), votes)

        return look_over_images(one, x, y, draws, chunk, gradients=False)


def stein_for(noise: Noise, *, centred: bool = False) -> Stein:
    """Return the estimator for draws from ``noise``.

    Raises:
        InputError: If they are not Gaussian, for which alone the identity holds.
    """
    if not isinstance(noise, GaussianNoise):
        raise InputError(f"family: expected Gaussian noise for a gradient by Stein's identity, got {noise.name}")
    return Stein(noise.sigma, centred)
