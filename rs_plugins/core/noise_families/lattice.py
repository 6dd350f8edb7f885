"""Gaussian noise on the grid of the images: certificates that hold in floating point.

Noise that is drawn and added in floating point leaves its traces: from the last bits of a noisy pixel one can often
tell which pixel it was, so a certificate of the ordinary kind can be wrong (Jin et al. 2022, Voráček & Hein 2023). Here
noise is an integer number of levels, drawn by integer comparisons, and added as an integer. The classifier sees one
float for each integer sum, wherever the sum came from, and so nothing but the sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rs_plugins.core.checks import check_count, check_positive
from rs_plugins.core.noise import GaussianNoise
from rs_plugins.core.noise_families.lattice_thresholds import BITS, reach, upper_thresholds
from rs_plugins.errors import InputError

TOLERANCE = 1e-3  # levels: what float32 leaves of k/255, with room for a way to it in several steps
MOST = 2**15 - 1  # sums of an image and its noise are 16-bit integers
_TOP_BITS = 16  # of the bits of a uniform number: these decide nearly always
_REST_BITS = BITS - _TOP_BITS
_UNDECIDED = -(2**15)
_IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class LatticeGaussianNoise:
    """Gaussian noise rounded to a grid of 1/levels, for certificates that hold in floating point (Voráček & Hein 2023).

    For images on the grid k/levels, image plus noise rounded to the grid is image plus noise, rounded: the classifier
    under noise on the grid is another classifier, which rounds first, under Gaussian noise, and has its certificates.
    An l2 ball of radius sigma·Φ⁻¹(p) is certified, against adversaries whose images are on the grid, too: with 255
    levels, all that can be stored in 8 bits. Sums are clamped to [-k, k + 1] pixel units, k = max(1, int(6 sigma)); the
    clamp is a part of the classifier.

    The noise is drawn by comparing integers of 60 bits with the distribution function, computed exactly and rounded so
    that no value is more likely than it should be. What is left over, less than 2^-44 a pixel, are failures: votes for
    no class. Three things are taken for granted: that the bits of torch's generator are uniform, that the classifier is
    a function of the floats that it is given, and that the images, as floats, stand for the points of the grid that
    they are next to.

    Attacks, training and predictions by few fixed draws add the draws in floating point, so that there is a gradient:
    they prove nothing.

    Args:
        sigma: Standard deviation in pixels, before rounding, > 0.
        levels: Steps of the grid in one pixel unit: 255 for 8-bit images, or a multiple for finer noise; adversaries
            are then on the finer grid. For other images what they were divided by, such as 16.

    Raises:
        InputError: If ``sigma`` is not a finite number above 0, ``levels`` is no positive integer, or their product is
            so large that sums do not fit into 16 bits.
    """

    name: ClassVar[str] = "lattice-gaussian"
    norm: ClassVar[str] = "l2"
    sigma: float
    levels: int = 255

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigma", check_positive(self.sigma, "sigma"))
        object.__setattr__(self, "levels", check_count(self.levels, "levels"))
        if self.sigma > MOST or self.levels * (reach(self.sigma) + 2) > MOST:
            raise InputError(
                f"levels: expected at most {MOST} / (max(1, int(6 sigma)) + 2) at sigma = {self.sigma:g}, "
                f"got {self.levels}"
            )

    def draw_(self, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill ``out`` with independent draws from ``generator``, as floats, and return it.

        To be added to an image in floating point; certificates are made with `perturb_`.
        """
        steps, _ = self._cdf.draw(out.numel(), generator)
        return out.copy_(steps.view(out.shape)).div_(self.levels)

    def perturb_(self, out: Tensor, images: Tensor, generator: torch.Generator) -> Tensor | None:
        """Fill ``out`` (n, *input) with ``images``, (*input) or (n, *input), plus independent draws from ``generator``.

        A pixel is taken for the point of the grid that is nearest; `check_images` looks whether it is one. The sum is
        one of integers, and the same integer always becomes the same float.

        Returns:
            Which of the n are failures, as booleans (n,); None for none.
        """
        steps, failed = self._cdf.draw(out.numel(), generator)
        total = steps.view(out.shape).add_((images * self.levels).round_().to(torch.int16))
        k = reach(self.sigma)
        out.copy_(total.clamp_(-k * self.levels, (k + 1) * self.levels)).div_(self.levels)
        return None if failed is None else failed.view(out.shape[0], -1).any(dim=1)

    def check_images(self, images: Tensor, indices: Sequence[int]) -> None:
        """Look whether ``images`` (n, *input), at ``indices`` of their data set, are on the grid.

        Raises:
            InputError: If a pixel is further than `TOLERANCE` levels from a multiple of 1/levels.
        """
        for start, part in enumerate(images.split(_IMAGES_AT_ONCE)):
            steps = part.detach().to(torch.promote_types(part.dtype, torch.float32)) * self.levels
            off = (steps - steps.round()).abs() > TOLERANCE
            if not bool(off.any()):
                continue
            row, *place = where = off.nonzero()[0].tolist()
            pixel = float(part[tuple(where)])
            raise InputError(
                f"images: expected pixels on the grid k/{self.levels}, on which alone {self.name} noise certifies, got "
                f"{pixel:.9g} at {tuple(place)} of image {indices[start * _IMAGES_AT_ONCE + row]}; keep images in "
                f"float32, round them, (x * {self.levels}).round() / {self.levels}, or give the levels that they have"
            )

    def radius(self, p_lower: float) -> float:
        """Return sigma·Φ⁻¹(p_lower), in pixels, for a lower bound in [1/2, 1] on the top class's probability.

        Raises:
            InputError: If ``p_lower`` is outside [1/2, 1].
        """
        return GaussianNoise(self.sigma).radius(p_lower)

    def probability(self, radius: float) -> float:
        """Return a probability that certifies ``radius`` >= 0 in pixels, rounded up, at most 1."""
        return GaussianNoise(self.sigma).probability(radius)

    def radius_between(self, p_lower: float, runner_up: float) -> float:
        """Return sigma/2·(Φ⁻¹(p_lower) - Φ⁻¹(runner_up)), in pixels; failures are to be counted for the runner-up.

        Raises:
            InputError: If not 0 < runner_up <= p_lower < 1.
        """
        return GaussianNoise(self.sigma).radius_between(p_lower, runner_up)

    @property
    def _cdf(self) -> "InverseCdf":
        return inverse_cdf(self.sigma, self.levels)


