"""``rs-plugins report``: what logs say, as tables, as a picture and as a page."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rs_plugins.cli.options import image_size_option
from rs_plugins.cli.plain_warnings import plain_warnings
from rs_plugins.cli.report_files import check_options, write_files
from rs_plugins.cli.tables import (
    Table,
    as_csv,
    as_markdown,
    as_text,
    for_programs,
    hours,
    interval,
    number,
    percent,
    percent_below,
    plain,
)

if TYPE_CHECKING:
    from rs_plugins.core.results.comparison import Best, Curve, Figures
    from rs_plugins.core.results.logged_noise import LoggedNoise
    from rs_plugins.core.results.logged_plan import LoggedPlan
    from rs_plugins.core.results.table import Results

_PICTURES = (".png", ".pdf", ".svg")
_LONGEST = 24  # of a plan in the table
_USUAL = "gaussian, l2"  # of which nothing is said


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
    return sorted(set(radii))


def _check_picture(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    if path is not None and path.suffix not in _PICTURES:
        raise click.BadParameter(f"expected a name that ends in {', '.join(_PICTURES)}, got {path.name}")
    if path is not None and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {path.parent}")
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
    help="csv and json hold shares instead of percent.",
)
@click.option("--confidence", type=float, default=0.95, show_default=True, help="Of the intervals over the images.")
@click.option("--alpha", type=float, help="Failure probability of each certificate, for logs that do not say.")
@click.option(
    "--parity",
    is_flag=True,
    help="As the published *_acc curves: radii compared in floating point, and the papers' lower bound, which fails "
    "somewhat more often than it says.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=_check_picture,
    help="Draw certified accuracy against radius into this .png, .pdf or .svg file.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.html, a page that needs no other file, report.md, report.csv and pictures into this folder.",
)
@click.option(
    "--data", metavar="FORMAT[:PLACE]", help="With --out: show images of this data set, which is that of the logs."
)
@click.option("--split", type=click.Choice(["test", "train"]), help="Part of --data, if it has parts.  [test]")
@image_size_option
@click.option(
    "--attacked",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="With --data: show these images under attack; a folder that rs-plugins attack wrote.",
)
@click.option("--gallery", type=click.IntRange(min=1), default=8, show_default=True, help="Images shown of --data.")
@click.pass_context
def report(
    context: click.Context,
    /,
    logs: tuple[Path, ...],
    radii: list[float] | None,
    style: str,
    confidence: float,
    alpha: float | None,
    parity: bool,
    plot: Path | None,
    **files: Any,
) -> None:
    """Show what certification logs say: certified accuracy at radii, ACR, abstentions, votes and time.

    Of logs of certify --bounds: natural and certified accuracy, that left by the attack, what is unknown, which bound
    proved how many.

    Reads our logs, those of the published codes, logs of predictions, and curves (radius and accuracy without a
    header). The interval of a certified accuracy is Clopper and Pearson's over the images, that of ACR a bootstrap.
    "Lower bound" is what exact certificates would show at least, with probability 0.999, since each of ours may be
    wrong with probability alpha.

    The plan is that of the record beside a log. What a plan does not tell is -: AtRadius asks only whether its radius
    is certified. The best at a radius is marked where all logs are of the same images and their radii in one norm.

    --out adds confidence bands, histograms of radii and, with --data, images. Files of its names are replaced.
    """
    from rs_plugins.cli.report_bounds import report_bounds, their_kind
    from rs_plugins.core.results.comparison import (
        default_radii,
        differing,
        envelope,
        figures,
        incomparable,
        read_logs,
        read_noises,
        read_plans,
    )

    check_options(context, files)
    if their_kind(context, logs) == "bounds":
        click.echo(report_bounds(logs, style, confidence))
        return
    with plain_warnings():
        tables, plans, noises = read_logs(logs), read_plans(logs), read_noises(logs)
        grid = default_radii(tables, plans) if radii is None else radii
        options: dict[str, Any] = {"confidence": confidence, "alpha": alpha, "parity": parity}
        rows = [
            figures(name, log, grid, plan=plans[name], noise=noises[name], **options) for name, log in tables.items()
        ]
    several = sum(bool(row.certified) for row in rows) > 1
    reason = incomparable(tables, noises) if several else None
    best = envelope(rows) if several and reason is None else []
    notes = _notes(rows, best, reason) + [f"{note[0].lower()}{note[1:].rstrip('.')}" for note in differing(tables)]
    click.echo(_render(style, rows, best, confidence, notes))
    if plot is not None:
        called = _with_norms(noises)
        shown = {called[name]: table for name, table in tables.items()}
        _draw(plot, shown, {called[name]: plan for name, plan in plans.items()})
        click.echo(str(plot), err=True)
    if files["out"] is not None:
        from rs_plugins.report_page.content import Content

        content = Content(rows, tables, plans, noises, confidence, reason, _notes(rows, [], None))
        with plain_warnings():
            written = write_files(content, as_csv(_long_table(rows, best)), dict(zip(tables, logs, strict=True)), files)
        click.echo("\n".join(map(str, written)), err=True)


def _with_norms(noises: "Mapping[str, LoggedNoise | None]") -> dict[str, str]:
    """Return what a picture calls the logs: with the norms of their radii where one is not l2."""
    known = {noise.norm for noise in noises.values() if noise is not None}
    return {
        name: name if noise is None or known == {"l2"} else f"{name}, {noise.norm}" for name, noise in noises.items()
    }


def _draw(path: Path, tables: "Mapping[str, Results | Curve]", plans: "Mapping[str, LoggedPlan | None]") -> None:
    from rs_plugins.plots import save_certified_accuracy

    try:
        save_certified_accuracy(path, tables, plans)
    except OSError as error:
        raise click.ClickException(f"plot: {path}: cannot be written ({error.strerror or error})") from error


def _notes(rows: Sequence["Figures"], best: Sequence["Best"], reason: str | None) -> list[str]:
    """Return what has to be known to read the tables, a line each."""
    from rs_plugins.core.results.table import as_logged

    notes = ["* the best at this radius; of equals the one with the highest clean accuracy"] if best else []
    if reason is not None:
        notes.append(f"no best is marked: {reason}")
    own = {row.plan: row.certified for row in rows if row.plan is not None and row.plan.radii and row.certified}
    if any(len(plan.radii) > 1 for plan in own):
        notes.append("OnGrid: radii, and so ACR, are rounded down to those of the plan")
    if not all(plan.clean for plan in own):
        notes.append(
            "a plan that begins above radius 0 abstains where its first radius is not certified, so clean is -"
        )
    known = {plan: set(map(as_logged, plan.radii)) for plan in own}
    if any(as_logged(at.radius) not in known[plan] for plan, certified in own.items() for at in certified):
        notes.append("AtRadius and OnGrid show between their radii what holds at the next larger one, beyond them -")
    return notes


def _render(
    style: str, rows: Sequence["Figures"], best: Sequence["Best"], confidence: float, notes: Sequence[str]
) -> str:
    if style == "json":
        logs = [asdict(row) | {"plan": row.plan and row.plan.text} for row in rows]
        content = {"confidence": confidence, "logs": logs, "best": [asdict(at) for at in best], "notes": notes}
        return json.dumps(for_programs(content), indent=2)
    if style == "csv":
        return as_csv(_long_table(rows, best))
    render: Callable[[Table], str] = as_text if style == "text" else as_markdown
    labels, legend = _plan_labels([row.plan for row in rows])
    tables = [_overview(rows, labels, confidence)]
    if any(row.certified for row in rows):
        tables.append(_at_radii(rows, best, confidence))
    lines = [*legend, *notes]
    parts = list(map(render, tables))
    if lines:
        parts.append("\n".join(lines if style == "text" else (f"- {line}".replace("*", "\\*") for line in lines)))
    return "\n\n".join(parts)


def _plan_labels(plans: Sequence["LoggedPlan | None"]) -> tuple[list[str], list[str]]:
    """Return what the table calls each plan, and lines that explain those that are long or would look alike."""
    known = list(dict.fromkeys(plan for plan in plans if plan is not None))
    shorts = [plan.short for plan in known]
    unclear = [plan for plan in known if len(plan.short) > _LONGEST or shorts.count(plan.short) > 1]
    numbers = {plan: f"[{number}]" for number, plan in enumerate(unclear, start=1)}
    labels = ["-" if plan is None else numbers.get(plan, plan.short) for plan in plans]
    return labels, [f"{number} {plan.text}" for plan, number in numbers.items()]


def _overview(rows: Sequence["Figures"], labels: Sequence[str], confidence: float) -> Table:
    figures = ["images", "sigma", "clean %", "abstain %", "ACR", f"{confidence:.0%} interval", "votes/image", "time"]
    noisy = any(row.noise is not None and str(row.noise) != _USUAL for row in rows)
    return [
        ["", *figures, *(["noise, norm"] if noisy else []), "plan"],
        *(
            [
                *(row.name, number(row.images, "d"), number(row.sigma, "g")),
                *(percent(row.clean), percent(row.abstention), number(row.acr, ".6f")),
                interval(row.acr_interval, lambda end: f"{end:.4f}"),
                *(number(row.samples, ",.0f"), hours(row.seconds)),
                *([str(row.noise or "-")] if noisy else []),
                label,
            ]
            for row, label in zip(rows, labels, strict=True)
        ),
    ]


def _at_radii(rows: Sequence["Figures"], best: Sequence["Best"], confidence: float) -> Table:
    from rs_plugins.core.results.table import radius_text

    able = [row for row in rows if row.certified]
    table = [["certified accuracy % at radius", *(radius_text(at.radius) for at in able[0].certified)]]
    stars = {(at.name, at.radius) for at in best if at.accuracy > 0}
    for row in able:
        marks = ["*" if (row.name, at.radius) in stars else "" for at in row.certified]
        shares = [percent(at.accuracy) for at in row.certified]
        table.append([row.name, *(mark + share for mark, share in zip(marks, shares, strict=True))])
        if any(at.interval is not None for at in row.certified):
            cells = [interval(at.interval, lambda end: f"{100 * end:.1f}") for at in row.certified]
            table.append([f"  {confidence:.0%} interval", *cells])
        if any(at.lower is not None for at in row.certified):
            table.append(["  lower bound", *(percent_below(at.lower) for at in row.certified)])
    return table


def _long_table(rows: Sequence["Figures"], best: Sequence["Best"]) -> Table:
    """Return one line per figure, for other programs."""
    table = [["log", "figure", "radius", "value", "low", "high"]]
    for row in rows:
        for figure in ("images", "sigma", "clean", "abstention", "acr", "samples", "seconds"):
            low, high = (figure == "acr" and row.acr_interval) or (None, None)
            table.append([row.name, figure, "", *map(plain, (getattr(row, figure), low, high))])
        table.append([row.name, "plan", "", "" if row.plan is None else row.plan.text, "", ""])
        noise = ("", "") if row.noise is None else (row.noise.family, row.noise.norm)
        table.extend(
            [row.name, figure, "", text, "", ""] for figure, text in zip(("family", "norm"), noise, strict=True)
        )
        for at in row.certified:
            low, high = at.interval or (None, None)
            table.append([row.name, "certified", *map(plain, (at.radius, at.accuracy, low, high))])
            table.append([row.name, "certified lower bound", *map(plain, (at.radius, at.lower, None, None))])
    table.extend([at.name, "best", *map(plain, (at.radius, at.accuracy, None, None))] for at in best)
    return table
