"""Shares of images, with exact confidence intervals over the choice of the images."""

import math
from dataclasses import dataclass
from typing import Any

from rs_plugins.core.confidence import clopper_pearson_lower, clopper_pearson_upper


@dataclass(frozen=True)
class Proportion:
    """A share of images, with what the choice of the images leaves open.

    Attributes:
        count: How many.
        total: Of how many.
        confidence: Probability that `interval` holds the share among all images from which these were drawn.
    """

    count: int
    total: int
    confidence: float = 0.95

    @property
    def share(self) -> float:
        """The share; NaN of none."""
        return self.count / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the two-sided Clopper-Pearson interval; (0, 1) of none."""
        if not self.total:
            return 0.0, 1.0
        tail = (1 - self.confidence) / 2
        return clopper_pearson_lower(self.count, self.total, tail), clopper_pearson_upper(self.count, self.total, tail)

    def as_dict(self) -> dict[str, Any]:
        """Return count, total, share (None of none) and interval as plain data."""
        share = self.share if self.total else None
        return {"count": self.count, "total": self.total, "share": share, "interval": list(self.interval)}
