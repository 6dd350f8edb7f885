"""Tables as aligned text, Markdown or CSV."""

import csv
import io
from collections.abc import Sequence

Table = Sequence[Sequence[str]]  # the header first


def as_text(table: Table) -> str:
    """Return the table with aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """Return the table as GitHub's Markdown shows it."""
    header, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    rule = [":---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def as_csv(table: Table) -> str:
    """Return the table as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue().rstrip("\n")
