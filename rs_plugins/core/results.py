"""The certificate table: the TSV that the papers' codes write and read, and the figures computed from it.

One row per image, ``idx label predict radius correct time`` first and in this order, our own columns after ``time``.
``predict`` is -1 for an abstention. Certified accuracy at r is the share of all rows that are correct with radius >= r.
"""

import json
import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_DOWN, Context, Decimal
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rs_plugins.core.certification import ABSTAIN, Certificate
from rs_plugins.core.checks import check_probability
from rs_plugins.errors import ResultsError, ResultsWarning

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
OUR_COLUMNS = ("pa_lower", "count", "n_used", "sigma", "alpha", "seed")
_REQUIRED = ("idx", "label", "predict", "correct", "time")  # a prediction log has no radius
_TIME = re.compile(r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)")

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Results:
    """A certification log as columns, one entry per image.

    Attributes:
        idx: Positions in the data set, increasing.
        label: True labels.
        predict: Certified classes, -1 for abstention.
        radius: Certified radii in pixels, 0 for abstention; None for a log of predictions.
        correct: Whether ``predict`` equals ``label``.
        seconds: Time of each image.
    """

    idx: Ints
    label: Ints
    predict: Ints
    radius: Floats | None
    correct: npt.NDArray[np.bool_]
    seconds: Floats

    def __len__(self) -> int:
        return len(self.idx)

    @classmethod
    def of(cls, certificates: Sequence[Certificate], labels: Sequence[int]) -> "Results":
        """Return the table of ``certificates`` for images with true ``labels``."""
        predict = np.array([c.prediction for c in certificates], dtype=np.int64)
        label = np.array(labels, dtype=np.int64)
        return cls(
            idx=np.array([c.index for c in certificates], dtype=np.int64),
            label=label,
            predict=predict,
            radius=np.array([c.radius for c in certificates], dtype=np.float64),
            correct=predict == label,
            seconds=np.array([c.seconds for c in certificates], dtype=np.float64),
        )

    def certified_accuracy(self, radii: Sequence[float] | Floats, *, parity: bool = False) -> Floats:
        """Return the share of all rows that are correct with radius >= r, for each r of ``radii`` in pixels.

        Args:
            radii: The radii. They are taken as decimals: 0.8250000000000001 out of a floating-point grid means 0.825.
            parity: Compare the floating-point numbers as they are, as the published curves did.

        Raises:
            ResultsError: If this is a log of predictions.
        """
        radius = self._radii()
        if not self._any_rows("certified accuracy"):
            return np.full(len(radii), math.nan)
        grid = np.asarray(radii, dtype=np.float64)
        if not parity:
            grid = np.array([round(r, 9) for r in grid.tolist()])
        return np.array([float(np.mean(self.correct & (radius >= r))) for r in grid])

    def certified_accuracy_lower(
        self, radii: Sequence[float] | Floats, *, alpha: float = 0.001, rho: float = 0.001
    ) -> Floats:
        """Return a lower bound on the certified accuracy of the smoothed classifier, right with probability 1 - rho.

        Each certificate is wrong with probability ``alpha``; Bernstein's inequality says how many of them can be.

        Raises:
            ResultsError: If this is a log of predictions.
            InputError: If ``alpha`` or ``rho`` is outside (0, 1).
        """
        alpha, rho = check_probability(alpha, "alpha"), check_probability(rho, "rho")
        n = max(1, len(self))
        doubt = math.log(1 / rho) / n
        return self.certified_accuracy(radii) - alpha - math.sqrt(alpha * (1 - alpha) * doubt) - doubt / 3

    @property
    def average_certified_radius(self) -> float:
        """ACR: the mean over all rows of the radius where correct, else 0. Easy images can inflate it."""
        radius = self._radii()
        return float(np.mean(self.correct * radius)) if self._any_rows("ACR") else math.nan

    @property
    def accuracy(self) -> float:
        """Share of correct rows; an abstention is an error."""
        return float(np.mean(self.correct)) if self._any_rows("accuracy") else math.nan

    @property
    def abstention(self) -> float:
        """Share of rows that abstain."""
        return float(np.mean(self.predict == ABSTAIN)) if self._any_rows("abstention") else math.nan

    def _radii(self) -> Floats:
        if self.radius is None:
            raise ResultsError("radius: this is a log of predictions, which has no radii")
        return self.radius

    def _any_rows(self, figure: str) -> bool:
        if not len(self):
            warnings.warn(f"{figure} is undefined: the table has no rows", ResultsWarning, stacklevel=3)
        return bool(len(self))


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a certification or prediction log.

    Understood are LF and CRLF, times as ``H:MM:SS[.ffffff]``, ``1 day, …`` or plain seconds, header-only files, further
    columns, and files that end in the middle of a line (which is left out with a `ResultsWarning`).

    Raises:
        ResultsError: If the file is no such log; the message names the line and what is wrong with it.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
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
    column: Callable[[str, type], Any] = lambda name, kind: np.array([row[name] for row in rows], dtype=kind)  # noqa: E731
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
        row[name] = int(row[name])
    row["time"] = parse_time(row["time"])
    if "radius" in row:
        row["radius"] = float(row["radius"])
    return row


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
    """Return a number >= 0 as a decimal of at most ``digits`` significant digits, rounded down."""
    rounded = Context(prec=digits, rounding=ROUND_DOWN).create_decimal(Decimal(value))
    text = f"{rounded:f}"
    return text if "." in text else f"{text}.0"


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write ``results`` as a log of the six common columns, for certificates of which no more is known.

    Raises:
        ResultsError: If this is a log of predictions.
    """
    columns = zip(
        *(results.idx, results.label, results.predict, map(format_down, results._radii().tolist())),
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
        ResultsError: If the file exists and is no log of ours.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.done: set[int] = set()
        self._header = "\t".join((*COLUMNS, *OUR_COLUMNS)) + "\n"
        if self.path.exists() and self.path.stat().st_size:
            self._drop_unfinished_line()
            self.done = set(read_results(self.path).idx.tolist())
        self._file: IO[str] = self.path.open("a", encoding="utf-8", newline="")
        if not self._file.tell():
            self._append(self._header)
        self._recorded = False

    def write(self, certificate: Certificate, label: int) -> None:
        """Append the row of one image with true class ``label`` and force it to disk.

        Raises:
            ResultsError: If the file was begun with another model, noise, plan or seed.
        """
        if not self._recorded:
            self._record(asdict(certificate.made_with))
        c, run = certificate, certificate.made_with
        cells = (
            *(c.index, label, c.prediction, format_down(c.radius), int(c.prediction == label), format_time(c.seconds)),
            *(format_down(c.p_lower, 10), c.count, c.n0 + c.n, run.sigma, run.alpha, run.seed),
        )
        self._append("\t".join(str(cell) for cell in cells) + "\n")
        self.done.add(c.index)

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

    def _record(self, made_with: dict[str, Any]) -> None:
        """Write down what the run's certificates are made with, or compare it with what an earlier run wrote."""
        record = self.path.with_name(self.path.name + ".json")
        if not self.done:
            draft = record.with_name(record.name + ".part")
            draft.write_text(json.dumps(made_with, indent=2) + "\n", encoding="utf-8")
            draft.replace(record)
        elif not record.exists():
            raise ResultsError(f"{self.path}: cannot go on without {record.name}, which says what it was made with")
        else:
            earlier = json.loads(record.read_text(encoding="utf-8"))
            changes = [
                f"{key}: {earlier.get(key)!r} -> {new!r}" for key, new in made_with.items() if earlier.get(key) != new
            ]
            if changes:
                raise ResultsError(f"{self.path}: begun by another run ({'; '.join(changes)}); choose another file")
        self._recorded = True

    def _drop_unfinished_line(self) -> None:
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if not data[:end].decode("utf-8", "replace").startswith(self._header):
            raise ResultsError(
                f"{self.path}: expected a log begun by rs-plugins, got another file; choose another name"
            )
        if end < len(data):
            with self.path.open("r+b") as file:
                file.truncate(end)
