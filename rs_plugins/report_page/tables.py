"""The tables of a report, the same for the page and for Markdown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rs_plugins.core.results.comparison import At, Figures
from rs_plugins.core.results.table import radius_text
from rs_plugins.report_page.content import Content, printable
from rs_plugins.text_tables import hours, interval, number, percent, percent_below

COLUMNS = 10  # of a table: more do not fit on a sheet of paper
NONE = "-"
_MARKED = "\\`*_{}[]<>|~&#$!"  # what Markdown would understand


@dataclass(frozen=True)
class Cell:
    """One figure.

    Attributes:
        text: The figure.
        details: What is known of it beside.
        best: Whether no other row of the column has a better one.
    """

    text: str
    details: tuple[str, ...] = ()
    best: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table with a row for each log.

    Attributes:
        caption: What it shows.
        heads: Of the columns, that of the names left out.
        rows: The name of a log, and its cells.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    @property
    def markdown(self) -> str:
        """The table as GitHub's Markdown shows it, the best in bold."""
        heads = ["", *map(escaped, self.heads)]
        lines = [heads, [":---", *["---:"] * len(self.heads)]]
        lines += [[escaped(name), *map(_in_markdown, cells)] for name, cells in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def certified_tables(content: Content) -> list[PageTable]:
    """Return ACR, clean accuracy and certified accuracy at radii, never ACR alone, in tables that are not too wide."""
    shown = f"{content.confidence:.0%} interval in small print"
    rows = content.rows
    columns = [("ACR", [_acr(row) for row in rows]), ("clean %", [Cell(percent(row.clean)) for row in rows])]
    able = [row for row in rows if row.certified]
    for place, at in enumerate(able[0].certified if able else ()):
        columns.append(
            (f"r = {radius_text(at.radius)}", [_at(row.certified[place] if row.certified else None) for row in rows])
        )
    if content.comparable:
        columns = [(head, _marked(cells)) for head, cells in columns]
    first = f"Average certified radius (ACR), clean accuracy, and certified accuracy in % at radius r; {shown}"
    more = f"Certified accuracy in % at larger radii r; {shown}"
    width = math.ceil(len(columns) / math.ceil(len(columns) / COLUMNS))  # no table of a single column at the end
    starts = range(0, len(columns), width)
    return [_table(rows, columns[start : start + width], more if start else first) for start in starts]


def runs_table(content: Content) -> PageTable:
    """Return how the logs were made, and what they took."""
    rows = content.rows
    alphas = [getattr(content.logs.get(row.name), "alpha", None) for row in rows]
    columns = [
        ("images", [number(row.images, ",d") for row in rows]),
        ("noise, norm", [str(row.noise or NONE) for row in rows]),
        ("sigma", [number(row.sigma, "g") for row in rows]),
        ("alpha", [number(alpha, "g") for alpha in alphas]),
        ("abstain %", [percent(row.abstention) for row in rows]),
        ("votes/image", [number(row.samples, ",.0f") for row in rows]),
        ("time", [hours(row.seconds) for row in rows]),
        ("plan", [NONE if row.plan is None else row.plan.short for row in rows]),
    ]
    told = [(head, list(map(Cell, texts))) for head, texts in columns if set(texts) != {NONE}]
    return _table(rows, told, "How the logs were made, as far as they say")


def _table(rows: Sequence[Figures], columns: Sequence[tuple[str, Sequence[Cell]]], caption: str) -> PageTable:
    cells = zip(*(column for _, column in columns), strict=True)
    heads = tuple(head for head, _ in columns)
    return PageTable(caption, heads, tuple((row.name, line) for row, line in zip(rows, cells, strict=True)))


def _acr(row: Figures) -> Cell:
    ends = row.acr_interval
    return Cell(number(row.acr, ".6f"), () if ends is None else (interval(ends, lambda end: f"{end:.4f}"),))


def _at(at: At | None) -> Cell:
    if at is None:
        return Cell(NONE)
    details: tuple[str, ...] = () if at.interval is None else (interval(at.interval, lambda end: f"{100 * end:.1f}"),)
    if at.lower is not None and percent(at.accuracy) != NONE:
        details += (f"≥ {percent_below(at.lower)}",)
    return Cell(percent(at.accuracy), details)


def _marked(cells: Sequence[Cell]) -> list[Cell]:
    """Return ``cells`` with the highest marked, and what is shown as equal to it; 0 is never the best."""
    known = [float(cell.text) for cell in cells if cell.text != NONE]
    top = max(known, default=0.0)
    return [replace(cell, best=cell.text != NONE and float(cell.text) == top > 0) for cell in cells]


def _in_markdown(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.best else escaped(cell.text)
    return f"{text} ({'; '.join(map(escaped, cell.details))})" if cell.details else text


def escaped(text: str) -> str:
    """Return ``text`` so that Markdown shows it as it is."""
    return "".join(f"\\{letter}" if letter in _MARKED else letter for letter in printable(text))
