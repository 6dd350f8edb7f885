"""The noise of a log, as its record names it: of which family it is, and in which norm its radii are."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rs_plugins.core.results.writer import record_beside

USUAL = "l2"  # what published logs, which do not say, have


@dataclass(frozen=True)
class LoggedNoise:
    """The noise of a log.

    Attributes:
        family: Name of the noise family.
        norm: Norm of the certified radii.
    """

    family: str
    norm: str

    def __str__(self) -> str:
        return f"{self.family}, {self.norm}"


def read_noise(log: str | os.PathLike[str]) -> LoggedNoise | None:
    """Return the noise in the record beside ``log``; None where there is none that can be read."""
    record = record_beside(Path(log)) or {}
    family, norm = record.get("family"), record.get("norm")
    return LoggedNoise(family, norm) if isinstance(family, str) and isinstance(norm, str) else None


def unlike(noises: Mapping[str, LoggedNoise | None], names: Sequence[str]) -> str | None:
    """Return why radii of the logs ``names`` are not of one norm; None if they are, or all that say so are of l2."""
    norms = {name: noise.norm for name in names if (noise := noises.get(name)) is not None}
    told = list(dict.fromkeys(norms.values()))
    if len(told) > 1:
        one, other = (next(name for name, norm in norms.items() if norm == each) for each in told[:2])
        return f"the radii of {one} are in {told[0]}, those of {other} in {told[1]}"
    silent = [name for name in names if name not in norms]
    if silent and told not in ([], [USUAL]):
        return f"the radii of {next(iter(norms))} are in {told[0]}, {silent[0]} does not say in which norm its are"
    return None
