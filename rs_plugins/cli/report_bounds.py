"""What logs of ``rs-plugins certify --bounds`` say, as tables."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from rs_plugins.cli.plain_warnings import plain_warnings
from rs_plugins.cli.tables import Table, as_csv, as_markdown, as_text, for_programs, interval, number, percent, plain
from rs_plugins.errors import InputError

if TYPE_CHECKING:
    from rs_plugins.core.proportions import Proportion
    from rs_plugins.core.relaxations.bound_results import BoundResults

_OF_RADII = ("radii", "alpha", "parity", "plot", "out")  # options of report that mean nothing for bounds at one radius


def their_kind(context: click.Context, logs: Sequence[Path]) -> Literal["bounds", "smoothing"]:
    """Return of which kind ``logs`` are.

    Raises:
        InputError: If of both.
        UsageError: If options of ``context`` have no meaning for this kind.
    """
    from rs_plugins.core.relaxations.bound_files import is_bound_log

    bounds = [path for path in logs if is_bound_log(path)]
    if not bounds:
        return "smoothing"
    if others := [path for path in logs if path not in bounds]:
        raise InputError(
            f"logs: expected one kind, got {bounds[0]} of bounds and {others[0]} of votes; show them apart"
        )
    given = [name for name in _OF_RADII if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT]
    if given:
        raise click.UsageError(f"--{given[0]} is not for logs of bounds, which know one radius only")
    return "bounds"


def report_bounds(logs: Sequence[Path], style: str, confidence: float) -> str:
    """Return what ``logs`` say, in the ``style`` text, markdown, csv or json."""
    from rs_plugins.core.checks import check_probability
    from rs_plugins.core.relaxations.bound_files import read_bounds
    from rs_plugins.core.results.comparison import log_names
    from rs_plugins.core.results.merging import warn_unfinished

    check_probability(confidence, "confidence")
    with plain_warnings():
        tables = {name: read_bounds(path) for name, path in zip(log_names(logs), logs, strict=True)}
        for path, results in zip(logs, tables.values(), strict=True):
            warn_unfinished(path, results)
    if style == "json":
        rows = [{"name": name, **_as_dict(results, confidence)} for name, results in tables.items()]
        return json.dumps(for_programs({"confidence": confidence, "logs": rows}), indent=2)
    if style == "csv":
        return as_csv(_long_table(tables, confidence))
    render: Callable[[Table], str] = as_text if style == "text" else as_markdown
    note = "at most: of images that are neither misclassified nor falsified; unknown and failed ones are not verified"
    parts = [render(_overview(tables, confidence)), render(_counts(tables)), note if style == "text" else f"- {note}"]
    return "\n\n".join(parts)


def _shares(results: "BoundResults", confidence: float) -> "dict[str, Proportion]":
    return {
        "natural": results.natural_accuracy(confidence=confidence),
        "certified": results.certified_accuracy(confidence=confidence),
        "at most": results.robust_accuracy_at_most(confidence=confidence),
    }


def _overview(tables: "Mapping[str, BoundResults]", confidence: float) -> Table:
    shown = f"{confidence:.0%} interval"
    figures = ["images", "eps", "norm", "dtype", "natural %", "certified %", shown, "at most %", shown, "s/image"]
    table = [["", *figures]]
    for name, results in tables.items():
        shares = _shares(results, confidence)
        ends = {
            figure: interval(share.interval if share.total else None, lambda end: f"{100 * end:.1f}")
            for figure, share in shares.items()
        }
        table.append(
            [
                *(name, str(len(results)), number(results.eps, ".4g"), results.norm or "-", results.dtype or "-"),
                *(percent(shares["natural"].share), percent(shares["certified"].share), ends["certified"]),
                *(percent(shares["at most"].share), ends["at most"], number(results.mean_seconds, ".3g")),
            ]
        )
    return table


def _counts(tables: "Mapping[str, BoundResults]") -> Table:
    """Return how many images each bound verified, and how many have each status."""
    first = next(iter(tables.values()))
    table = [["images", *(f"by {bound}" for bound in first.verified_by), *first.counts]]
    for name, results in tables.items():
        table.append([name, *map(str, results.verified_by.values()), *map(str, results.counts.values())])
    return table


def _as_dict(results: "BoundResults", confidence: float) -> dict[str, object]:
    shares = {figure: share.as_dict() for figure, share in _shares(results, confidence).items()}
    run = {"images": len(results), "eps": results.eps, "norm": results.norm, "dtype": results.dtype}
    return {
        **run,
        **shares,
        "counts": results.counts,
        "verified by": results.verified_by,
        "seconds": results.mean_seconds,
    }


def _long_table(tables: "Mapping[str, BoundResults]", confidence: float) -> Table:
    """Return one line per figure, for other programs."""
    table = [["log", "figure", "value", "low", "high"]]
    for name, results in tables.items():
        table += [[name, "images", str(len(results)), "", ""], [name, "eps", plain(results.eps), "", ""]]
        for figure, share in _shares(results, confidence).items():
            table.append([name, figure, *map(plain, (share.share, *share.interval))])
        for status, count in results.counts.items():
            table.append([name, status, str(count), "", ""])
        for bound, count in results.verified_by.items():
            table.append([name, f"verified by {bound}", str(count), "", ""])
        table.append([name, "seconds", plain(results.mean_seconds), "", ""])
    return table
