"""Writes the files of a report."""

from datetime import datetime, timezone
from pathlib import Path

import rs_plugins
from rs_plugins.core.files import write_whole
from rs_plugins.errors import InputError
from rs_plugins.report_page.content import Content
from rs_plugins.report_page.page import Plot, as_html, as_markdown
from rs_plugins.report_page.pictures import NARROW, WIDE, Draw, as_png, as_svg, curves, histograms

HTML, MARKDOWN, CSV = "report.html", "report.md", "report.csv"


def write_report(folder: str | Path, content: Content, table: str) -> list[Path]:
    """Write ``report.html``, ``report.md``, ``report.csv`` and the pictures as SVG and PNG into ``folder``.

    The folder is made if absent; files of these names in it are replaced.

    Args:
        folder: Where to.
        content: What is reported.
        table: The figures as CSV.

    Returns:
        The files.

    Raises:
        InputError: If the folder cannot be made.
        MissingDependencyError: If matplotlib is not installed.
        ResultsError: If a file cannot be written.
    """
    folder, files = Path(folder), {}
    plots = []
    for draw, file, title, caption in _pictures(content):
        picture = draw(content, WIDE)
        narrow = draw(content, NARROW)
        if picture is None or narrow is None:
            continue
        files[f"{file}.png"] = as_png(picture)
        files[f"{file}.svg"] = as_svg(picture)
        alt = f"{title} of {', '.join(row.name for row in content.rows)}"
        plots.append(Plot(file, title, caption, alt, files[f"{file}.svg"], as_svg(narrow)))
    made = f"rs-plugins {rs_plugins.__version__}, {datetime.now(timezone.utc):%Y-%m-%d}"
    for name, text in (
        (HTML, as_html(content, plots, made)),
        (MARKDOWN, as_markdown(content, plots, made)),
        (CSV, table + "\n"),
    ):
        files[name] = text.encode("utf-8", "backslashreplace")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"out: {folder} cannot be made ({error.strerror})") from error
    for name, data in files.items():
        write_whole(folder / name, data)
    return [folder / name for name in (HTML, MARKDOWN, CSV, *sorted(set(files) - {HTML, MARKDOWN, CSV}))]


def _pictures(content: Content) -> list[tuple[Draw, str, str, str]]:
    return [
        (
            curves,
            "certified-accuracy",
            "Certified accuracy against radius",
            "The share of images that are right with at least this radius. Bands: Clopper and Pearson's intervals over "
            f"the choice of the images, with confidence {content.confidence:g} at each radius by itself. Bands that "
            "overlap do not mean that there is no difference: logs of the same images share their choice. A cliff at "
            "the right end of a curve is the largest radius that its number of votes can prove.",
        ),
        (
            histograms,
            "radii",
            "Radii of the images",
            "How many of the images, in %, have which certified radius; a panel for each log, the same radii in all. "
            "Abstentions have none. A high bar at the right end: more votes would prove larger radii.",
        ),
    ]
