"""Certification logs: the TSV that the papers' codes write and read.

One row per image, ``idx label predict radius correct time`` first and in this order, our own columns after ``time``.
``predict`` is -1 for an abstention.
"""

import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rs_plugins.core.certification import Certificate
from rs_plugins.core.plans.protocol import ABSTAIN
from rs_plugins.core.results.kinds import LogKind
from rs_plugins.core.results.table import DIGITS, Results, common
from rs_plugins.core.rounding import digits_below
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

COLUMNS = ("idx", "label", "predict", "radius", "correct", "time")
OUR_COLUMNS = ("pa_lower", "count", "n0", "n", "sigma", "alpha", "seed", "runner_up", "draw", "invalid")
HEADER = "\t".join((*COLUMNS, *OUR_COLUMNS)) + "\n"
OLDER_HEADER = HEADER.removesuffix("\tinvalid\n") + "\n"
_REQUIRED = ("idx", "label", "predict", "correct", "time")  # a prediction log has no radius
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")  # what fits into 64 bits
# Python's float takes more, such as 1_0, which is 10
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf)")
_TIME = re.compile(r"(?:([0-9]{1,9}) days?, )?([0-9]{1,9}):([0-9]{2}):([0-9]{2}(?:\.[0-9]+)?)")


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read a certification or prediction log.

    Understood are LF and CRLF, times as ``H:MM:SS[.ffffff]``, ``1 day, …`` or plain seconds, header-only files, further
    columns, and files that end in the middle of a line (which is left out with a `ResultsWarning`).

    Raises:
        ResultsError: If the file cannot be read or is no such log; the message names the line and what is wrong.
    """
    return parse_results(bytes_of(path), path)


def parse_results(data: bytes, path: str | os.PathLike[str]) -> Results:
    """Read a log from the bytes of the file ``path``, as `read_results` does.

    Raises:
        ResultsError: If they are no such log.
    """
    lines = text_of(data, path).split("\n")
    header = lines[0].split("\t")
    missing = [name for name in _REQUIRED if name not in header]
    if missing:
        raise ResultsError(
            f"{path}: expected a header with the columns {' '.join(COLUMNS)}, got {lines[0]!r:.120} "
            f"(no {', '.join(missing)})"
        )
    if len(set(header)) < len(header):
        raise ResultsError(f"{path}: expected a header with each column once, got {lines[0]!r:.120}")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], start=2):
        if not line and number == len(lines):
            break
        try:
            rows.append(_parse_row(header, line))
            _check_row(rows[-1], rows[-2] if len(rows) > 1 else None)
        except ValueError as error:
            if number == len(lines) and not isinstance(error, _InconsistentError):
                warnings.warn(f"{path}: left out line {number}, cut off in the middle", ResultsWarning, stacklevel=3)
                break
            raise ResultsError(f"{path}, line {number}: {error}") from None

    def column(name: str, kind: type) -> Any:
        return np.array([row[name] for row in rows], dtype=kind)

    counted = "n0" in header and "n" in header
    return Results(
        idx=column("idx", np.int64),
        label=column("label", np.int64),
        predict=column("predict", np.int64),
        radius=column("radius", np.float64) if "radius" in header else None,
        correct=column("correct", np.bool_),
        seconds=column("time", np.float64),
        samples=column("n0", np.int64) + column("n", np.int64) if counted else None,
        sigma=common([row["sigma"] for row in rows]) if "sigma" in header else None,
        alpha=common([row["alpha"] for row in rows]) if "alpha" in header else None,
    )


RESULTS = LogKind(HEADER, parse_results, older=(OLDER_HEADER,))


def bytes_of(path: str | os.PathLike[str]) -> bytes:
    """Return the content of the file ``path``.

    Raises:
        ResultsError: If it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error


def text_of(data: bytes, path: str | os.PathLike[str]) -> str:
    """Return the text of the file ``path``, its lines ended by LF.

    Raises:
        ResultsError: If it is no UTF-8 text.
    """
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ResultsError(f"{path}: expected UTF-8 text, got other bytes ({error.reason})") from None


