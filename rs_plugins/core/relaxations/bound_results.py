"""What deterministic bounds proved about images: a record of each, a table of all and the figures computed from it.

An image about which nothing is known counts as neither verified nor falsified; so does one on which the work failed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rs_plugins.core.proportions import Proportion
from rs_plugins.core.results.table import Floats, Ints, common

Status = Literal["verified", "falsified", "misclassified", "unknown", "failed"]
Bound = Literal["ibp", "crown-ibp", "crown", "alpha-crown"]

STATUSES: tuple[Status, ...] = get_args(Status)
BOUNDS: tuple[Bound, ...] = get_args(Bound)  # from loose and cheap to tight and expensive
PREDICTION, ATTACK = "prediction", "pgd"
METHODS = (PREDICTION, ATTACK, *BOUNDS)


@dataclass(frozen=True)
class BoundProvenance:
    """With what a certificate was made; equal for all certificates of one run.

    Attributes:
        eps: Radius of the ball, in pixels.
        norm: Its norm; a ball of linf is cut off at the ends of [0, 1].
        cascade: The bounds that were tried, in this order, each with its settings.
        attack: What tried to break an image before, with its settings.
        seed: Seed of the attack.
        slack: What a margin has to exceed.
        dtype: Floating-point type of the copy of the model that was certified.
        device: Device type that computed it.
        numerics: The hardware and the settings of torch that rounding depends on (`rs_plugins.core.identity.numerics`).
        model: SHA-256 of the model (`rs_plugins.core.identity.identity`), in its own type.
        versions: Versions of rs-plugins, torch, numpy and python.
    """

    eps: float
    norm: str
    cascade: str
    attack: str
    seed: int
    slack: str
    dtype: str
    device: str
    numerics: str
    model: str
    versions: str


@dataclass(frozen=True)
class BoundCertificate:
    """What is known about the predictions of a classifier in the ball around one image.

    Attributes:
        index: Position of the image in its data set.
        label: True class.
        prediction: Class of the image itself, -1 if that could not be computed.
        status: ``"verified"``: the whole ball has the true class; ``"falsified"``: ``adversarial`` is in the ball and
            has another; ``"misclassified"``: the image itself has another; ``"unknown"``: none of these was found;
            ``"failed"``: an error ended the work on this image.
        method: What decided: ``"prediction"``, ``"pgd"`` or the bound; of an unknown image the last bound that was
            tried, of a failed one what failed.
        margin: The smallest of logit_label - logit_k: over the ball, a lower bound, of images that bounds were computed
            for, the best of all that were; at ``adversarial`` of a falsified image; at the image itself of a
            misclassified one. NaN if there is none.
        slack: What ``margin`` had to exceed; None of images that no bound was computed for.
        seconds: The image's share of the wall-clock time.
        made_with: Everything else that the certificate depends on.
        message: What went wrong, of a failed image.
        adversarial: An image in the ball that the model takes for another class, of a falsified one, (*input).
    """

    index: int
    label: int
    prediction: int
    status: Status
    method: str
    margin: float
    slack: float | None
    seconds: float
    made_with: BoundProvenance
    message: str = ""
    adversarial: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def verified(self) -> bool:
        """Whether the whole ball has the true class."""
        return self.status == "verified"

    @property
    def dtype(self) -> str:
        """Floating-point type that it was computed in."""
        return self.made_with.dtype


@dataclass(frozen=True, eq=False)
class BoundResults:
    """A log of bounds as columns, one entry per image.

    Attributes:
        idx: Positions in the data set, increasing.
        label: True classes.
        predict: Classes of the images themselves.
        status: One of `STATUSES` each.
        method: What decided, one of `METHODS` each.
        margin: See `BoundCertificate`; NaN where there is none.
        slack: What the margin had to exceed; NaN where no bound was computed.
        seconds: Time of each image.
        eps: Radius in pixels; None where there are several.
        norm: Norm of the ball; None where there are several.
        dtype: Floating-point type of the bounds; None where there are several.
    """

    idx: Ints
    label: Ints
    predict: Ints
    status: npt.NDArray[np.str_]
    method: npt.NDArray[np.str_]
    margin: Floats
    slack: Floats
    seconds: Floats
    eps: float | None = None
    norm: str | None = None
    dtype: str | None = None

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def of(cls, certificates: Sequence[BoundCertificate]) -> "BoundResults":
        """Return the table of ``certificates``."""

        def column(name: str, kind: Any) -> Any:
            return np.array([getattr(certificate, name) for certificate in certificates], dtype=kind)

        runs = [each.made_with for each in certificates]
        return cls(
            idx=column("index", np.int64),
            label=column("label", np.int64),
            predict=column("prediction", np.int64),
            status=column("status", np.str_),
            method=column("method", np.str_),
            margin=column("margin", np.float64),
            slack=column("slack", np.float64),  # NaN for None
            seconds=column("seconds", np.float64),
            eps=common([run.eps for run in runs]),
            norm=common([run.norm for run in runs]),
            dtype=common([run.dtype for run in runs]),
        )

    def natural_accuracy(self, *, confidence: float = 0.95) -> Proportion:
        """Return the share of all images that are classified rightly."""
        return self._share(self.predict == self.label, confidence)

    def certified_accuracy(self, *, confidence: float = 0.95) -> Proportion:
        """Return the share of all images that are verified: a lower bound on the robust accuracy."""
        return self._share(self.status == "verified", confidence)

    def robust_accuracy_at_most(self, *, confidence: float = 0.95) -> Proportion:
        """Return the share of all images that are neither misclassified nor falsified: an upper bound."""
        return self._share(~np.isin(self.status, ("misclassified", "falsified")), confidence)

    @property
    def counts(self) -> dict[Status, int]:
        """How many images have each status."""
        return {status: int((self.status == status).sum()) for status in STATUSES}

    @property
    def verified_by(self) -> dict[Bound, int]:
        """How many images each bound was the first to verify."""
        verified = self.status == "verified"
        return {bound: int((verified & (self.method == bound)).sum()) for bound in BOUNDS}

    @property
    def mean_seconds(self) -> float:
        """Mean time of an image; NaN of none."""
        return float(self.seconds.mean()) if len(self) else math.nan

    @staticmethod
    def _share(flags: npt.NDArray[np.bool_], confidence: float) -> Proportion:
        return Proportion(int(flags.sum()), len(flags), confidence)
