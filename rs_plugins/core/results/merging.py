"""Puts the logs of shards together, if nothing is missing, and finds out what is."""

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rs_plugins.core.files import changes, complete_lines, lock, record_text, write_whole
from rs_plugins.core.results.files import RESULTS
from rs_plugins.core.results.kinds import LogKind, Rows_co, Table
from rs_plugins.core.results.table import Ints, Results
from rs_plugins.core.results.writer import read_record, record_of
from rs_plugins.core.selection import Selection, positions_of, selection_of
from rs_plugins.errors import InputError, ResultsError, ResultsWarning

_Path = str | os.PathLike[str]
_Record = dict[str, Any]
_LINE = re.compile(rb"[^\n]*\n")  # not splitlines, to which other bytes end a line, too
_NAMED = 20  # shards that are named where they are missing


def merge_results(logs: Sequence[_Path], out: _Path, *, partial: bool = False) -> Results:
    """Put the logs of a run's shards together as `merge_logs` does, those of randomized smoothing.

    Raises:
        InputError: If there are no logs.
        ResultsError: As `merge_logs`.
    """
    return merge_logs(logs, out, RESULTS, partial=partial)


def merge_logs(logs: Sequence[_Path], out: _Path, kind: LogKind[Rows_co], *, partial: bool = False) -> Rows_co:
    """Put the logs of a run's shards together: the file, and its record, that one run over all images would have made.

    Args:
        logs: The logs, in any order.
        out: The file to write; beside it ``out.json``.
        kind: What kind of logs.
        partial: Merge what there is, with a `ResultsWarning`, where a shard is missing or not finished.

    Returns:
        The rows of all logs, by index. Logs of older versions do not say which images they are to hold: where some seem
        to be missing between others there is a `ResultsWarning`.

    Raises:
        InputError: If there are no logs.
        ResultsError: If one is no log of ours, or is being written; they are of different runs, an image is in two of
            them, or ``out`` exists; and unless ``partial``, if one is not finished or a shard is missing.
    """
    if not logs:
        raise InputError("logs: expected at least one, got none")
    target, paths = Path(out), [Path(log) for log in logs]
    if target.exists() and target.stat().st_size:
        raise ResultsError(f"{target}: expected a new file, got one that exists; choose another name")
    with contextlib.ExitStack() as held:
        for path in paths:
            held.enter_context(_at_rest(path))
        records = [read_record(path) for path in paths]
        for path, record in zip(paths[1:], records[1:], strict=True):
            if difference := changes(_of_all(records[0]), _of_all(record)):
                raise ResultsError(f"{path}: of another run than {paths[0]} ({difference})")
        text = _merged(paths, kind, partial)
        results = kind.parse(text, target)
        record, missing = _of_whole(records), _missing(paths, records, kind, results.idx)
    if missing and not partial:
        raise ResultsError(f"{missing}; partial (--partial) merges what there is")
    if missing:
        warnings.warn(f"{target}: {missing}", ResultsWarning, stacklevel=2)
    elif "selection" not in record:
        _warn_gaps(target, results.idx)
    write_whole(record_of(target), record_text(record))
    write_whole(target, text)
    return results


def warn_unfinished(log: _Path, results: Table) -> None:
    """Warn where ``log``, whose rows are ``results``, holds fewer images than the record beside it says it will."""
    try:
        positions = positions_of(read_record(Path(log)))
    except (InputError, ResultsError):  # no record, or none of ours
        return
    if positions is not None and len(results) < len(positions):
        warnings.warn(
            f"{log}: not finished: {len(results)} of {len(positions)} images; the figures are of these alone",
            ResultsWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _at_rest(path: Path) -> Iterator[None]:
    """Keep others from writing the log while it is read."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror})") from error
    with file:
        lock(file, path, shared=True)
        yield


def _of_all(record: Mapping[str, Any]) -> _Record:
    """Return what the records of all shards have in common."""
    common = {name: value for name, value in record.items() if name != "selection"}
    selection = selection_of(record)
    return common if selection is None else common | {"skip": selection.skip}


def _of_whole(records: Sequence[_Record]) -> _Record:
    """Return the record that one run over the images of all would have."""
    selections = [selection_of(record) for record in records]
    known = [selection.record(records[0]["images"]) for selection in selections if selection is not None]
    if not known:
        return records[0]
    start, stop = min(each["start"] for each in known), max(each["stop"] for each in known)
    whole = Selection(start, stop, known[0]["skip"])
    return records[0] | {"selection": whole.record(records[0]["images"])}


def _missing(paths: Sequence[Path], records: Sequence[_Record], kind: LogKind[Table], indices: Ints) -> str:
    """Return in words what is missing of the images that all logs together should hold, nothing if all are there."""
    for path, record in zip(paths, records, strict=True):
        wanted = positions_of(record)
        if wanted is not None and (left := _left(wanted, _indices(path, kind))):
            done = len(wanted) - left[0]
            return (
                f"{path}: not finished: {done} of {len(wanted)} images, no image {left[1]}; go on with that run first"
            )
    lost = _left(positions_of(_of_whole(records)) or range(0), indices.tolist())
    if not lost:
        return ""
    shards = {record["selection"]["shard"][1] for record in records}
    given = {record["selection"]["shard"][0] for record in records}
    missing = (f"{part}/{parts}" for parts in shards for part in range(parts) if part not in given)
    absent = [*islice(missing, _NAMED), *(["..."] if next(missing, None) else [])]
    names = f", so is shard {', '.join(absent)}" if len(shards) == 1 and absent else ""
    return f"logs: {lost[0]} images are missing, the first is image {lost[1]}{names}"


def _left(wanted: range, held: Sequence[int]) -> tuple[int, int] | None:
    """Return how many positions of ``wanted`` are not among ``held``, and the first of them; None if all are.

    A record of others may ask for any number of them, so they are not put into a list.
    """
    found = {position for position in held if position in wanted}
    first = next((position for position in wanted if position not in found), None)
    return None if first is None else (len(wanted) - len(found), first)


def _indices(path: Path, kind: LogKind[Table]) -> list[int]:
    found: list[int] = kind.parse(complete_lines(path)[0], path).idx.tolist()
    return found


def _merged(paths: Sequence[Path], kind: LogKind[Table], partial: bool) -> bytes:
    rows: dict[int, tuple[bytes, Path]] = {}
    headers: dict[bytes, Path] = {}
    for path in paths:
        complete, cut = complete_lines(path)
        header, *lines = _LINE.findall(complete) or [b""]
        if header.decode(errors="replace") not in kind.headers:
            raise ResultsError(f"{path}: expected a log begun by rs-plugins, got another file")
        if cut and not partial:
            raise ResultsError(f"{path}: it ends in the middle of a line; go on with that run first")
        headers.setdefault(header, path)
        for index, line in zip(kind.parse(complete, path).idx.tolist(), lines, strict=True):
            if index in rows:
                raise ResultsError(f"{path}: image {index} is in {rows[index][1]} already")
            rows[index] = line, path
    first, *others = headers
    if others:
        raise ResultsError(f"{headers[others[0]]}: expected the same columns as in {headers[first]}")
    return b"".join([first, *(rows[index][0] for index in sorted(rows))])


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
