"""What a report is about, and what has to be said before its figures are compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from rs_plugins.core.results.comparison import Curve, Figures, differing
from rs_plugins.core.results.logged_noise import LoggedNoise
from rs_plugins.core.results.logged_plan import LoggedPlan
from rs_plugins.core.results.table import Results
from rs_plugins.report_page.gallery import Gallery


@dataclass(frozen=True, eq=False)
class Content:
    """What a report is about.

    Attributes:
        rows: The figures of the logs, in their order.
        logs: The logs by name.
        plans: Their plans, as far as they are known.
        noises: Their noise, as far as it is known.
        confidence: Of the intervals over the images.
        incomparable: Why no log can be called better than another; None if one can.
        notes: What has to be known to read the figures.
        gallery: Some of the images.
    """

    rows: Sequence[Figures]
    logs: Mapping[str, Results | Curve]
    plans: Mapping[str, LoggedPlan | None]
    noises: Mapping[str, LoggedNoise | None]
    confidence: float = 0.95
    incomparable: str | None = None
    notes: Sequence[str] = ()
    gallery: Gallery | None = None

    @property
    def several(self) -> bool:
        """Whether there are logs to compare."""
        return sum(bool(row.certified) for row in self.rows) > 1

    @property
    def comparable(self) -> bool:
        """Whether the best of a column can be marked."""
        return self.several and self.incomparable is None

    @property
    def norm(self) -> str:
        """In which norm the radii are; of several norms all."""
        known = [noise.norm if (noise := self.noises.get(name)) else "l2" for name in self._able]
        return ", ".join(dict.fromkeys(known)) or "l2"

    @property
    def warnings(self) -> list[str]:
        """Why figures of different logs are not, or only with care, to be compared."""
        found = []
        if self.several and self.incomparable is not None:
            found.append(f"These logs cannot be compared, so no best is marked: {self.incomparable}.")
        return found + differing(self.logs)

    @property
    def _able(self) -> dict[str, Results]:
        return {name: log for name, log in self.logs.items() if certified(log)}


def certified(log: Results | Curve) -> TypeGuard[Results]:
    """Whether ``log`` has certificates of images: neither a curve, nor a log of predictions, nor without rows."""
    return isinstance(log, Results) and log.radius is not None and len(log) > 0


def printable(text: str) -> str:
    r"""Return ``text`` with what cannot be shown, or would hide or turn around other text, as ``\x1b`` or ``\u202e``.

    Names of files may hold anything but a slash.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )
