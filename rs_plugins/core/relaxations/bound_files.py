"""Logs of bounds: one row per image, tab-separated, as `BoundResults` reads them."""

import math
import os
import warnings
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, get_args

import numpy as np

from rs_plugins.core.relaxations.bound_results import (
    ATTACK,
    BOUNDS,
    METHODS,
    PREDICTION,
    STATUSES,
    BoundCertificate,
    BoundResults,
)
from rs_plugins.core.relaxations.regions import Norm
from rs_plugins.core.results.files import bytes_of, format_time, parse_integer, parse_number, parse_time, text_of
from rs_plugins.core.results.kinds import LogKind, first_line
from rs_plugins.core.results.table import common
from rs_plugins.core.results.writer import LogWriter
from rs_plugins.errors import ResultsError, ResultsWarning

_Path = str | os.PathLike[str]
COLUMNS = ("idx", "label", "predict", "status", "method", "margin", "slack", "time", "eps", "norm", "dtype", "message")
HEADER = "\t".join(COLUMNS) + "\n"
DIGITS = 8  # of margins: other batches round beyond these
_ROUNDED = 1 + 1e-6  # one digit less than those written
_LONGEST = 300  # characters of a message
_DECIDING = {"verified": BOUNDS, "unknown": BOUNDS, "falsified": (ATTACK,), "misclassified": (PREDICTION,)}


def is_bound_log(path: _Path) -> bool:
    """Return whether the file begins as a log of bounds does.

    Raises:
        OSError: If it cannot be read.
    """
    return first_line(path) == HEADER


def read_bounds(path: _Path) -> BoundResults:
    """Read a log of bounds; a last line that is cut off is left out with a `ResultsWarning`.

    Raises:
        ResultsError: If the file cannot be read or is no such log; the message names the line and what is wrong.
    """
    return parse_bounds(bytes_of(path), path)


def parse_bounds(data: bytes, path: _Path) -> BoundResults:
    """Read a log from the bytes of the file ``path``, as `read_bounds` does.

    Raises:
        ResultsError: If they are no such log.
    """
    lines = text_of(data, path).split("\n")
    if lines[0] + "\n" != HEADER:
        raise ResultsError(f"{path}: expected a header with the columns {' '.join(COLUMNS)}, got {lines[0]!r:.120}")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[1:], start=2):
        if number == len(lines):
            if line:
                warnings.warn(f"{path}: left out line {number}, cut off in the middle", ResultsWarning, stacklevel=3)
            break
        try:
            rows.append(_parse_row(line))
            _check_row(rows[-1], rows[-2]["idx"] if len(rows) > 1 else -1)
        except ValueError as error:
            raise ResultsError(f"{path}, line {number}: {error}") from None

    def column(name: str, kind: Any) -> Any:
        return np.array([row[name] for row in rows], dtype=kind)

    return BoundResults(
        *(column(name, np.int64) for name in ("idx", "label", "predict")),
        *(column(name, np.str_) for name in ("status", "method")),
        *(column(name, np.float64) for name in ("margin", "slack", "time")),
        *(common([row[name] for row in rows]) for name in ("eps", "norm", "dtype")),
    )


BOUND_LOG = LogKind(HEADER, parse_bounds)


class BoundsWriter(LogWriter):
    """Appends certificates of bounds to a log, as `LogWriter` does.

    Args:
        path: The log.

    Raises:
        ResultsError: If the file exists and is no such log, cannot be written, or another process is writing it.
    """

    def __init__(self, path: _Path) -> None:
        super().__init__(path, BOUND_LOG)

    def write(self, certificate: BoundCertificate) -> None:
        """Append the row of one image and force it to disk.

        Raises:
            ResultsError: If the file was begun with another model, ball or cascade, or holds a later image already.
        """
        self.append(certificate.index, certificate.made_with, format_row(certificate))


def format_row(certificate: BoundCertificate) -> str:
    """Return the line of one image: the margin rounded down, the slack up, an unknown cell empty."""
    c, run = certificate, certificate.made_with
    cells = (
        *(c.index, c.label, c.prediction, c.status, c.method, rounded(c.margin, DIGITS, ROUND_FLOOR)),
        "" if c.slack is None else rounded(c.slack, DIGITS, ROUND_CEILING),
        *(format_time(c.seconds), run.eps, run.norm, run.dtype, " ".join(c.message.split())[:_LONGEST]),
    )
    return "\t".join(str(cell) for cell in cells) + "\n"


def rounded(value: float, digits: int, rounding: str) -> str:
    """Return ``value`` as a decimal of at most so many significant ``digits``; "nan" or "inf" of others."""
    if not math.isfinite(value):
        return str(value)
    return str(Context(prec=digits, rounding=rounding).create_decimal(Decimal(value)))


def _parse_row(line: str) -> dict[str, Any]:
    cells = line.split("\t")
    if len(cells) != len(COLUMNS):
        raise ValueError(f"expected {len(COLUMNS)} columns, got {len(cells)}")
    row: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
    for name in ("idx", "label", "predict"):
        row[name] = parse_integer(row[name])
    row["time"] = parse_time(row["time"])
    for name in ("margin", "slack", "eps"):
        row[name] = parse_number(row[name] or "nan")
    return row


def _check_row(row: dict[str, Any], previous: int) -> None:
    status, method, margin = row["status"], row["method"], row["margin"]
    if row["idx"] <= previous:
        raise ValueError(f"idx: expected more than {previous}, got {row['idx']}")
    if not 0 <= row["eps"] < math.inf:
        raise ValueError(f"eps: expected a finite number >= 0, got {row['eps']}")
    if row["norm"] not in get_args(Norm):
        raise ValueError(f"norm: expected one of {', '.join(get_args(Norm))}, got {row['norm']!r:.80}")
    if status not in STATUSES:
        raise ValueError(f"status: expected one of {', '.join(STATUSES)}, got {status!r:.80}")
    if method not in _DECIDING.get(status, METHODS):
        raise ValueError(f"method: expected one of {', '.join(_DECIDING.get(status, METHODS))}, got {method!r:.80}")
    if status != "failed" and (row["predict"] == row["label"]) == (status == "misclassified"):
        raise ValueError(f"status: got {status} for label {row['label']} and prediction {row['predict']}")
    if status == "verified" and not 0 < margin < math.inf:
        raise ValueError(f"margin: expected a finite number > 0 of a verified image, got {margin}")
    if status == "verified" and not margin * _ROUNDED > row["slack"]:
        raise ValueError(f"margin: expected more than the slack {row['slack']} of a verified image, got {margin}")
    if status == "falsified" and not margin < 0:
        raise ValueError(f"margin: expected a number < 0 of a falsified image, got {margin}")
