"""Writes logs of certification, each image on disk before the next is written; goes on after a crash.

Beside ``LOG.tsv`` lies its record ``LOG.tsv.json``: with what its certificates are made, and for which images.
"""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from rs_plugins.core.certification import Certificate
from rs_plugins.core.files import changes, complete_lines, lock, record_text, write_whole
from rs_plugins.core.results.files import RESULTS, format_row
from rs_plugins.core.results.kinds import LogKind, Table
from rs_plugins.core.selection import Selection, positions_of
from rs_plugins.errors import InputError, ResultsError

_Path = str | os.PathLike[str]
_MadeWith = Any  # a data class of plain values
_Writer = TypeVar("_Writer", bound="LogWriter")


class LogWriter:
    """Appends rows to a log, each on disk before the next is taken; goes on where a killed run stopped.

    Attributes:
        done: Indices of the images that the file holds already.

    Args:
        path: The log; created if absent. Nothing in it is changed before `begin` or the first row, and if there is
            neither, no empty file is left behind.
        kind: What kind of log.

    Raises:
        ResultsError: If the file exists and is no log of ours, cannot be written, or another process is writing it.
    """

    def __init__(self, path: _Path, kind: LogKind[Table]) -> None:
        self.path, self._kind = Path(path), kind
        self.done: set[int] = set()
        self._last = -1
        self._complete = 0  # bytes of the file that are complete lines
        self._made_with: _MadeWith = None
        if os.path.exists(self.path) and not os.path.isfile(self.path) and not os.path.isdir(self.path):
            raise ResultsError(f"{self.path}: expected a file, got a device or a pipe")  # which may never end
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise ResultsError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            lock(self._file, self.path)
            self._look()
        except BaseException:
            self._file.close()
            raise

    def begin(
        self, made_with: _MadeWith, data: Mapping[str, Any] | None = None, selection: Selection | None = None
    ) -> None:
        """Make sure that the file is of this run, before there is a certificate to write.

        A line that a killed run left unfinished is dropped. Called again, it only compares ``made_with``.

        Args:
            made_with: With what all certificates will be made, a data class of plain values.
            data: What tells the data set from others, by name; with ``selection`` also how many ``images`` it has.
            selection: Which of its images the file will hold. One with a later ``stop`` extends a file.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan, seed, data set or selection, or its
                record is missing.
        """
        if self._made_with is not None:
            self._compare(asdict(self._made_with), asdict(made_with))
            return
        record = {**asdict(made_with), **(data or {})}
        if selection is not None:
            record["selection"] = selection.record(record["images"])
        earlier = read_record(self.path) if self.done else None
        if earlier is not None:
            self._compare(earlier, json.loads(record_text(record)))
        if earlier != record:
            write_whole(record_of(self.path), record_text(record))
        self._made_with = made_with
        self._file.truncate(self._complete)
        if not self._complete:
            self._append(self._kind.header.encode())

    def append(self, index: int, made_with: _MadeWith, row: str) -> None:
        """Append the ``row`` of the image ``index``, a line with its end, and force it to disk.

        Raises:
            ResultsError: If the file was begun with anything else than ``made_with``, or holds a later image already.
        """
        if index <= self._last:
            raise ResultsError(f"{self.path}: expected images in increasing order, got {index} after {self._last}")
        self.begin(made_with)
        self._append(row.encode())
        self.done.add(index)
        self._last = index

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if not self._file.closed:
            if self._made_with is None and not self.path.stat().st_size:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            self._file.close()

    def __enter__(self: _Writer) -> _Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compare(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        fixed = [{name: value for name, value in record.items() if name != "selection"} for record in (earlier, now)]
        if difference := changes(*fixed):
            raise ResultsError(f"{self.path}: begun by another run ({difference}); choose another file")
        begun, wanted = positions_of(earlier), positions_of(now)
        if begun is not None and begun != (wanted or [])[: len(begun)]:
            raise ResultsError(
                f"{self.path}: begun for other images ({earlier['selection']} -> {now.get('selection')}); give the "
                "same start, skip and shard and no earlier stop, or choose another file"
            )

    def _append(self, line: bytes) -> None:
        left = line
        try:
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._complete)  # no part of a line may stand before the next one
            raise ResultsError(f"{self.path}: cannot be written ({error.strerror}); go on with it later") from error
        self._complete += len(line)
        if not os.fstat(self._file.fileno()).st_nlink:
            raise ResultsError(f"{self.path}: it was removed or replaced while it was written; begin anew")

    def _look(self) -> None:
        """Find out what the file holds, not counting a line that a killed run left unfinished."""
        complete, cut = complete_lines(self.path)
        header = self._kind.header.encode()
        if header.startswith(complete + cut):  # nothing, or not even the whole header
            return
        if complete.splitlines(keepends=True)[:1] in [[older.encode()] for older in self._kind.older]:
            raise ResultsError(
                f"{self.path}: begun by an older version, which alone can go on with it; choose another file"
            )
        if not complete.startswith(header):
            raise ResultsError(
                f"{self.path}: expected a log begun by rs-plugins, got another file; choose another name"
            )
        self._complete = len(complete)
        self.done = set(self._kind.parse(complete, self.path).idx.tolist())
        self._last = max(self.done, default=-1)


