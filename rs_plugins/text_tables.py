"""Tables as aligned text, and figures as their cells, for printed results of core and of the command line."""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_FLOOR, Decimal

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


def number(value: float | None, form: str) -> str:
    """Return ``value`` in a format, "-" if there is none."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def percent(share: float | None) -> str:
    """Return a share as percent, "-" if there is none."""
    return number(None if share is None else 100 * share, ".2f")


def percent_below(share: float | None) -> str:
    """Return a lower bound as percent, rounded down, "-" if there is none."""
    if share is None or math.isnan(share):
        return "-"
    return f"{Decimal(repr(float(share))).scaleb(2).quantize(Decimal('0.01'), rounding=ROUND_FLOOR):f}"


def interval(ends: tuple[float, float] | None, form: Callable[[float], str]) -> str:
    """Return both ends as ``form`` writes them, "-" if there are none."""
    return "-" if ends is None else f"{form(ends[0])}-{form(ends[1])}"


def hours(seconds: float | None) -> str:
    """Return a time as hours, minutes and seconds, "-" if there is none."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
