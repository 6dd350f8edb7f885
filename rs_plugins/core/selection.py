"""Which images of a data set a run certifies."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rs_plugins.core.checks import MOST_INDICES, check_count
from rs_plugins.errors import InputError


@dataclass(frozen=True)
class Selection:
    """Which images of a data set to certify: every ``skip``-th from ``start`` to before ``stop``; of these, one shard.

    Args:
        start: First position.
        stop: Position before which to stop; None for the end.
        skip: Take the positions that are multiples of this.
        shard: (i, n): of the positions left take the i-th, (i + n)-th, …; i counts from 0.

    Raises:
        InputError: If a number is out of range, or it is not so that 0 <= i < n.
    """

    start: int = 0
    stop: int | None = None
    skip: int = 1
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        check_count(self.start, "start", least=0)
        check_count(self.skip, "skip")
        if self.stop is not None and check_count(self.stop, "stop") <= self.start:
            raise InputError(f"stop: expected more than start ({self.start}), got {self.stop}")
        try:
            part, parts = (check_count(number, "shard", least=0) for number in self.shard)
        except (TypeError, ValueError):
            part = parts = 0
        if not part < parts:
            got = "/".join(map(str, self.shard)) if isinstance(self.shard, tuple) else repr(self.shard)
            raise InputError(f"shard: expected I/N with 0 <= I < N, got {got}")

    def positions(self, images: int) -> list[int]:
        """Return the positions chosen of a data set of so many ``images``, increasing.

        Raises:
            InputError: If there are none.
        """
        return list(self.span(images))

    def span(self, images: int) -> range:
        """Return the same positions without a list of them, which another's record can make as long as memory.

        Raises:
            InputError: If there are none.
        """
        stop = images if self.stop is None else min(int(self.stop), images)
        skip, (part, parts) = int(self.skip), map(int, self.shard)
        first = -(-int(self.start) // skip) * skip
        chosen = range(first, max(first, stop), skip)[part::parts]
        if not chosen:
            raise InputError(
                f"selection: expected at least one image, got none of {images} by start {self.start}, stop {stop}, "
                f"skip {self.skip}, shard {part}/{parts}"
            )
        return chosen

    def record(self, images: int) -> dict[str, Any]:
        """Return what is written beside a log; the end of a data set of so many ``images`` is the same as no end."""
        stop = images if self.stop is None else min(self.stop, images)
        shard = [int(number) for number in self.shard]
        return {"start": int(self.start), "stop": int(stop), "skip": int(self.skip), "shard": shard}


def selection_of(record: Mapping[str, Any]) -> Selection | None:
    """Return the selection in the record beside a log; None if it has none, as those of older versions.

    Raises:
        InputError: If it cannot be.
    """
    kept = record.get("selection")
    if not isinstance(kept, dict) or not isinstance(record.get("images"), int):
        return None
    check_count(record["images"], "images", most=MOST_INDICES)
    try:
        part, parts = kept["shard"]
        return Selection(kept["start"], kept["stop"], kept["skip"], (part, parts))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"selection: expected start, stop, skip and shard, got {kept}") from None


def positions_of(record: Mapping[str, Any]) -> range | None:
    """Return the positions of the images that a log with this record is to hold; None if that is not known.

    Raises:
        InputError: If there are none.
    """
    selection = selection_of(record)
    return None if selection is None else selection.span(record["images"])