class _InconsistentError(ValueError):
    """A row that is complete but cannot be true."""


def _parse_row(header: Sequence[str], line: str) -> dict[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(header):
        raise ValueError(f"expected {len(header)} columns, got {len(cells)}")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in ("idx", "label", "predict", "correct", "n0", "n"):
        if name in row:
            row[name] = parse_integer(row[name])
    row["time"] = parse_time(row["time"])
    for name in ("radius", "sigma", "alpha"):
        if name in row:
            row[name] = parse_number(row[name])
    return row


def parse_integer(cell: str) -> int:
    """Return the integer that a cell holds.

    Raises:
        ValueError: If it holds none of 64 bits.
    """
    if _INTEGER.fullmatch(cell) is None:
        raise ValueError(f"expected an integer, got {cell!r:.80}")
    return int(cell)


def parse_number(cell: str) -> float:
    """Return the number that a cell holds, maybe "nan" or "inf".

    Raises:
        ValueError: If it holds none.
    """
    if _NUMBER.fullmatch(cell) is None:
        raise ValueError(f"expected a number, got {cell!r:.80}")
    return float(cell)


def _check_row(row: dict[str, Any], previous: dict[str, Any] | None) -> None:
    radius = row.get("radius", 0.0)
    if previous is not None and row["idx"] <= previous["idx"]:
        raise _InconsistentError(f"idx: expected more than {previous['idx']}, got {row['idx']}")
    if row["predict"] < ABSTAIN or row["idx"] < 0:
        raise _InconsistentError(f"expected idx >= 0 and predict >= -1, got {row['idx']} and {row['predict']}")
    if row["label"] < 0:
        raise _InconsistentError(f"label: expected a class >= 0, got {row['label']}")
    if not 0 <= radius < math.inf:
        raise _InconsistentError(f"radius: expected a finite number >= 0, got {radius}")
    if row["predict"] == ABSTAIN and radius:
        raise _InconsistentError(f"radius: expected 0 for an abstention, got {radius}")
    if min(row.get("n0", 0), row.get("n", 0)) < 0:
        raise _InconsistentError(f"expected n0 and n >= 0, got {row.get('n0')} and {row.get('n')}")
    if not 0 < row.get("sigma", 1.0) < math.inf or not 0 < row.get("alpha", 0.5) < 1:
        raise _InconsistentError(
            f"expected a finite sigma > 0 and alpha in (0, 1), got {row.get('sigma')} and {row.get('alpha')}"
        )
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
        seconds = parse_number(text)
        if not 0 <= seconds < math.inf:
            raise ValueError(f"time: expected seconds >= 0, got {text!r:.80}")
        return seconds
    days, hours, minutes, rest = match.groups()
    return int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(rest)


def format_time(seconds: float) -> str:
    """Return ``seconds`` as ``H:MM:SS.ffffff``."""
    micro = round(seconds * 1e6)
    return f"{micro // 3_600_000_000}:{micro // 60_000_000 % 60:02}:{micro // 1_000_000 % 60:02}.{micro % 1_000_000:06}"


def format_down(value: float, digits: int = DIGITS) -> str:
    """Return a number >= 0 as a decimal of at most ``digits`` significant digits, rounded down.

    Raises:
        InputError: If it is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise InputError(f"value: expected a finite number >= 0, got {value}")
    text = digits_below(value, digits)
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


def format_row(certificate: Certificate, label: int) -> str:
    """Return the line of one image with true class ``label``: the common columns, then ours, an unknown cell empty."""
    c, run = certificate, certificate.made_with
    cells = (
        *(c.index, label, c.prediction, format_down(c.radius), int(c.prediction == label), format_time(c.seconds)),
        *(format_down(c.p_lower, 10), c.count, c.n0, c.n, run.sigma, run.alpha, run.seed),
        *("" if value is None else value for value in (c.runner_up, c.draw, c.invalid)),
    )
    return "\t".join(str(cell) for cell in cells) + "\n"
