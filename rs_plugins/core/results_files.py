"""Certification logs: the TSV that the papers' codes write and read, in and out, and going on after a crash.

One row per image, ``idx label predict radius correct time`` first and in this order, our own columns after ``time``.
``predict`` is -1 for an abstention.
"""

import contextlib
import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path
from types import ModuleType, TracebackType
from typing import IO, Any

import numpy as np

from rs_plugins.core.certification import Certificate
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.results import Results
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

fcntl: ModuleType | None = None
with contextlib.suppress(ImportError):  # POSIX only
    import fcntl

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
OUR_COLUMNS = ("pa_lower", "count", "n0", "n", "sigma", "alpha", "seed")
_REQUIRED = ("idx", "label", "predict", "correct", "time")  # a prediction log has no radius
_INTEGER = re.compile(r"-?\d{1,18}")  # what fits into 64 bits
_TIME = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a certification or prediction log.

    Understood are LF and CRLF, times as ``H:MM:SS[.ffffff]``, ``1 day, …`` or plain seconds, header-only files, further
    columns, and files that end in the middle of a line (which is left out with a `ResultsWarning`).

    Raises:
        ResultsError: If the file is no such log; the message names the line and what is wrong with it.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: expected UTF-8 text, got other bytes ({error.reason})") from None
    lines = text.replace("\r\n", "\n").split("\n")
    header = lines[0].split("\t")
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise ResultsError(
            f"{path}: expected a header with the columns {' '.join(COLUMNS)}, got {lines[0]!r:.120} "
            f"(no {', '.join(missing)})"
        )
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line and number == len(lines):
            break
        try:
            rows.append(_parse_row(header, line))
            _check_row(rows[-1], rows[-2] if len(rows) > 1 else None)
        except ValueError as error:
            if number == len(lines) and not isinstance(error, _InconsistentError):
                warnings.warn(f"{path}: left out line {number}, cut off in the middle", ResultsWarning, stacklevel=2)
                break
            raise ResultsError(f"{path}, line {number}: {error}") from None

    def column(name: str, kind: type) -> Any:
        return np.array([row[name] for row in rows], dtype=kind)

    return Results(
        idx=column("idx", np.int64),
        label=column("label", np.int64),
        predict=column("predict", np.int64),
        radius=column("radius", np.float64) if "radius" in header else None,
        correct=column("correct", np.bool_),
        seconds=column("time", np.float64),
    )


class _InconsistentError(ValueError):
    """A row that is complete but cannot be true."""


