"""What became of images under an attack, and the figures of it, with exact confidence intervals over images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.checks import check_probability
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.procedures import Counts
from rs_plugins.core.proportions import Proportion
from rs_plugins.errors import InputError
from rs_plugins.text_tables import as_text

Flags = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What PREDICT says of images (Cohen et al. 2019).

    Attributes:
        label: True classes, (n,).
        prediction: The classes, -1 where it abstains, (n,).
        counts: Votes for each class, (n, classes).
        votes: Votes an image was asked for; those with NaN logits are in no column of ``counts``.
    """

    label: Counts
    prediction: Counts
    counts: Counts
    votes: int

    @property
    def correct(self) -> Flags:
        """Where the prediction is the label, (n,); an abstention is not."""
        return np.equal(self.prediction, self.label)

    @property
    def abstained(self) -> Flags:
        """Where nothing is predicted, (n,)."""
        return np.equal(self.prediction, ABSTAIN)

    @property
    def wrong(self) -> Flags:
        """Where another class is predicted, (n,)."""
        return ~self.correct & ~self.abstained

    @property
    def share(self) -> Floats:
        """The share of votes for the label, (n,)."""
        mine = np.take_along_axis(self.counts, self.label[:, None], axis=1)[:, 0]
        return np.asarray(mine / self.votes, dtype=np.float64)


