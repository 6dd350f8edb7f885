"""What tells one kind of log from another: the writer and the merging of shards are the same for all kinds."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

_Path = str | os.PathLike[str]


class Table(Protocol):
    """What the rows of a log are read into."""

    @property
    def idx(self) -> npt.NDArray[np.int64]:
        """Positions in the data set, increasing, (n,)."""

    def __len__(self) -> int:
        """Return the number of rows."""


Rows_co = TypeVar("Rows_co", bound=Table, covariant=True)


@dataclass(frozen=True)
class LogKind(Generic[Rows_co]):
    """A kind of log: tab-separated lines under a header, one per image.

    Attributes:
        header: The first line, with its end.
        parse: Reads the bytes of the file of some name; raises a `ResultsError` if they are no such log.
        older: Headers of versions that nobody goes on with, but whose logs can be read.
    """

    header: str
    parse: Callable[[bytes, _Path], Rows_co]
    older: tuple[str, ...] = ()

    @property
    def headers(self) -> tuple[str, ...]:
        """All headers that such a log may have."""
        return (self.header, *self.older)


def first_line(path: _Path) -> str:
    """Return the first line of a file with its end, which tells of which kind it is; bytes that are no text as U+FFFD.

    Raises:
        OSError: If it cannot be read.
    """
    with open(path, "rb") as file:
        return file.readline(4096).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
