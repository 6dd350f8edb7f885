"""Writes certification logs, each image on disk before the next; goes on after a crash, and puts shards together.

Beside ``LOG.tsv`` lies its record ``LOG.tsv.json``: with what all certificates of the log are made, and for which data.
"""

import contextlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from rs_plugins.core.certification import Certificate, Provenance
from rs_plugins.core.results import Ints, Results
from rs_plugins.core.results_files import HEADER, format_row, parse_results
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

fcntl: ModuleType | None = None
with contextlib.suppress(ImportError):  # POSIX only
    import fcntl

_Path = str | os.PathLike[str]
_HEADER = HEADER.encode()


class ResultsWriter:
    """Appends certificates to a log, each on disk before the next; goes on where a killed run stopped.

    Attributes:
        done: Indices of the images that the file holds already.

    Args:
        path: The log; created if absent. Nothing in it is changed before `begin` or the first `write`, and if neither
            is called, no empty file is left behind.

    Raises:
        ResultsError: If the file exists and is no log of ours, cannot be written, or another process is writing it.
    """

    def __init__(self, path: _Path) -> None:
        self.path = Path(path)
        self.done: set[int] = set()
        self._last = -1
        self._complete = 0  # bytes of the file that are complete lines
        self._made_with: Provenance | None = None
        try:
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise ResultsError(f"{self.path}: cannot be written ({error.strerror})") from error
        try:
            self._lock()
            self._look()
        except BaseException:
            self._file.close()
            raise

    def begin(self, made_with: Provenance, data: Mapping[str, Any] | None = None) -> None:
        """Make sure that the file is of this run, before there is a certificate to write.

        A line that a killed run left unfinished is dropped. Called again, it only compares ``made_with``.

        Args:
            made_with: With what all certificates will be made.
            data: What tells the data set from others, by name.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan, seed or data set, or its record is
                missing.
        """
        if self._made_with is not None:
            self._compare(asdict(self._made_with), asdict(made_with))
            return
        record = {**asdict(made_with), **(data or {})}
        if self.done:
            self._compare(read_record(self.path), json.loads(_record_text(record)))
        else:
            _write_whole(record_of(self.path), _record_text(record))
        self._made_with = made_with
        self._file.truncate(self._complete)
        if not self._complete:
            self._append(_HEADER)

    def write(self, certificate: Certificate, label: int) -> None:
        """Append the row of one image with true class ``label`` and force it to disk.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan or seed, or holds a later image already.
        """
        index = certificate.index
        if index <= self._last:
            raise ResultsError(f"{self.path}: expected images in increasing order, got {index} after {self._last}")
        self.begin(certificate.made_with)
        self._append(format_row(certificate, label).encode())
        self.done.add(index)
        self._last = index

    def close(self) -> None:
        """Close the file; calling it again does nothing."""
        if not self._file.closed:
            if self._made_with is None and not self.path.stat().st_size:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            self._file.close()

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compare(self, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if changes := _changes(earlier, now):
            raise ResultsError(f"{self.path}: begun by another run ({changes}); choose another file")

    def _append(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResultsError(f"{self.path}: cannot be written ({error.strerror}); go on with it later") from error

    def _lock(self) -> None:
        if fcntl is None:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(f"{self.path}: another process is writing this file") from None
        except OSError:  # a file system without locks
            return

    def _look(self) -> None:
        """Find out what the file holds, not counting a line that a killed run left unfinished."""
        complete, cut = _complete_lines(self.path)
        if _HEADER.startswith(complete + cut):  # nothing, or not even the whole header
            return
        if not complete.startswith(_HEADER):
            raise ResultsError(
                f"{self.path}: expected a log begun by rs-plugins, got another file; choose another name"
            )
        self._complete = len(complete)
        self.done = set(parse_results(complete, self.path).idx.tolist())
        self._last = max(self.done, default=-1)


def merge_results(logs: Sequence[_Path], out: _Path) -> Results:
    """Put the logs of a run's shards together: the file, and its record, that one run over all images would have made.

    Returns:
        The rows of all logs, by index. Where some seem to be missing between others there is a `ResultsWarning`.

    Raises:
        InputError: If there are no logs.
        ResultsError: If one is no log of ours or not finished, they are of different runs, an image is in two of them,
            or ``out`` exists.
    """
    if not logs:
        raise InputError("logs: expected at least one, got none")
    target, paths = Path(out), [Path(log) for log in logs]
    if target.exists() and target.stat().st_size:
        raise ResultsError(f"{target}: expected a new file, got one that exists; choose another name")
    first, *others = (read_record(path) for path in paths)
    for path, record in zip(paths[1:], others, strict=True):
        if changes := _changes(first, record):
            raise ResultsError(f"{path}: of another run than {paths[0]} ({changes})")
    text = _merged(paths)
    _write_whole(record_of(target), _record_text(first))
    _write_whole(target, text)
    results = parse_results(text, target)
    _warn_gaps(target, results.idx)
    return results


def record_of(log: Path) -> Path:
    """Return where the record of ``log`` lies."""
    return log.with_name(log.name + ".json")


def read_record(log: Path) -> dict[str, Any]:
    """Return with what the certificates of ``log`` are made, and for which data.

    Raises:
        ResultsError: If the record is missing or damaged.
    """
    record = record_of(log)
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ResultsError(
            f"{log}: cannot go on: {record.name}, which says what it was made with, is missing or damaged"
        )
    return content


def _complete_lines(path: Path) -> tuple[bytes, bytes]:
    """Return the complete lines of a file, and the rest of it."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    return data[:end], data[end:]


def _merged(paths: Sequence[Path]) -> bytes:
    rows: dict[int, tuple[bytes, Path]] = {}
    for path in paths:
        complete, cut = _complete_lines(path)
        if not complete.startswith(_HEADER):
            raise ResultsError(f"{path}: expected a log begun by rs-plugins, got another file")
        if cut:
            raise ResultsError(f"{path}: it ends in the middle of a line; go on with that run first")
        indices = parse_results(complete, path).idx.tolist()
        for index, line in zip(indices, complete.splitlines(keepends=True)[1:], strict=True):
            if index in rows:
                raise ResultsError(f"{path}: image {index} is in {rows[index][1]} already")
            rows[index] = line, path
    return b"".join([_HEADER, *(rows[index][0] for index in sorted(rows))])


def _warn_gaps(path: Path, indices: Ints) -> None:
    gaps = np.diff(indices)
    wide = np.flatnonzero(gaps > gaps.min()) if len(gaps) else gaps
    if len(wide):
        missing = int(indices[wide[0]] + gaps.min())
        warnings.warn(
            f"{path}: image {missing} is in none of the logs; is a shard missing or not finished?",
            ResultsWarning,
            stacklevel=3,
        )


def _changes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two records, old -> new."""
    names = [*earlier, *(name for name in now if name not in earlier)]
    return "; ".join(
        f"{name}: {earlier.get(name)!r} -> {now.get(name)!r}" for name in names if earlier.get(name) != now.get(name)
    )


def _record_text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file so that at every moment it is there with the whole content, or as it was before."""
    draft = path.with_name(path.name + ".part")
    try:
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise ResultsError(f"{path}: cannot be written ({error.strerror})") from error