def _parse_row(header: Sequence[str], line: str) -> dict[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(header):
        raise ValueError(f"expected {len(header)} columns, got {len(cells)}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in ("idx", "label", "predict", "correct"):
        row[name] = _integer(row[name])
    row["time"] = parse_time(row["time"])
    if "radius" in row:
        row["radius"] = float(row["radius"])
    return row


def _integer(cell: str) -> int:
    if _INTEGER.fullmatch(cell) is None:
        raise ValueError(f"expected an integer, got {cell!r}")
    return int(cell)


def _check_row(row: dict[str, Any], previous: dict[str, Any] | None) -> None:
    radius = row.get("radius", 0.0)
    if previous is not None and row["idx"] <= previous["idx"]:
        raise _InconsistentError(f"idx: expected more than {previous['idx']}, got {row['idx']}")
    if row["predict"] < ABSTAIN or row["idx"] < 0:
        raise _InconsistentError(f"expected idx >= 0 and predict >= -1, got {row['idx']} and {row['predict']}")
    if not 0 <= radius < math.inf:
        raise _InconsistentError(f"radius: expected a finite number >= 0, got {radius}")
    if row["predict"] == ABSTAIN and radius:
        raise _InconsistentError(f"radius: expected 0 for an abstention, got {radius}")
    if row["correct"] != int(row["predict"] == row["label"]):
        raise _InconsistentError(
            f"correct: got {row['correct']} for label {row['label']} and prediction {row['predict']}"
        )


def parse_time(text: str) -> float:
    """Return the seconds of ``H:MM:SS[.ffffff]``, ``N day[s], H:MM:SS``, or a plain number of seconds.

    Raises:
        ValueError: If it is none of these.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        seconds = float(text)
        if not 0 <= seconds < math.inf:
            raise ValueError(f"time: expected seconds >= 0, got {text!r}")
        return seconds
    days, hours, minutes, rest = match.groups()
    return int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(rest)


def format_time(seconds: float) -> str:
    """Return ``seconds`` as ``H:MM:SS.ffffff``."""
    micro = round(seconds * 1e6)
    return f"{micro // 3_600_000_000}:{micro // 60_000_000 % 60:02}:{micro // 1_000_000 % 60:02}.{micro % 1_000_000:06}"


def format_down(value: float, digits: int = 8) -> str:
    """Return a number >= 0 as a decimal of at most ``digits`` significant digits, rounded down.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"value: expected a finite number >= 0, got {value}")
    rounded = Context(prec=digits, rounding=ROUND_DOWN).create_decimal(Decimal(value))
    text = f"{rounded:f}"
    return text if "." in text else f"{text}.0"


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write ``results`` as a log of the six common columns, for certificates of which no more is known.

    Raises:
        ResultsError: If this is a log of predictions.
    """
    columns = zip(
        *(results.idx, results.label, results.predict, map(format_down, results.radii.tolist())),
        *(results.correct.astype(int), map(format_time, results.seconds.tolist())),
        strict=True,
    )
    lines = ["\t".join(COLUMNS), *("\t".join(str(cell) for cell in row) for row in columns)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="")


class ResultsWriter:
    """Appends certificates to a log, each on disk before the next; goes on where a killed run stopped.

    Beside ``LOG.tsv`` it keeps ``LOG.tsv.json`` with what all certificates of the file were made with.

    Attributes:
        done: Indices of the images that the file holds already.

    Args:
        path: The log; created with its header if absent or empty.

    Raises:
        ResultsError: If the file exists and is no log of ours, or another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.done: set[int] = set()
        self._last = -1
        self._recorded = False
        self._file: IO[str] = self.path.open("a+", encoding="utf-8", newline="")
        try:
            self._lock()
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def write(self, certificate: Certificate, label: int) -> None:
        """Append the row of one image with true class ``label`` and force it to disk.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan or seed, or holds a later image already.
        """
        c, run = certificate, certificate.made_with
        if c.index <= self._last:
            raise ResultsError(f"{self.path}: expected images in increasing order, got {c.index} after {self._last}")
        if not self._recorded:
            self._record(asdict(run))
        cells = (
            *(c.index, label, c.prediction, format_down(c.radius), int(c.prediction == label), format_time(c.seconds)),
            *(format_down(c.p_lower, 10), c.count, c.n0, c.n, run.sigma, run.alpha, run.seed),
        )
        self._append("\t".join(str(cell) for cell in cells) + "\n")
        self.done.add(c.index)
        self._last = c.index

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "ResultsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        if fcntl is None:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResultsError(f"{self.path}: another process is writing this file") from None

    def _go_on(self) -> None:
        """Find out what the file holds, drop a line that a killed run left unfinished, and go to its end."""
        header = "\t".join((*COLUMNS, *OUR_COLUMNS)) + "\n"
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if header.startswith(data.decode("utf-8", "replace")):  # nothing, or not even the whole header
            complete = b""
        elif not complete.decode("utf-8", "replace").startswith(header):
            raise ResultsError(
                f"{self.path}: expected a log begun by rs-plugins, got another file; choose another name"
            )
        if len(complete) < len(data):
            self._file.truncate(len(complete))
        if complete:
            self.done = set(read_results(self.path).idx.tolist())
            self._last = max(self.done, default=-1)
        else:
            self._append(header)

    def _record(self, made_with: dict[str, Any]) -> None:
        """Write down what the run's certificates are made with, or compare it with what an earlier run wrote."""
        record = self.path.with_name(self.path.name + ".json")
        if not self.done:
            draft = record.with_name(record.name + ".part")
            with draft.open("w", encoding="utf-8") as file:
                file.write(json.dumps(made_with, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            draft.replace(record)
        else:
            earlier = self._read_record(record)
            changes = [
                f"{key}: {earlier.get(key)!r} -> {new!r}" for key, new in made_with.items() if earlier.get(key) != new
            ]
            if changes:
                raise ResultsError(f"{self.path}: begun by another run ({'; '.join(changes)}); choose another file")
        self._recorded = True

    def _read_record(self, record: Path) -> dict[str, Any]:
        try:
            earlier = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            earlier = None
        if not isinstance(earlier, dict):
            raise ResultsError(
                f"{self.path}: cannot go on: {record.name}, which says what it was made with, is missing or damaged"
            )
        return earlier
