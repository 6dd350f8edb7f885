"""Writes logs of certification, each image on disk before the next is written; goes on after a crash.

Beside ``LOG.tsv`` lies its record ``LOG.tsv.json``: with what its certificates are made, and for which images.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any, TypeVar

from rs_plugins.core.certification import Certificate
from rs_plugins.core.log_kinds import LogKind, Table
from rs_plugins.core.results_files import RESULTS, format_row
from rs_plugins.core.selection import Selection, positions_of
from rs_plugins.errors import ResultsError

fcntl: ModuleType | None = None
with contextlib.suppress(ImportError):  # POSIX only
    import fcntl

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


def lock(file: IO[bytes], path: Path, *, shared: bool = False) -> None:
    """Lock an open log where that is possible: one process at a time may write it, and none while it is read.

    Raises:
        ResultsError: If another process is writing it.
    """
    if fcntl is None:  # Windows
        return
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ResultsError(f"{path}: another process is writing this file") from None
    except OSError:  # a file system without locks
        return


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


def complete_lines(path: Path) -> tuple[bytes, bytes]:
    """Return the complete lines of a file, and the rest of it."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two records, old -> new."""
    names = [*earlier, *(name for name in now if name not in earlier)]
    return "; ".join(
        f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}" for name in names if earlier.get(name) != now.get(name)
    )


def record_text(record: Mapping[str, Any]) -> bytes:
    """Return the content of the file of a record."""
    return (json.dumps(record, indent=2) + "\n").encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at every moment it is there with the whole content, or as it was before."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()  # on a full disk it takes the room that others need
        raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error


def _sync_folder(folder: Path) -> None:
    """Force the names of a folder's files to disk, where that is possible."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
