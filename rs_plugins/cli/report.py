"""``rs-plugins report``: what logs say, as tables and as a picture."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rs_plugins.cli.plain_warnings import plain_warnings
from rs_plugins.cli.tables import Table, as_csv, as_markdown, as_text

if TYPE_CHECKING:
    from rs_plugins.core.report import Best, Figures

_PICTURES = (".png", ".pdf", ".svg")


def _parse_radii(_context: click.Context, _option: click.Parameter, text: str | None) -> list[float] | None:
    """Read ``0,0.25,0.5`` or ``0:1:0.25``, of which the end is included."""
    if text is None:
        return None
    try:
        if ":" not in text:
            radii = [float(part) for part in text.split(",")]
        else:
            start, stop, step = (float(part) for part in text.split(":"))
            radii = [start + place * step for place in range(math.floor((stop - start) / step + 1e-9) + 1)]
    except (ValueError, ZeroDivisionError, OverflowError):
        radii = []
    if not radii or not all(0 <= radius < math.inf for radius in radii):
        raise click.BadParameter(f"expected 0,0.25,0.5 or START:STOP:STEP, radii >= 0, got {text!r}")
    return radii


def _check_picture(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in _PICTURES:
        raise click.BadParameter(f"expected a name that ends in {', '.join(_PICTURES)}, got {path.name}")
    return path


@click.command(epilog="Example: rs-plugins report a.tsv b.tsv --radii 0:1.5:0.25 --format markdown --plot curves.png")
@click.argument("logs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--radii",
    callback=_parse_radii,
    metavar="R,R,...|START:STOP:STEP",
    help="Radii in pixels.  [multiples of 0.25 until nothing is certified]",
)
@click.option(
    *("--format", "style"),
    type=click.Choice(["text", "markdown", "csv", "json"]),
    default="text",
    show_default=True,
    help="csv and json hold all digits, and shares instead of percent.",
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the intervals over the images.")
@click.option("--alpha", type=float, help="Failure probability of each certificate, for logs that do not say.")
@click.option("--parity", is_flag=True, help="Compare radii in floating point, as the published *_acc curves did.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_check_picture,
    help="Draw certified accuracy against radius into this .png, .pdf or .svg file.",
)
def report(
    logs: tuple[Path, ...],
    radii: list[float] | None,
    style: str,
    confidence: float,
    alpha: float | None,
    parity: bool,
    plot: Path | None,
) -> None:
    """Show what certification logs say: certified accuracy at radii, ACR, abstentions, votes and time.

    Reads our logs, those of the published codes, logs of predictions, and curves (radius and accuracy without a
    header). The interval of a certified accuracy is Clopper and Pearson's over the images, that of ACR a bootstrap.
    "Lower bound" is what exact certificates would show at least, with probability 0.999, since each of ours may be
    wrong with probability alpha.
    """
    from rs_plugins.core.report import default_radii, envelope, figures, read_logs

    with plain_warnings():
        tables = read_logs(logs)
        grid = default_radii(tables) if radii is None else radii
        rows = [
            figures(name, log, grid, confidence=confidence, alpha=alpha, parity=parity) for name, log in tables.items()
        ]
    best = envelope(rows) if len(rows) > 1 else []
    if plot is not None:
        from rs_plugins.plots import save_certified_accuracy

        save_certified_accuracy(plot, tables)
    click.echo(_render(style, rows, best, confidence))


def _render(style: str, rows: Sequence["Figures"], best: Sequence["Best"], confidence: float) -> str:
    if style == "json":
        content = {"confidence": confidence, "logs": [asdict(row) for row in rows], "best": [asdict(at) for at in best]}
        return json.dumps(_without_nan(content), indent=2)
    if style == "csv":
        return as_csv(_long_table(rows, best))
    render: Callable[[Table], str] = as_text if style == "text" else as_markdown
    tables = [_overview(rows, confidence)]
    if any(row.certified for row in rows):
        tables.append(_at_radii(rows, best, confidence))
    parts = list(map(render, tables))
    if best:
        parts.append("* the best at this radius; of equals the one with the highest clean accuracy")
    return "\n\n".join(parts)


def _overview(rows: Sequence["Figures"], confidence: float) -> Table:
    header = ["", "images", "sigma", "clean %", "abstain %", "ACR", f"{confidence:.0%} interval", "votes/image", "time"]
    return [
        header,
        *(
            [
                *(row.name, _number(row.images, "d"), _number(row.sigma, "g")),
                *(_percent(row.clean), _percent(row.abstention), _number(row.acr, ".6f")),
                _interval(row.acr_interval, lambda end: f"{end:.4f}"),
                *(_number(row.samples, ",.0f"), _time(row.seconds)),
            ]
            for row in rows
        ),
    ]


def _at_radii(rows: Sequence["Figures"], best: Sequence["Best"], confidence: float) -> Table:
    able = [row for row in rows if row.certified]
    table = [["certified accuracy % at radius", *(f"{at.radius:g}" for at in able[0].certified)]]
    stars = {(at.name, at.radius) for at in best if at.accuracy > 0}
    for row in able:
        marks = ["*" if (row.name, at.radius) in stars else "" for at in row.certified]
        shares = [_percent(at.accuracy) for at in row.certified]
        table.append([row.name, *(mark + share for mark, share in zip(marks, shares, strict=True))])
        if row.certified[0].interval is not None:
            cells = [_interval(at.interval, lambda end: f"{100 * end:.1f}") for at in row.certified]
            table.append([f"  {confidence:.0%} interval", *cells])
        if row.certified[0].lower is not None:
            table.append(["  lower bound", *(_percent(at.lower) for at in row.certified)])
    return table


def _long_table(rows: Sequence["Figures"], best: Sequence["Best"]) -> Table:
    """Return one line per figure, for other programs."""
    table = [["log", "figure", "radius", "value", "low", "high"]]
    for row in rows:
        for figure in ("images", "sigma", "clean", "abstention", "acr", "samples", "seconds"):
            low, high = (figure == "acr" and row.acr_interval) or (None, None)
            table.append([row.name, figure, "", *map(_plain, (getattr(row, figure), low, high))])
        for at in row.certified:
            low, high = at.interval or (None, None)
            table.append([row.name, "certified", *map(_plain, (at.radius, at.accuracy, low, high))])
            table.append([row.name, "certified, lower bound", *map(_plain, (at.radius, at.lower, None, None))])
    table.extend([at.name, "best", *map(_plain, (at.radius, at.accuracy, None, None))] for at in best)
    return table


def _plain(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else repr(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, ".2f")


def _interval(ends: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    return "-" if ends is None else f"{form(ends[0])}-{form(ends[1])}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
