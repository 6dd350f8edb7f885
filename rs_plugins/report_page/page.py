"""A report as one HTML page that loads nothing, and as Markdown."""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rs_plugins.core.rounding import decimals_below
from rs_plugins.report_page.content import Content, printable
from rs_plugins.report_page.tables import certified_tables, escaped, runs_table

GAMED = (
    "ACR alone can be gamed: a classifier may gain more of it by ever larger radii on easy images than it loses by "
    "giving up hard ones. Read it only together with clean accuracy and accuracy at the radii that matter to you."
)


@dataclass(frozen=True)
class Plot:
    """A picture of the page, in a size for a desk and in one for a phone.

    Attributes:
        file: Name of its files, without ending.
        title: Its heading.
        caption: What it shows.
        alt: The same for those who cannot see it.
        wide: SVG.
        narrow: SVG.
    """

    file: str
    title: str
    caption: str
    alt: str
    wide: bytes
    narrow: bytes

    @property
    def id(self) -> str:
        """By which the page knows it."""
        return self.file


def as_html(content: Content, plots: list[Plot], made: str) -> str:
    """Return the page; ``made`` says when and with what.

    Names of logs, plans and noise families come from files of others: nothing of them is taken for markup.
    """
    page = _environment().get_template("page.html")
    return page.render(
        content=content,
        names=[row.name for row in content.rows],
        made=made,
        gamed=GAMED,
        tables=certified_tables(content),
        runs=runs_table(content),
        reading=reading(content),
        plans=_plans(content),
        plots=plots,
    )


def as_markdown(content: Content, plots: list[Plot], made: str) -> str:
    """Return the same without the gallery as Markdown, for a README; pictures are the PNG files beside it."""
    parts = ["# Certified robustness", escaped(made)]
    parts += [f"> **Take care.** {escaped(warning)}" for warning in content.warnings]
    parts += [f"**{GAMED}**"]
    for table in certified_tables(content):
        parts += [f"{escaped(table.caption)}.", table.markdown]
    parts.append(_bullets(reading(content)))
    for plot in plots:
        parts += [f"## {plot.title}", f"![{escaped(plot.alt)}]({plot.file}.png)", escaped(plot.caption)]
    parts += ["## The logs", runs_table(content).markdown]
    if lines := [*_plans(content), *content.notes]:
        parts.append(_bullets(lines))
    return "\n\n".join(parts) + "\n"


def reading(content: Content) -> list[str]:
    """Return how the tables are to be read."""
    lines = [
        "Clean: the share of images that the smoothed classifier gets right; an abstention is an error. At radius r: "
        f"the share that it gets right with a certified radius of at least r ({content.norm} norm, pixels in [0, 1]).",
        "Intervals: Clopper and Pearson's, exact, over the choice of the images, with confidence "
        f"{content.confidence:g} at each radius by itself; that of ACR is a bootstrap. They take the certificates as "
        "they are.",
    ]
    if any(at.lower is not None for row in content.rows for at in row.certified):
        lines.append(
            "≥: what exact certificates would show at least on these images, with probability 0.999, as each of these "
            "may be wrong with probability alpha."
        )
    if content.comparable:
        lines.append("Bold: the highest of a column, with all that are shown as equal to it.")
    return lines


def _plans(content: Content) -> list[str]:
    return [f"{row.name}: {row.plan.text}" for row in content.rows if row.plan is not None]


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "decimals_below": decimals_below,
        "png": partial(_data_address, "image/png"),
        "svg": partial(_data_address, "image/svg+xml"),
    }
    environment.filters.update(filters)
    return environment


def _finalize(value: object) -> object:
    """Make text printable before it is escaped; leave what is markup already."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _data_address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