class ResultsWriter(LogWriter):
    """Appends certificates to a log, as `LogWriter` does.

    Args:
        path: The log.

    Raises:
        ResultsError: If the file exists and is no log of ours, cannot be written, or another process is writing it.
    """

    def __init__(self, path: _Path) -> None:
        super().__init__(path, RESULTS)

    def write(self, certificate: Certificate, label: int) -> None:
        """Append the row of one image with true class ``label`` and force it to disk.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan or seed, or holds a later image already.
        """
        self.append(certificate.index, certificate.made_with, format_row(certificate, label))


def record_of(log: Path) -> Path:
    """Return where the record of ``log`` lies."""
    return log.with_name(log.name + ".json")


def record_beside(log: Path) -> dict[str, Any] | None:
    """Return with what the certificates of ``log`` are made, and for which data; None where no record can be read."""
    try:
        content = json.loads(record_of(log).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_record(log: Path) -> dict[str, Any]:
    """Return with what the certificates of ``log`` are made, and for which data.

    Raises:
        ResultsError: If the record is missing or damaged.
    """
    content = record_beside(log)
    if content is None:
        raise ResultsError(
            f"{log}: cannot go on: {record_of(log).name}, which says what it was made with, is missing or damaged"
        )
    return content


def check_log(log: str | Path, *, resume: bool) -> Path:
    """Return where a log is to be written.

    Raises:
        InputError: If there is no such folder.
        ResultsError: If the log exists, has a row and is not to be gone on with. One without any is of a run that
            failed before its first image; who writes it sees whether it is a log, and whether somebody is at work.
    """
    log = Path(log)
    if not resume and os.path.exists(log) and _is_begun(log):  # unlike Path.exists it raises nothing
        raise ResultsError(f"{log}: it exists; to go on with it use resume (--resume), else choose another file")
    if not os.path.isdir(log.parent):
        raise InputError(f"log: there is no folder {log.parent}")
    return log


def _is_begun(log: Path) -> bool:
    if not log.is_file():
        return log.stat().st_size > 0
    lines = b"".join(complete_lines(log)).splitlines()
    return len(lines) > 1 or any(not line.startswith(b"idx\t") for line in lines)  # as the header of every kind does


def positions_left(writer: LogWriter, positions: Sequence[int]) -> list[int]:
    """Return the positions that the log does not hold yet.

    Raises:
        ResultsError: If it holds other images than the first of ``positions``.
    """
    done = sorted(writer.done)
    for held, wanted in zip(done, [*positions, *[None] * len(done)], strict=False):
        if held != wanted:
            got = "an end" if wanted is None else f"image {wanted}"
            raise ResultsError(
                f"{writer.path}: begun with other images (image {held} where this selection has {got}); "
                "give the same start, stop, skip and shard, or choose another file"
            )
    return list(positions[len(done) :])
