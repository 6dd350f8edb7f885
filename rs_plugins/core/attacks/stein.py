"""The gradient of the soft vote without a gradient of the model: Stein's identity (Salman et al. 2019)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rs_plugins.core.checks import check_count
from rs_plugins.core.geometry import at_least_single, expand_like
from rs_plugins.core.noise import GaussianNoise, Noise
from rs_plugins.core.noise_families.gaussian_linf import GaussianLinfNoise
from rs_plugins.core.objectives import (
    LOG_MEAN_SOFTMAX,
    Logits,
    Look,
    count_votes,
    log_probabilities,
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
    probabilities still have a direction; where the classifier is sure, from the tiny 1 - F_y(x + e_i), which keep the
    digits that an F_y next to 1 has lost.

    Args:
        sigma: Standard deviation of the draws, in pixels.
        centred: Whether to take the mean of the other draws' F_y from each F_y(x + e_i) first. Far less noisy where the
            classifier is sure; not in the paper. Unbiased for independent draws. Where each draw has its negative among
            them, it only makes the estimate longer, by m/(m-1): their sum is zero, and nothing is left to be centred.
            The sum is exactly zero if draw i + m/2 is the negative of draw i; in another order it is a rounding.
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
            likely, unlikely, votes = _Weighted(xs), _Weighted(xs), ys.new_zeros(1)
            for part in parts:
                output = noisy_logits(logits, xs, part)
                log_f, log_q = _chosen_and_others(output, ys)
                likely.take(log_f, part)
                unlikely.take(log_q, part)
                votes = votes + count_votes(output)
            # With q = 1 - F it is Σ F_i e_i / Σ F_i, and (Σ e_i - Σ q_i e_i) / Σ F_i: accurate where F or q is small.
            everything = _sum(draws, likely.mean.dtype)
            odds = unlikely.log_total - likely.log_total  # log(Σ q_i / Σ F_i)
            if self.centred:
                small = (likely.mean - everything / m) * (m / (m - 1))
                large = weighted(everything / m - unlikely.mean, odds) * (m / (m - 1))
            else:
                small = likely.mean
                large = weighted(everything.expand_as(small), -likely.log_total) - weighted(unlikely.mean, odds)
            towards = torch.where(expand_like(odds < 0, xs), large, small)
            return Look(math.log(m) - likely.log_total, (-towards / self.sigma**2).to(xs.dtype), votes)

        return look_over_images(one, x, y, draws, chunk, gradients=False)


class _Weighted:
    """The mean of draws by weights of which the logarithms are known, as they come, pass by pass.

    Attributes:
        log_total: log Σ w_i so far, (n,).
        mean: Σ w_i e_i / Σ w_i so far, (n, *input).
    """

    def __init__(self, x: Tensor) -> None:
        self.log_total = zeros(x) - math.inf
        self.mean = torch.zeros_like(x, dtype=at_least_single(x))

    def take(self, log_weights: Tensor, draws: Tensor) -> None:
        """Take in ``draws`` (k, *input) with ``log_weights`` (n, k)."""
        total = torch.logaddexp(self.log_total, log_weights.logsumexp(dim=1))
        pull = torch.tensordot((log_weights - total.unsqueeze(1)).exp(), draws.to(log_weights.dtype), dims=1)
        self.mean, self.log_total = weighted(self.mean, self.log_total - total) + pull, total


def _chosen_and_others(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return log F_y and log(1 - F_y), both (n, k), of logits (n, k, classes); the latter is no difference."""
    output = log_probabilities(output)
    column = y.reshape(-1, 1, 1).expand(-1, output.shape[1], 1)
    others = output.scatter(2, column, -math.inf).logsumexp(dim=2)
    return output.gather(2, column).squeeze(2), others.clamp(min=torch.finfo(output.dtype).min)


def _sum(draws: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of ``draws`` (m, *input), exactly zero where the second half of them are the first's negatives.

    Where m is odd, and the middle one has no negative, it is exactly that one.
    """
    half = len(draws) // 2
    first, middle, second = (part.to(dtype) for part in draws.split([half, len(draws) % 2, half]))
    total: Tensor = (first + second).sum(dim=0) + middle.sum(dim=0)
    return total


def stein_for(noise: Noise, *, centred: bool = False) -> Stein:
    """Return the estimator for draws from ``noise``.

    Raises:
        InputError: If they are not Gaussian, for which alone the identity holds.
    """
    if not isinstance(noise, GaussianNoise | GaussianLinfNoise):
        raise InputError(f"family: expected Gaussian noise for a gradient by Stein's identity, got {noise.name}")
    return Stein(noise.sigma, centred)