class InverseCdf:
    """Draws integers by comparing uniform integers of 60 bits with cut points.

    A draw is ``least`` plus the number of ``points`` up to a uniform u in [0, 2^60). On a CPU the first 16 bits of u
    are drawn and looked up in a table, and the others only where the table cannot tell: that is the same law, in a
    twentieth of the time.

    Args:
        points: The cut points, (m,), int64, increasing; those below 0 count for every u.
        least: The draw below all cut points.
        failing: From this u on a draw is a failure.
    """

    def __init__(self, points: npt.NDArray[np.int64], least: int, failing: int) -> None:
        self.points, self.least, self.failing = torch.from_numpy(points), least, failing
        self._there = {torch.device("cpu"): self.points}
        first = torch.arange(2**_TOP_BITS) << _REST_BITS
        last = first + (2**_REST_BITS - 1)
        steps = self.of(first)
        decided = (steps == self.of(last)) & (last < failing)
        self.table = torch.where(decided, steps, steps.new_tensor(_UNDECIDED))

    def of(self, u: Tensor) -> Tensor:
        """Return the draws, int16, that uniform integers ``u`` in [0, 2^60), int64, stand for."""
        if u.device not in self._there:
            self._there[u.device] = self.points.to(u.device)
        steps = torch.searchsorted(self._there[u.device], u, right=True, out_int32=True)
        return steps.add_(self.least).to(torch.int16)

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Return ``n`` draws, (n,) int16, and which of them are failures, (n,) booleans; None for none.

        Raises:
            InputError: If the generator is neither of a CPU nor of a CUDA device.
        """
        if (kind := generator.device.type) == "cuda":
            return self.draw_in_full(n, generator)
        if kind != "cpu":  # on others torch is not known to draw all 60 bits
            raise InputError(f"device: expected cpu or cuda for integers of {BITS} bits, got {kind}")
        bits = torch.empty((n + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        top = bits.view(torch.int16)[:n].to(torch.int32).add_(2 ** (_TOP_BITS - 1))
        steps = self.table.index_select(0, top)
        undecided = torch.from_numpy(np.flatnonzero(steps.numpy() == _UNDECIDED))  # torch's nonzero is slow
        rest = torch.empty(len(undecided), dtype=torch.int64).random_(0, 2**_REST_BITS, generator=generator)
        u = (top[undecided].long() << _REST_BITS) + rest
        steps[undecided] = self.of(u)
        failed = u >= self.failing
        return steps, torch.zeros(n, dtype=torch.bool).index_fill_(0, undecided[failed], True) if failed.any() else None

    def draw_in_full(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Do the same with all bits at once: for a GPU, where this is fast, and for which nothing here waits."""
        u = torch.empty(n, dtype=torch.int64, device=generator.device).random_(0, 2**BITS, generator=generator)
        return self.of(u), u >= self.failing


@lru_cache(maxsize=16)
def inverse_cdf(sigma: float, levels: int) -> InverseCdf:
    """Return the draws of Gaussian noise of ``sigma`` pixels, rounded to 1/levels; each is at most as likely as there.

    A threshold is rounded by at most one half, so a bin of the rounded ones is wider than the exact one by less than 1:
    each bin is made narrower by 1, and what that leaves over at the upper end are failures.
    """
    upper = np.array(upper_thresholds(sigma, levels), dtype=np.int64)
    thresholds = np.concatenate([2**BITS - upper[::-1], upper])
    increments = 1 + np.concatenate([[0], (np.diff(thresholds) != 0).cumsum()])
    with torch.inference_mode(False):
        return InverseCdf(thresholds - increments, -len(upper), int(2**BITS - increments[-1] - 1))
