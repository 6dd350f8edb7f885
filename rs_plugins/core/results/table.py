"""The certificate table and the figures computed from it.

Certified accuracy at r is the share of all rows that are correct with radius >= r.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, binom

from rs_plugins.core.certification import Certificate
from rs_plugins.core.checks import check_count, check_probability
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.rounding import digits_below
from rs_plugins.errors import ResultsError, ResultsWarning

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
DIGITS = 8  # of a radius in a log
_Value = TypeVar("_Value", float, str)


@dataclass(frozen=True, eq=False)
class Results:
    """A certification log as columns, one entry per image.

    Attributes:
        idx: Positions in the data set, increasing.
        label: True labels.
        predict: Certified classes, -1 for abstention.
        radius: Certified radii in pixels, 0 for abstention; None for a log of predictions.
        correct: Whether ``predict`` equals ``label``.
        seconds: Time of each image.
        samples: Votes of each image, selection and estimation; None where the log does not say.
        sigma: Standard deviation of the noise, in pixels; None where the log does not say.
        alpha: Failure probability of each certificate; None where the log does not say.
    """

    idx: Ints
    label: Ints
    predict: Ints
    radius: Floats | None
    correct: npt.NDArray[np.bool_]
    seconds: Floats
    samples: Ints | None = None
    sigma: float | None = None
    alpha: float | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def of(cls, certificates: Sequence[Certificate], labels: Sequence[int]) -> "Results":
        """Return the table of ``certificates`` for images with true ``labels``."""
        predict = np.array([c.prediction for c in certificates], dtype=np.int64)
        label = np.array(labels, dtype=np.int64)
        return cls(
            idx=np.array([c.index for c in certificates], dtype=np.int64),
            label=label,
            predict=predict,
            radius=np.array([c.radius for c in certificates], dtype=np.float64),
            correct=predict == label,
            seconds=np.array([c.seconds for c in certificates], dtype=np.float64),
            samples=np.array([c.n0 + c.n for c in certificates], dtype=np.int64),
            sigma=common([c.made_with.sigma for c in certificates]),
            alpha=common([c.made_with.alpha for c in certificates]),
        )

    def certified_accuracy(self, radii: Sequence[float] | Floats, *, parity: bool = False) -> Floats:
        """Return the share of all rows that are correct with radius >= r, for each r of ``radii`` in pixels.

        Args:
            radii: The radii, to the eight digits of a log (`as_logged`), so that what is certified at 2/3 is so here.
            parity: Compare the floating-point numbers as they are, as the published curves did.

        Raises:
            ResultsError: If this is a log of predictions.
        """
        radius = self.radii
        if not self._any_rows("certified accuracy"):
            return np.full(len(radii), math.nan)
        grid = np.asarray(radii, dtype=np.float64)
        if not parity:
            grid = np.array([as_logged(r) for r in grid.tolist()])
        return np.array([float(np.mean(self.correct & (radius >= r))) for r in grid])

    def certified_accuracy_lower(
        self, radii: Sequence[float] | Floats, *, alpha: float, rho: float = 0.001, parity: bool = False
    ) -> Floats:
        """Return a lower bound on the certified accuracy that exact certificates would show on these images.

        Each certificate is wrong with probability at most ``alpha``, independently. With probability at least 1 - rho
        no more of them are wrong than the (1 - rho) quantile of the binomial distribution says.

        Args:
            radii: The radii, as in `certified_accuracy`.
            alpha: Failure probability of each certificate.
            rho: Failure probability of the bound.
            parity: Compare radii as in `certified_accuracy`, and use the published formula (Cohen et al. 2019,
                appendix). It lacks a factor 2 under the root of Bernstein's inequality, so that it fails somewhat more
                often than ``rho``.

        Raises:
            ResultsError: If this is a log of predictions.
            InputError: If ``alpha`` or ``rho`` is outside (0, 1).
        """
        alpha, rho = check_probability(alpha, "alpha"), check_probability(rho, "rho")
        n = max(1, len(self))
        if parity:
            doubt = math.log(1 / rho) / n
            wrong = alpha + math.sqrt(alpha * (1 - alpha) * doubt) + doubt / 3
        else:
            wrong = float(binom.ppf(1 - rho, n, alpha)) / n
        return self.certified_accuracy(radii, parity=parity) - wrong

    def certified_accuracy_interval(
        self, radii: Sequence[float] | Floats, *, confidence: float = 0.95, parity: bool = False
    ) -> tuple[Floats, Floats]:
        """Return a Clopper-Pearson interval for the certified accuracy on images drawn like these, for each radius.

        It tells how much the figure owes to the choice of the images, and takes the certificates as they are.

        Args:
            radii: The radii, as in `certified_accuracy`.
            confidence: Probability that an interval holds the true value, for each radius by itself.
            parity: As in `certified_accuracy`.

        Returns:
            The lower and the upper ends.

        Raises:
            ResultsError: If this is a log of predictions.
            InputError: If ``confidence`` is outside (0, 1).
        """
        tail, n = (1 - check_probability(confidence, "confidence")) / 2, len(self)
        hits: Floats = np.rint(self.certified_accuracy(radii, parity=parity) * n)
        low = np.where(hits == 0, 0.0, beta.ppf(tail, hits, n - hits + 1))
        high = np.where(hits == n, 1.0, beta.isf(tail, hits + 1, n - hits))
        return (low, high) if n else (hits, hits)

    def average_certified_radius_interval(
        self, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Return the percentile bootstrap interval of ACR over the images.

        Args:
            confidence: Nominal probability that the interval holds the ACR of images drawn like these.
            resamples: Bootstrap samples.
            seed: Seed of the resampling.

        Raises:
            ResultsError: If this is a log of predictions.
            InputError: If ``confidence`` is outside (0, 1) or ``resamples`` is below 1.
        """
        tail = (1 - check_probability(confidence, "confidence")) / 2
        gains, n = self.correct * self.radii, len(self)
        if not n:
            return math.nan, math.nan
        draws = np.random.default_rng(seed)
        means = [float(gains[draws.integers(n, size=n)].mean()) for _ in range(check_count(resamples, "resamples"))]
        low, high = np.quantile(means, [tail, 1 - tail])
        return float(low), float(high)

    @property
    def radii(self) -> Floats:
        """The certified radii in pixels, (n,).

        Raises:
            ResultsError: If this is a log of predictions.
        """
        if self.radius is None:
            raise ResultsError("radius: this is a log of predictions, which has no radii")
        return self.radius

    @property
    def average_certified_radius(self) -> float:
        """ACR: the mean over all rows of the radius where correct, else 0. Easy images can inflate it."""
        radius = self.radii
        return float(np.mean(self.correct * radius)) if self._any_rows("ACR") else math.nan

    @property
    def accuracy(self) -> float:
        """Share of correct rows; an abstention is an error."""
        return float(np.mean(self.correct)) if self._any_rows("accuracy") else math.nan

    @property
    def abstention(self) -> float:
        """Share of rows that abstain."""
        return float(np.mean(self.predict == ABSTAIN)) if self._any_rows("abstention") else math.nan

    def _any_rows(self, figure: str) -> bool:
        if not len(self):
            warnings.warn(f"{figure} is undefined: the table has no rows", ResultsWarning, stacklevel=3)
        return bool(len(self))


def as_logged(radius: float) -> float:
    """Return ``radius`` as logs have it, to eight digits, rounded down; 0.7999999999999999 out of a grid is 0.8."""
    return float(digits_below(round(radius, 12), DIGITS))


def radius_text(radius: float) -> str:
    """Return ``radius`` for a table: the digits of `as_logged`, without zeros at the end."""
    return f"{as_logged(radius):.{DIGITS}g}"


def common(values: Sequence[_Value]) -> _Value | None:
    """Return the value that all ``values`` have, or None."""
    return values[0] if len(set(values)) == 1 else None