@dataclass(frozen=True)
class Violations:
    """Certificates that were put to the test.

    Attributes:
        inside: Positions of the images whose perturbation is shorter than their certified radius.
        violated: Those of them that are predicted as another class than the certified one.
    """

    inside: tuple[int, ...]
    violated: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class AttackEvaluation:
    """Images before and after an attack; ``print`` it for the table.

    Attributes:
        before: What is predicted at the images.
        after: What is predicted at the attacked images.
        l2: l2 norm of each perturbation in pixels, (n,).
        linf: Largest change of a pixel of each image, (n,).
        indices: Position of each image in its data set, (n,).
        sigma: Standard deviation of the noise, in pixels.
        alpha: Probability that a prediction is not the smoothed classifier's.
        confidence: Of the intervals over images.
        seed: Seed of the votes.
    """

    before: Predictions
    after: Predictions
    l2: Floats
    linf: Floats
    indices: Counts
    sigma: float
    alpha: float
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        check_probability(self.confidence, "confidence")

    def __len__(self) -> int:
        return len(self.l2)

    @cached_property
    def success(self) -> Flags:
        """Where the class was right before and another class is predicted after, (n,); an abstention is none."""
        return self.before.correct & self.after.wrong

    @property
    def clean_accuracy(self) -> Proportion:
        """Share of images that are predicted correctly before."""
        return self._share(self.before.correct)

    @property
    def robust_accuracy(self) -> Proportion:
        """Share of images that are predicted correctly after."""
        return self._share(self.after.correct)

    @property
    def success_rate(self) -> Proportion:
        """Of the images predicted correctly before, the share of those predicted as another class after."""
        return self._share(self.success[self.before.correct])

    @property
    def abstention_rate(self) -> Proportion:
        """Of the images predicted correctly before, the share of those at which PREDICT abstains after."""
        return self._share(self.after.abstained[self.before.correct])

    def violations(
        self, predictions: Sequence[int] | Counts, radii: Sequence[float] | Floats, *, norm: str = "l2"
    ) -> Violations:
        """Count the certificates that the attack was inside of, and those that it seems to have broken.

        An image counts as inside if a class is certified and the perturbation is shorter than the radius; it is a
        violation if PREDICT gives another class after the attack (an abstention is none). Then either the certificate
        is wrong, which has at most the probability alpha that it was made with, or the prediction is, at most
        ``self.alpha``. So of k images inside at most k·(alpha of the certificates + ``self.alpha``) violations are
        expected, provided the attack has not seen the votes of this evaluation.

        Args:
            predictions: Certified classes, (n,), -1 for abstention.
            radii: Certified radii in pixels, (n,), which are not used at abstentions.
            norm: Of the radii: ``"l2"`` or ``"linf"``.

        Raises:
            InputError: If there is not one of each per image, or the norm is another one.
        """
        if norm not in ("l2", "linf"):
            raise InputError(f"norm: expected 'l2' or 'linf', in which perturbations are measured, got {norm!r}")
        lengths = self.l2 if norm == "l2" else self.linf
        classes, limits = np.asarray(predictions), np.asarray(radii, dtype=np.float64)
        for name, values in (("predictions", classes), ("radii", limits)):
            if values.shape != self.l2.shape:
                raise InputError(f"{name}: expected one per image, shape {self.l2.shape}, got shape {values.shape}")
        if np.isnan(limits).any():
            raise InputError("radii: expected numbers, got NaN")
        inside = (classes != ABSTAIN) & (lengths < limits)
        violated = inside & (self.after.prediction != classes) & ~self.after.abstained
        return Violations(tuple(self.indices[inside].tolist()), tuple(self.indices[violated].tolist()))

    def as_dict(self) -> dict[str, Any]:
        """Return settings, figures and one list per column of images as plain data, for JSON."""
        return {
            "settings": {
                **{"images": len(self), "votes": self.before.votes, "sigma": self.sigma, "alpha": self.alpha},
                **{"confidence": self.confidence, "seed": self.seed},
            },
            "figures": {
                "clean_accuracy": self.clean_accuracy.as_dict(),
                "robust_accuracy": self.robust_accuracy.as_dict(),
                "success_rate": self.success_rate.as_dict(),
                "abstention_rate": self.abstention_rate.as_dict(),
                **{f"abstained_{when}": self._share(found.abstained).as_dict() for when, found in self._both},
                **{f"wrong_{when}": self._share(found.wrong).as_dict() for when, found in self._both},
                **{f"mean_share_{when}": float(found.share.mean()) for when, found in self._both},
                "l2": _summary(self.l2),
                "l2_of_successes": _summary(self.l2[self.success]),
                "linf": _summary(self.linf),
            },
            "images": {
                "index": self.indices.tolist(),
                "label": self.before.label.tolist(),
                **{f"prediction_{when}": found.prediction.tolist() for when, found in self._both},
                **{f"counts_{when}": found.counts.tolist() for when, found in self._both},
                "l2": self.l2.tolist(),
                "linf": self.linf.tolist(),
            },
        }

    def __str__(self) -> str:
        """Return the figures as tables."""
        settings = (
            f"{len(self)} images, sigma {self.sigma:g}; PREDICT with {self.before.votes:,} votes at alpha "
            f"{self.alpha:g}, which may abstain; Clopper-Pearson intervals over images"
        )
        return "\n\n".join((self._shares(), self._attack(), self._distances(), settings))

    @property
    def _both(self) -> tuple[tuple[str, Predictions], ...]:
        return ("before", self.before), ("after", self.after)

    @property
    def _interval_name(self) -> str:
        return f"{100 * self.confidence:g}% interval"

    def _share(self, flags: Flags) -> Proportion:
        return Proportion(int(flags.sum()), len(flags), self.confidence)

    def _shares(self) -> str:
        interval = self._interval_name
        rows = [["% of images", "before", interval, "after", interval]]
        for name in ("correct", "abstained", "wrong"):
            shares = [self._share(getattr(found, name)) for _, found in self._both]
            rows.append([name, *(cell for share in shares for cell in _cells(share))])
        before, after = (f"{100 * found.share.mean():.2f}" for _, found in self._both)
        return as_text([*rows, ["mean share of votes for the label", before, "", after, ""]])

    def _attack(self) -> str:
        rows = [["% of those correct before", "after", self._interval_name, "images"]]
        named = {"attack success (another class)": self.success_rate, "abstained instead": self.abstention_rate}
        for name, rate in named.items():
            rows.append([name, *_cells(rate), f"{rate.count} of {rate.total}"])
        return as_text(rows)

    def _distances(self) -> str:
        columns = ("mean", "median", "max")
        named = {"l2": self.l2, "l2 of the successes": self.l2[self.success], "linf": self.linf}
        rows = [["perturbation, pixels", *columns]]
        for name, values in named.items():
            summary = _summary(values)
            rows.append([name, *("-" if summary is None else f"{summary[column]:.4f}" for column in columns)])
        return as_text(rows)


def _cells(rate: Proportion) -> tuple[str, str]:
    low, high = rate.interval
    return ("-" if not rate.total else f"{100 * rate.share:.2f}"), f"{100 * low:.1f}-{100 * high:.1f}"


def _summary(distances: Floats) -> dict[str, float] | None:
    """Return mean, median and maximum; None of no distances."""
    if not len(distances):
        return None
    return {
        "mean": float(distances.mean()),
        "median": float(np.median(distances)),
        "max": float(distances.max()),
    }
