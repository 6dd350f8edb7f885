"""Tables as aligned text, Markdown or CSV."""

import csv
import io

from rs_plugins.text_tables import Table, as_text

__all__ = ["Table", "as_csv", "as_markdown", "as_text"]


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
