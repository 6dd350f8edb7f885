"""Tables as aligned text, Markdown or CSV, and figures as their cells."""

import csv
import io
import math

from rs_plugins.text_tables import Table, as_text, hours, interval, number, percent, percent_below

__all__ = [
    "Table",
    "as_csv",
    "as_markdown",
    "as_text",
    "for_programs",
    "hours",
    "interval",
    "number",
    "percent",
    "percent_below",
    "plain",
]


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


def plain(value: float | None) -> str:
    """Return a figure for programs, "" if there is none."""
    return "" if value is None or math.isnan(value) else repr(_rounded(value))


def _rounded(value: float) -> float:
    """Return ``value`` without the last digits of floating-point sums, 0.8 in place of 0.7999999999999999."""
    return value if isinstance(value, int) else float(f"{value:.8g}")


def for_programs(value: object) -> object:
    """Return ``value`` for JSON: None for NaN, floats rounded."""
    if isinstance(value, dict):
        return {key: for_programs(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [for_programs(item) for item in value]
    if isinstance(value, float):
        return None if math.isnan(value) else _rounded(value)
    return value
